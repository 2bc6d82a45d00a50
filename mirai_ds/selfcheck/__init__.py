"""Whether this installation computes what it should: reference vectors, peers' numbers, the machine's devices."""
