"""Finished and running runs looked at, compared and described; what is inside stores and checkpoints."""
