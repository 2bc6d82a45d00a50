"""The text of a proposed recipe, and the commands that follow it."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from mirai_ds.config import RunConfig, build
from mirai_ds.config.schedule import total_steps
from mirai_ds.config.yaml_text import parse
from mirai_ds.proposal.choices import View, Width, held_out_fraction, training_images
from mirai_ds.proposal.folder import FolderFacts
from mirai_ds.runtime.published_files import PUBLISHED

INCEPTION = PUBLISHED["inception"].name
DRAWN = 1000  # samples of the printed command, at least two of each class
MEASUREMENTS = 10  # of the held-out loss, in the whole run


@dataclass(frozen=True)
class Proposal:
    """All that the recipe says.  tokenizer: the user's file, or the codebook that was learned here.  epochs: length.
    micro: sequences a rank runs at once; None where nobody has asked the planner yet."""

    name: str
    facts: FolderFacts
    view: View
    tokenizer: Path
    vocabulary: int
    width: Width
    batch: int
    gpu: bool
    epochs: float
    micro: int | None = None

    @property
    def store(self) -> str:
        """Where the tokens go."""
        return f"stores/{self.name}"

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of the training images."""
        return max(1, training_images(self.facts) // self.batch)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return total_steps(self.config().train, self.steps_per_epoch)

    def config(self) -> RunConfig:
        """What the text says, validated."""
        return build(parse(self.text(), self.name), self.name)

    def commands(self) -> list[tuple[str, str]]:
        """(what it does, command) in order."""
        v, quoted = self.view, shlex.quote
        upright = " --upright" if self.facts.turned else ""
        extract = (
            f"mirai-ds extract codes --images {quoted(str(self.facts.path))} --tokenizer {quoted(str(self.tokenizer))} "
            f"--size {v.side} --crops {v.crops}{upright} --out {self.store}"
        )
        classes = len(self.facts.classes)
        count = max(2, DRAWN // classes) * classes
        run, samples = f"runs/{self.name}", f"samples/{self.name}.npz"
        # Of a codebook the store shows the images as the tokens can; a VQ network's store holds no network.
        reference = quoted(str(self.facts.path)) if self.needs_network else self.store
        return [
            ("tokens", extract),
            ("train", f"mirai-ds train {self.name}.yaml"),
            ("sample", f"mirai-ds sample {run} --num {count} --policy balanced --out {samples}"),
            ("evaluate", f"mirai-ds evaluate {samples} {reference} --weights {INCEPTION}"),
        ]

    @property
    def needs_network(self) -> bool:
        """Whether only the user's tokenizer shows tokens: a patch codebook lies in the store itself."""
        return self.tokenizer.suffix != ".npz"

    @property
    def rate(self) -> float:
        """The width's learning rate, less for small batches; LlamaGen's own for its sizes."""
        small = min(1.0, math.sqrt(self.batch / 32))
        return self.width.lr if self.width.dim >= 768 else float(f"{self.width.lr * small:.2g}")

    def text(self) -> str:
        """The recipe as YAML; `recipe.yaml.j2` is its template."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        steps = max(1, round(self.epochs * self.steps_per_epoch))
        head = [
            f"Mirai-E on {self.facts.path}: {self.facts.sentence()}.", "Written by `mirai-ds new`; edit what you like.",
            *(f"{what + ':':10} {command}" for what, command in self.commands()[:3]),
        ]  # fmt: skip
        environment = Environment(
            loader=PackageLoader("mirai_ds.proposal", ""), undefined=StrictUndefined, trim_blocks=True,
            keep_trailing_newline=True,
        )  # fmt: skip
        text = environment.get_template("recipe.yaml.j2").render(
            p=self, v=self.view, w=self.width, steps=steps, every=max(1, steps // MEASUREMENTS),
            held_out=held_out_fraction(self.facts), decay=round(min(0.9999, max(0.9, 1 - 20 / steps)), 5),
            head=[" ".join(line.splitlines()) for line in head],  # a folder's name may hold a line break
        )  # fmt: skip
        return _aligned(text)


def _aligned(text: str) -> str:
    """Comments, which a tab parts from their value, begin in one column."""
    lines = [line.partition("\t") for line in text.splitlines()]
    return "".join((f"{value:25} {comment}" if comment else value) + "\n" for value, _, comment in lines)
