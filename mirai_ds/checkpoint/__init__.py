"""Checkpoints in a layout-free form, and foreign weights."""
