"""The one walk over folders of images: ImageFolder's order, without what systems put there; it tells what it left out.

A plain walk takes a notebook's checkpoints for a class and a NAS's thumbnails for photographs, and goes round in links.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mirai_ds.config import UserError
from mirai_ds.runtime.log import LOG

# torchvision.datasets.folder.IMG_EXTENSIONS
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Beside what begins with a dot: thumbnails, bins and caches of NAS systems, Windows, macOS, file systems and Python.
SYSTEM = {
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@sharesnap", "#recycle", "#snapshot", "$recycle.bin",
    "system volume information", "thumbs.db", "desktop.ini", "__macosx", "__pycache__", "lost+found",
}  # fmt: skip
SPLITS = {"train", "training", "trainval", "val", "valid", "validation", "test", "testing", "dev", "eval", "holdout"}
SHOWN = 5


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is a system's own, never its user's image or class."""
    return name.startswith(".") or name.lower() in SYSTEM


@dataclass
class Walk:
    """What was found below `root`, by paths relative to it.

    skipped: hidden and system names.  endings: how many files of each other ending.  again: folders that links bring
    in a second time.  loose: images beside class folders.
    """

    root: Path
    skipped: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    again: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    _seen: dict[str, str] = field(default_factory=dict)

    def classes(self) -> list[str]:
        """The folders directly below the root, sorted; hidden ones, and images beside them, are noted and left out.
        Raises UserError."""
        with _readable(self.root):
            entries = sorted((entry.name, entry.is_dir()) for entry in os.scandir(self.root))
        found = [name for name, is_folder in entries if is_folder]
        self.skipped += [name for name in found if is_hidden(name)]
        files = [name for name, is_folder in entries if not is_folder and not is_hidden(name)]
        self.loose += [name for name in files if name.lower().endswith(EXTENSIONS)]
        return [name for name in found if not is_hidden(name)]

    def images(self, inside: str = "") -> list[str]:
        """Image files below the folder `inside`: folders by their path, files sorted in each; links are followed.

        Raises UserError for a link to a folder that holds it, and for folders that cannot be read.
        """
        root, by_folder = os.path.realpath(self.root), dict[str, list[str]]()
        above = [str(path) for path in Path(root).parents] + ([root] if inside else [])
        with _readable(self.root / inside):
            self._collect(inside, above, by_folder)
        return [os.path.join(folder, name) for folder in sorted(by_folder) for name in by_folder[folder]]

    def _collect(self, inside: str, above: list[str], by_folder: dict[str, list[str]]) -> None:
        here, real = self.root / inside, os.path.realpath(self.root / inside)
        if real in above:
            raise UserError(
                f"{here}: leads back to {real}, which holds it: its images would come again and again; remove the link"
            )
        if real in self._seen:
            self.again.append(f"{inside} is {self._seen[real]}")
        self._seen.setdefault(real, inside)
        folders, names = [], []
        with os.scandir(here) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    self.skipped.append(os.path.join(inside, entry.name))
                elif entry.is_dir():
                    folders.append(os.path.join(inside, entry.name))
                elif entry.name.lower().endswith(EXTENSIONS):
                    names.append(entry.name)
                else:
                    self.endings[os.path.splitext(entry.name)[1].lower() or entry.name] += 1
        by_folder[inside] = sorted(names)
        for folder in sorted(folders):
            self._collect(folder, [*above, real], by_folder)

    def tell(self) -> None:
        """Logs what was left out and what comes twice."""
        for note in self.notes():
            LOG.warning("%s: %s", self.root, note)

    def notes(self) -> list[str]:
        """A line for each kind of thing of note."""
        notes = []
        if self.skipped:
            notes.append(f"left out {len(self.skipped)} hidden or system names: {_some(self.skipped)}")
        if self.endings:
            counts = [f"{count} {ending}" for ending, count in self.endings.most_common()]
            total = self.endings.total()
            notes.append(f"left out {total} files with endings that ImageFolder does not read: {_some(counts)}")
        if self.loose:
            notes.append(f"left out {len(self.loose)} images that lie beside the class folders: {_some(self.loose)}")
        if self.again:
            notes.append(f"links bring in {len(self.again)} folders once more: {_some(self.again)}")
        return notes


def splits_among(images: dict[str, list[str]]) -> list[str]:
    """The folders of a root that are splits and no classes.  images: of each folder, their paths relative to the root.

    A class may be called `train`: beside it lie other classes, or no folders within it.
    """
    splits = [name for name in images if name.lower() in SPLITS]
    nested = all(path.count(os.sep) > 1 for name in splits for path in images[name])
    if len(splits) == len(images):
        return splits if nested or len(splits) > 1 else []
    return splits if nested and len(splits) > 1 else []


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from None


def _some(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (", ..." if len(items) > SHOWN else "")
