"""Behaviours around the loop, one a file, and the order in which they run."""

from mirai_ds.hooks.checkpoint import CheckpointHook
from mirai_ds.hooks.evaluate import EvaluateHook
from mirai_ds.hooks.log import LogHook, Sinks
from mirai_ds.hooks.report import ReportHook
from mirai_ds.hooks.sample import SampleHook
from mirai_ds.train.loop import Hook

__all__ = ["CheckpointHook", "EvaluateHook", "LogHook", "ReportHook", "SampleHook", "Sinks", "default_hooks"]


def default_hooks(sinks: Sinks) -> list[Hook]:
    """Log first (it opens the sinks), save last of the measuring ones, report at the very end."""
    return [LogHook(sinks), EvaluateHook(sinks), SampleHook(sinks), CheckpointHook(), ReportHook(sinks)]
