"""Behaviours around the loop, one a file, and the order in which they run."""

from mirai_ds.train.hooks.checkpoint import CheckpointHook
from mirai_ds.train.hooks.evaluate import EvaluateHook
from mirai_ds.train.hooks.log import LogHook, Sinks
from mirai_ds.train.hooks.quality import QualityHook
from mirai_ds.train.hooks.report import ReportHook
from mirai_ds.train.hooks.sample import SampleHook
from mirai_ds.train.hooks.spike import SpikeHook
from mirai_ds.train.hooks.stop import StopHook
from mirai_ds.train.loop import Hook

__all__ = [
    "CheckpointHook",
    "EvaluateHook",
    "LogHook",
    "QualityHook",
    "ReportHook",
    "SampleHook",
    "Sinks",
    "SpikeHook",
    "StopHook",
    "default_hooks",
]


def default_hooks(sinks: Sinks) -> list[Hook]:
    """Log first (it opens the sinks); a spike is judged before its state is measured or saved; save last of the
    measuring ones, report at the very end."""
    return [
        LogHook(sinks), SpikeHook(sinks), EvaluateHook(sinks), SampleHook(sinks), QualityHook(sinks),
        CheckpointHook(sinks), StopHook(), ReportHook(sinks),
    ]  # fmt: skip
