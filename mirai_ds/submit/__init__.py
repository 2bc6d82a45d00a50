"""Slurm jobs: a strict schema, templates rendered from it, and `sbatch`."""

from mirai_ds.submit.cluster import SlurmCluster, read_cluster
from mirai_ds.submit.job import SlurmJob
from mirai_ds.submit.plan import SubmitOptions, plan
from mirai_ds.submit.render import render
from mirai_ds.submit.send import send, write_script

__all__ = ["SlurmCluster", "SlurmJob", "SubmitOptions", "plan", "read_cluster", "render", "send", "write_script"]
