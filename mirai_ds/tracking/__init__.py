"""Where a run's values and pictures are written: metrics.jsonl, and the trackers that a run names."""

from mirai_ds.tracking.tracker import TrackedRun, Tracker

__all__ = ["TrackedRun", "Tracker"]
