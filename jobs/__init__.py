"""Slurm job templates and cluster files that `mirai-ds submit` renders; installed as `mirai_ds.jobs`."""
