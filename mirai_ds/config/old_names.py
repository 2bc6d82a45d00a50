"""Names of an earlier version, in recipes, overrides and stored runs: replaced by today's before the validation."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from mirai_ds.config.errors import OLD_HOOKS, OLD_SECTIONS, UserError

_LOG = logging.getLogger("mirai_ds")
OLD_SWITCH = "tensorboard"  # of the logging section
_SAID: set[str] = set()


def current_names(data: Any, where: str = "") -> Any:
    """A raw configuration with today's names; `data` is left alone, and what is no mapping is left to the validation.

    Raises UserError for an old name beside the new one: which of the two was meant cannot be known.
    """
    if not isinstance(data, dict):
        return data
    out = {key: value for key, value in data.items() if key not in OLD_SECTIONS}
    for old in _old_sections(data):
        section, _, name = OLD_SECTIONS[old].partition(".")
        others = out.get(section, {})
        if not isinstance(others, dict) or name in others:
            raise _both(f"`{old}` and `{OLD_SECTIONS[old] if isinstance(others, dict) else section}`", where)
        out[section] = {**others, name: data[old]}
    for old in _old_hooks(data):
        if OLD_HOOKS[old] in out["hooks"]:
            raise _both(f"hooks: `{old}` and `{OLD_HOOKS[old]}`", where)
        out["hooks"] = [OLD_HOOKS[old] if hook == old else hook for hook in out["hooks"]]
    _move_tensorboard(out, where)
    if _is_older_run(out.get("foresight")):
        out["foresight"] = {**out["foresight"], "heads_in_warmup": "sleep"}
    return out


def _move_tensorboard(out: dict[str, Any], where: str) -> None:
    """`logging.tensorboard: false` was what `tracking: []` is; true is the default."""
    logging = out.get("logging")
    if not isinstance(logging, dict) or not isinstance(logging.get(OLD_SWITCH), bool):
        return
    out["logging"] = {key: value for key, value in logging.items() if key != OLD_SWITCH}
    if "tracking" not in out:
        out["tracking"] = ["tensorboard"] if logging[OLD_SWITCH] else []
    elif ("tensorboard" in (out["tracking"] or [])) != logging[OLD_SWITCH]:
        raise _both("`logging.tensorboard` and `tracking`", where)


# Nobody gives all of these by hand: a section with them has been written by a run.
_ALWAYS_STORED = {"convention", "normalizer", "border", "schedule", "projector_dim", "kernel", "teacher_dtype"}


def _is_older_run(foresight: Any) -> bool:
    """Whether a run of before `foresight.heads_in_warmup` has stored this section: then its heads slept."""
    return isinstance(foresight, dict) and foresight.keys() >= _ALWAYS_STORED and "heads_in_warmup" not in foresight


def mention_old_names(data: dict[str, Any]) -> None:
    """Tell the user of the old names in a raw configuration, of each once a process."""
    for old in _old_sections(data):
        _say(f"config: `{old}` is now `{OLD_SECTIONS[old]}`; the old name still works")
    if isinstance(data.get("logging"), dict) and OLD_SWITCH in data["logging"]:
        _say("config: `logging.tensorboard` is now `tracking`; the old name still works")
    for old in _old_hooks(data):
        _say(f"config: hook `{old}` is now `{OLD_HOOKS[old]}`; the old name still works")


def _old_sections(data: dict[str, Any]) -> list[str]:
    return [old for old in OLD_SECTIONS if old in data]


def _old_hooks(data: dict[str, Any]) -> list[str]:
    hooks = data.get("hooks")
    return [old for old in OLD_HOOKS if old in hooks] if isinstance(hooks, list) else []


def _both(names: str, where: str) -> UserError:
    prefix = f"{where}: " if where else ""
    return UserError(f"{prefix}{names} are given, the old name and the new one; keep the new one")


def _say(text: str) -> None:
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    # Ranks that `mirai-ds train` started have a parent that read the same recipe and has said it.
    if text in _SAID or rank != "0" or "MIRAI_DS_PARENT" in os.environ:
        return
    _SAID.add(text)
    if _LOG.handlers:
        _LOG.info("%s", text)
    else:  # no training yet; standard output may be JSON
        print(f"mirai-ds: {text}", file=sys.stderr)
