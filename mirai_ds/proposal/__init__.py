"""A recipe proposed for a folder of images: what is in it, what fits it and this machine, and why."""
