"""The text of a proposed recipe, and the commands that follow it."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from mirai_ds.config import RunConfig, build
from mirai_ds.config.schedule import total_steps
from mirai_ds.config.yaml_text import parse
from mirai_ds.proposal.choices import View, Width, held_out_fraction, training_images
from mirai_ds.proposal.folder import FolderFacts

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
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
        shown = (
            ""
            if v.codes is not None or self.tokenizer.suffix == ".npz"
            else " --tokenizer " + quoted(str(self.tokenizer))
        )
        # Of a codebook the store shows the images as the tokens can; a VQ network's store holds no network.
        reference = self.store if not shown else quoted(str(self.facts.path))
        return [
            ("tokens", extract),
            ("train", f"mirai-ds train {self.name}.yaml"),
            ("sample", f"mirai-ds sample {run} --num {count} --policy balanced{shown} --out {samples}"),
            ("evaluate", f"mirai-ds evaluate {samples} {reference} --weights {INCEPTION}"),
        ]

    def text(self) -> str:
        """The recipe as YAML."""
        facts, v, w = self.facts, self.view, self.width
        head = [
            f"Mirai-E on {facts.path}: {facts.sentence()}.",
            "Written by `mirai-ds new`; every value may be edited.",
            "",
        ]
        head += [f"{what + ':':10} {command}" for what, command in self.commands()[:3]]
        head = [" ".join(line.splitlines()) for line in head]  # a folder's name may hold a line break
        comment = "\n".join(f"# {line}".rstrip() for line in head)
        every = max(1, round(self.epochs * self.steps_per_epoch / MEASUREMENTS))
        steps = max(1, round(self.epochs * self.steps_per_epoch))
        held_out, guided = held_out_fraction(facts), len(facts.classes) > 1
        decay = min(0.9999, max(0.9, 1 - 20 / steps))
        own = self.tokenizer.suffix != ".npz"
        shown = (
            f"\n  tokenizer: {json.dumps(str(self.tokenizer), ensure_ascii=False)}\t# shows tokens as pictures"
            if own
            else ""
        )
        micro = (
            f"\n  micro_batch_size: {self.micro}\t# sequences a rank runs at once: the largest that fits"
            if self.micro
            else ""
        )
        lr = float(f"{w.lr * min(1.0, math.sqrt(self.batch / 32)):.2g}") if w.dim < 768 else w.lr
        return _aligned(f"""{comment}
name: {self.name}\t# the run's folder is runs/{self.name}
seed: 0
model:
  size: custom
  dim: {w.dim}\t# about {w.parameters / 1e6:.3g} million parameters in the blocks
  n_layer: {w.n_layer}
  n_head: {w.n_head}
  vocab_size: {self.vocabulary}\t# codes of the tokenizer
  num_classes: {len(facts.classes)}
  block_size: {v.grid**2}\t# {v.grid} x {v.grid} tokens of {v.patch} x {v.patch} pixels
  init_std: {w.init_std}
data:
  source: store
  path: {self.store}
  held_out_fraction: {held_out}\t# of the images: their loss says when training only learns by heart{shown}
foresight:
  method: mirai-e\t# none: next-token prediction only
  convention: official
  num_heads: 3\t# the current token, the one to the right, the one below
  projector_dim: {min(2048, 2 * w.dim)}
  warmup_epochs: {round(0.05 * self.epochs, 4)}\t# 5 % of the run, as the paper's 15 of 300
optimizer:
  lr: {lr}
  schedule: cosine
  warmup_steps: {min(100, max(1, steps // 20))}
train:
  epochs: {self.epochs:g}\t# {steps} steps of {self.batch} images, {self.steps_per_epoch} an epoch
  global_batch_size: {self.batch}{micro}
  precision: {"bf16-autocast" if self.gpu else "fp32"}
ema:
  decay: {decay:.4g}\t# averages over about a twentieth of the run
checkpoint:
  every_steps: {every}
  keep_last: 1
  keep_best: {1 if held_out else 0}\t# by best_metric, held_out/ntp_ema; eval.fid judges by drawn images instead
logging:
  every_steps: {max(1, min(50, steps // 50))}
eval:
  loss:
    every_steps: {every if held_out else "null"}
sampling:
  cfg_scale: {1.5 if guided else 1.0}\t# guidance; 1 is none
  per_class: 8
  every_steps: {2 * every}\t# a sheet of pictures in runs/{self.name}/samples
  at_end: true
deepspeed: {"zero2" if self.gpu else "zero0"}
""")


def _aligned(text: str) -> str:
    """Comments, which a tab parts from their value, begin in one column."""
    lines = [line.partition("\t") for line in text.splitlines()]
    return "".join(f"{value:26}{comment}".rstrip() + "\n" for value, _, comment in lines)
