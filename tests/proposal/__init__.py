"""A recipe for a folder of images."""
