"""Where metrics go: TensorBoard and `metrics.jsonl`; a resume takes back what came after the resumed step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np


class JsonLines:
    """One JSON object a line, flushed as written."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        if path.exists():
            self._keep_until(resume_step)
        self._file = path.open("a", encoding="utf-8")

    def _keep_until(self, step: int) -> None:
        """Drop lines of later steps and a torn last line, so that a resumed run continues one clean sequence."""
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue
        new = self.path.with_suffix(".new")
        new.write_text("".join(kept), encoding="utf-8")
        os.replace(new, self.path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it must hold `step`."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Grouped scalars, images and text.  `purge_step` hides events after a resumed step, so curves do not zig-zag."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write named scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, image: np.ndarray[Any, Any], step: int) -> None:
        """Write a uint8 (H, W, 3) image."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Write preformatted text."""
        self._writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
