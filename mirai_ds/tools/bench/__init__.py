"""Benchmarks that need a whole training session."""
