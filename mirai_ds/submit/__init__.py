"""Slurm jobs: a strict schema, templates rendered from it, and `sbatch`."""

from mirai_ds.submit.cluster import Cluster, read_cluster
from mirai_ds.submit.job import Job
from mirai_ds.submit.plan import Wish, plan
from mirai_ds.submit.render import render
from mirai_ds.submit.send import send, write_script

__all__ = ["Cluster", "Job", "Wish", "plan", "read_cluster", "render", "send", "write_script"]
