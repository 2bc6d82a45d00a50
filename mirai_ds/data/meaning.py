"""What the numbers of a data set stand for; compared wherever two of them are joined.

Labels and codes are plain integers: those of other classes or of another tokenizer look alike and train alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from mirai_ds.data.crops import ViewGeometry


@dataclass(frozen=True)
class Meaning:
    """None: not known, as of files that other programs wrote.

    classes: names in label order.  tokenizer: name and digest.  geometry: how views were cut.  upright: whether
    photographs were turned by their orientation tag.
    """

    classes: Sequence[str] | None = None
    tokenizer: tuple[str, str] | None = None
    geometry: ViewGeometry | None = None
    upright: bool = False

    def conflict(self, other: Meaning, name: str, fewer: bool = False) -> str | None:
        """Why `other`'s numbers do not mean what these do, a clause about it; None where they do as far as is known.

        name: what these are called.  fewer: whether the other may end before the last class.
        """
        if self.classes is not None and other.classes is not None:
            for label, (ours, theirs) in enumerate(zip_longest(self.classes, other.classes)):
                if ours != theirs and not (fewer and theirs is None):
                    mine = f"{name} has no such label" if ours is None else f"in {name} {ours!r}"
                    return f"its label {label} is {'no class' if theirs is None else f'class {theirs!r}'}, {mine}"
        if self.tokenizer is not None and other.tokenizer is not None and self.tokenizer[1] != other.tokenizer[1]:
            (ours, ours_digest), (theirs, theirs_digest) = self.tokenizer, other.tokenizer
            return f"was made with {theirs} {theirs_digest[:12]}, {name} with {ours} {ours_digest[:12]}"
        if self.geometry is not None and other.geometry is not None:
            sizes = other.geometry.image_size, self.geometry.image_size
            if sizes[0] != sizes[1]:
                return f"is of {sizes[0]} pixels a side, {name} of {sizes[1]}"
        return None

    def unknown(self, other: Meaning) -> list[str]:
        """What could not be compared."""
        facts = {"classes": (self.classes, other.classes), "tokenizers": (self.tokenizer, other.tokenizer)}
        return [what for what, pair in facts.items() if None in pair]

    def cuts_differ(self, other: Meaning) -> str | None:
        """How the other's cut-outs differ from these where both are ten crops or one was turned upright, a clause."""
        if self.geometry is None or other.geometry is None:
            return None
        ranges = other.geometry.crop_range, self.geometry.crop_range
        if self.geometry.crops == other.geometry.crops and ranges[0] != ranges[1]:
            return f"its views are cut from {ranges[0]:g} times their size, those from {ranges[1]:g} times"
        if self.upright != other.upright:
            turned, not_turned = ("its", "those") if other.upright else ("those", "its")
            return f"{turned} photographs were turned by their orientation tag, {not_turned} were not"
        return None


def class_names(meaning: Meaning | None, labels: Iterable[int]) -> list[str]:
    """A name for each label: its class's where that is known, else its number."""
    known = [] if meaning is None or meaning.classes is None else meaning.classes
    return [known[label] if label < len(known) else str(label) for label in map(int, labels)]
