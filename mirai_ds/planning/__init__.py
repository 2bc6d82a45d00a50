"""What a configuration will need before it runs: memory, floating-point operations, traffic, time, disk."""
