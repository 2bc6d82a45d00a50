"""Facts about the process, its peers and its machine, and randomness without state."""
