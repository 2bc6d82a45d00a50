"""Which fields of a configuration may be other than the checkpoint's when a run is resumed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from mirai_ds.config import RunConfig, UserError
from mirai_ds.config.errors import nearest, shown
from mirai_ds.runs.records import flatten

Rule = Literal["free", "told", "kept"]

# A field's rule is that of the longest name here that it begins with.
#   free: changes no number of the training curve (or only its rounding)
#   told: changes what is learned from here on; allowed, and announced
#   kept: changes what the numbers before and after mean; refused without --allow-change
RULES: dict[str, Rule] = {
    "name": "free", "output_dir": "free", "launch": "free", "guard": "free", "logging": "free", "checkpoint": "free",
    "hooks": "free", "tracking": "free", "eval": "free", "sampling": "free",
    "seed": "kept", "model": "kept", "data": "kept", "foresight": "kept",
    # Files may have moved; that they hold the same is compared by digest.
    "data.path": "told", "data.more_views": "told", "data.held_out_path": "told", "data.images": "told",
    "data.tokenizer": "told",
    "data.workers": "free", "data.stage": "free", "data.prefetch": "free",
    "foresight.weights": "told", "foresight.schedule": "told", "foresight.warmup_epochs": "told",
    "foresight.ramp_epochs": "told", "foresight.head_warmup_epochs": "told",
    "foresight.heads_in_warmup": "told", "foresight.kernel": "free", "foresight.teacher_weights": "told",
    "foresight.encoder.weights": "told",
    "foresight.encoder.pretrained": "told", "foresight.encoder.dtype": "told", "foresight.encoder.compile": "free",
    "foresight.teacher_dtype": "told",
    "optimizer": "told", "ema": "told", "deepspeed": "told",
    "train": "told", "train.global_batch_size": "kept", "train.micro_batch_size": "free",
    "train.grad_accum_steps": "free", "train.recompute": "free", "train.compile": "free", "train.cuda_graph": "free",
    "train.cross_entropy": "free", "train.init_from": "free",
}  # fmt: skip


def rule_of(field: str) -> Rule:
    """The rule of a field by its dotted name."""
    words = field.split(".")
    return next(RULES[name] for n in range(len(words), 0, -1) if (name := ".".join(words[:n])) in RULES)


def is_allowed(field: str, allowed: Iterable[str]) -> bool:
    """Whether `--allow-change` names the field or a section around it."""
    return any(field == name or field.startswith(f"{name}.") for name in allowed)


def check_allowed(allowed: Iterable[str]) -> None:
    """Raises UserError for a word after `--allow-change` that is no field."""
    known = flatten(RunConfig().model_dump(mode="json"))
    names = {".".join(name.split(".")[:n]) for name in known for n in range(1, name.count(".") + 2)}
    for name in allowed:
        if name not in names:
            raise UserError(f"--allow-change {name}: no such field; {nearest(name, names)}")


def changed(then: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields that differ, in the configuration's order, with both values."""
    before, after = (flatten(config.model_dump(mode="json")) for config in (then, now))
    return {
        name: (before.get(name), after.get(name))
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    }


def check_changes(then: RunConfig, now: RunConfig, folder: str, allowed: Iterable[str]) -> list[str]:
    """What to announce about a resume of the checkpoint in `folder`, trained with `then`.  Raises UserError for a field
    that must stay and is not in `allowed`."""
    differ, allowed = changed(then, now), list(allowed)
    refused = [name for name in differ if rule_of(name) == "kept" and not is_allowed(name, allowed)]
    if refused:
        name, others = refused[0], ", ".join(refused[1:])
        before, after = differ[name]
        raise UserError(
            f"{name} = {shown(after)}: {folder} was trained with {shown(before)}, and a resumed run would be neither; "
            f"begin a new run, or say --allow-change {name}" + (f" (also other: {others})" if others else "")
        )
    return [
        f"{name}: {shown(before)} -> {shown(after)}"
        for name, (before, after) in differ.items()
        if rule_of(name) != "free"
    ]
