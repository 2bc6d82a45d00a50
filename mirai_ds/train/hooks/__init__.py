"""Behaviours around the loop, one a file; `registry` builds those that the configuration names."""
