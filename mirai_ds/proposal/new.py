"""`mirai-ds new`: look at a folder, choose, write the recipe (and a codebook), say why and what to do next."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mirai_ds.checkpoint.store import holds_a_run
from mirai_ds.config import RunConfig, UserError
from mirai_ds.data.image_sets import ImageSet
from mirai_ds.extract.codebook import codebook_of
from mirai_ds.proposal.choices import (
    FEWEST_EPOCHS,
    MOST_EPOCHS,
    WIDTHS,
    View,
    choose_batch,
    choose_view,
    choose_width,
    held_out_fraction,
)
from mirai_ds.proposal.folder import look
from mirai_ds.proposal.machine import Machine, largest_micro_batch, seconds_a_step, this_machine
from mirai_ds.proposal.recipe import INCEPTION, Proposal
from mirai_ds.runtime.disk import write_whole
from mirai_ds.tokenizer import PatchCodebook, open_tokenizer

SHARE_OF_TIME = 0.8  # of the budget for steps; measurements, samples and saves take the rest
Pace = Callable[[RunConfig, Machine], float]


def new_run(
    name: str, images: Path, tokenizer: Path | None, size: int | None, hours: float | None, steps: int | None,
    machine: Machine | None = None, pace: Pace = seconds_a_step,
) -> str:  # fmt: skip
    """Write NAME.yaml, and without a tokenizer NAME.codebook.npz, into the current folder; returns what to tell.

    hours: how long training may take on this machine, by `pace`; steps: how many there are; default one hour.
    Raises UserError, and then nothing has been written; nothing is ever overwritten.
    """
    recipe, book_file = Path(f"{name}.yaml"), Path(f"{name}.codebook.npz")
    _check_names(name, recipe, None if tokenizer else book_file)
    machine = machine or this_machine()
    facts, found = look(images)
    given = None if tokenizer is None else open_tokenizer(tokenizer)
    view = choose_view(facts, given, size, machine.gpu)
    book, told = (None, "") if given else _codebook(found, view)
    widest = choose_width(facts, view)
    made = Proposal(
        name, facts, view, tokenizer or book_file, (given or book).vocab_size, WIDTHS[widest],  # type: ignore[union-attr]
        choose_batch(facts, widest == len(WIDTHS) - 1, machine.ranks), machine.gpu, float(MOST_EPOCHS),
    )  # fmt: skip
    made, budget = _fit(made, widest, machine, hours, steps, pace)
    config = made.config()
    if book is not None:
        book.save(book_file)
    try:
        write_whole(recipe, made.text())
    except OSError as error:
        if book is not None:
            book_file.unlink(missing_ok=True)  # it was written just now
        raise UserError(f"{recipe}: cannot be written ({error.strerror or error})") from None
    return "\n".join(_report(made, config, machine, told, budget))


def _check_names(name: str, recipe: Path, book: Path | None) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"{name!r}: is no name of a run; use letters, digits, `-`, `_` and `.`, e.g. my-run")
    for path in (recipe, *([book] if book else [])):
        if path.exists() or path.is_symlink():
            raise UserError(f"{path}: is there already, and is not overwritten; choose another name")
    if holds_a_run(Path("runs") / name):
        raise UserError(f"runs/{name}: already holds a run; choose another name")


def _codebook(images: ImageSet, view: View) -> tuple[PatchCodebook, str]:
    book, error, _ = codebook_of(images, view.side, view.patch, view.codes or 0, None)
    if book.vocab_size < 2:
        raise UserError(f"{images.root}: all its images are one plain colour; there is nothing to learn")
    return book, f"shows them {error.rms:.1f} grey levels rms off ({error.psnr:.1f} dB)"


def _fit(
    made: Proposal, widest: int, machine: Machine, hours: float | None, steps: int | None, pace: Pace
) -> tuple[Proposal, str]:  # fmt: skip
    """The proposal with the widest model that fits the memory and the budget, its micro batch and epochs; and how the
    length came about.  Raises UserError where no model fits."""
    for number in range(widest, -1, -1):
        one = replace(made, width=WIDTHS[number])
        micro = largest_micro_batch(one.config(), machine)
        if micro is None:
            continue
        one = replace(one, micro=micro)
        if steps is not None:
            return replace(one, epochs=_epochs(steps, one)), f"{steps} steps as asked"
        seconds, budget = pace(one.config(), machine), hours or 1.0
        possible = SHARE_OF_TIME * 3600 * budget / seconds
        epochs = possible / one.steps_per_epoch
        if epochs < FEWEST_EPOCHS and number:
            continue
        how = f"{seconds:.3g} s a step, measured here"
        if epochs > MOST_EPOCHS:
            minutes = MOST_EPOCHS * one.steps_per_epoch * seconds / 60
            return one, f"{how}: about {minutes:.0f} minutes for {MOST_EPOCHS} epochs, the most that is proposed"
        return replace(one, epochs=_epochs(max(1, int(possible)), one)), f"{how}; {budget:g} h in all"
    raise UserError(f"{machine.sentence()}: not one image fits beside the smallest model; free memory")


def _epochs(steps: int, made: Proposal) -> float:
    """So many epochs that the run has `steps` steps."""
    return round(steps / made.steps_per_epoch, 6)


def _report(made: Proposal, config: RunConfig, machine: Machine, told: str, budget: str) -> list[str]:
    v, w, facts, micro = made.view, made.width, made.facts, config.train.micro_batch_size
    crops = {
        "one": "the centre: grey images may be signs, which mirrored are others",
        "ten": "ten crops of each, mirrored too: --crops one where mirrored images are others",
        "flip": "the centre and its mirror: --crops one where mirrored images are others",
    }[v.crops]
    book = f"; a codebook of patches, which {told}" if told else ""
    held = round(100 * held_out_fraction(facts))
    few = "; few to learn from, hundreds are better" if facts.count < 100 else ""
    seen = facts.count * v.grid**2
    each = f" on each of {machine.ranks} ranks" if machine.ranks > 1 else ""
    lines = [
        f"{made.name}.yaml: written" + (f", with {made.tokenizer}" if told else ""),
        f"  images     {facts.sentence()}{few}",
        f"  views      {v.side}x{v.side} pixels (--size); {crops}",
        f"  tokens     {v.grid}x{v.grid} of {v.patch}x{v.patch} pixels, {made.vocabulary} codes{book}",
        f"  model      {w.n_layer} blocks of width {w.dim}: {w.parameters / 1e6:.3g} million parameters for {seen:,} "
        "tokens; wider ones want more of them, or more time",
        f"  batch      {made.batch}, {micro} at a time{each}, which fits by the planner ({machine.sentence()})",
        f"  length     {made.epochs:g} epochs, {made.steps} steps; {budget}",
        f"  held out   {held} % of the images, to see when training only learns by heart" if held
        else "  held out   nothing: too few images",
    ]  # fmt: skip
    if facts.turned:
        lines.append(f"  turned     {facts.turned} of {facts.looked_at} photographs, by their tag: --upright")
    return [*lines, "", "next:", *(f"  {command}" for _, command in made.commands()), "", _about_weights()]


def _about_weights() -> str:
    return f"  ({INCEPTION}: FID's network; docs/evaluation.md says where it is, --features takes another one)"
