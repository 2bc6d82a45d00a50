"""TensorBoard's event files: grouped scalars with what they mean, images, text, and the charts to look at first."""

from __future__ import annotations

from typing import Any

from mirai_ds.tracking.tags import CHARTS, meaning
from mirai_ds.tracking.tracker import Picture, TrackedRun, Tracker


class TensorBoard(Tracker):
    """`RUN/tensorboard`.  A resume hides the events after its step, so curves do not zig-zag."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # 0 in a run that begins anew: a start before it may have died before its first checkpoint.
        purge = run.step + 1 if run.step else 0
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge, flush_secs=10)
        self._described: set[str] = set()
        charts = {
            category: {title: ["Multiline", patterns] for title, patterns in titles.items()}
            for category, titles in CHARTS.items()
        }
        self._writer.add_custom_scalars(charts)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """See `Tracker.scalars`."""
        for name, value in values.items():
            if name not in self._described:
                self._describe(name, step)
            self._writer.add_scalar(name, value, step)

    def _describe(self, name: str, step: int) -> None:
        """TensorBoard takes a tag's description from its first event; its fast loader not from one with a number."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.scalar.metadata import create_summary_metadata

        self._described.add(name)
        if text := meaning(name):
            about = Summary.Value(tag=name, metadata=create_summary_metadata("", text))
            events: Any = self._writer.file_writer
            events.add_summary(Summary(value=[about]), step)

    def image(self, name: str, image: Picture, step: int) -> None:
        """See `Tracker.image`."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def text(self, name: str, text: str, step: int) -> None:
        """See `Tracker.text`."""
        self._writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
