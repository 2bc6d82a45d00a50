"""Judging generated images."""
