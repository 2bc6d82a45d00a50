"""A run's folder: its lock, outcome, attempts, records.  Imports no torch."""
