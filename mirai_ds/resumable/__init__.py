"""Work in parts that may be killed at any instant and goes on where it was: for extraction and sampling."""
