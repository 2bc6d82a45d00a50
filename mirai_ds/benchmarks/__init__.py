"""Measurements of speed and memory; each prints a table and writes rows where it is told to."""
