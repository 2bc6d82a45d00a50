"""User mistakes as one clear line: the field, the value, the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Location = tuple[Any, ...]


class UserError(Exception):
    """A mistake the user can mend; shown as one line without a traceback, exit code 2."""


class LocalError(UserError):
    """One that perhaps only this rank meets (a file it reads): whichever rank raises it tells the user."""


class ConfigError(UserError, ValueError):
    """A wrong configuration value: names the field, the value and the fix."""

    def __init__(self, field: str, value: object, problem: str) -> None:
        self.field, self.value, self.problem = field, value, problem
        super().__init__(f"{field} = {shown(value)}: {problem}")


def shown(value: object, limit: int = 60) -> str:
    """`value` as the user wrote it, short enough for one line."""
    text = "null" if value is None else str(value) if isinstance(value, (int, float)) else repr(value)
    text = {"True": "true", "False": "false"}.get(text, text)
    if len(text) <= limit:
        return text
    keep = (limit - 3) // 2  # both ends: a long path keeps its file name
    return f"{text[:keep]}...{text[-keep:]}"


def nearest(name: str, candidates: Iterable[str], renamed: Mapping[str, str] | None = None) -> str:
    """A hint with the closest candidate, blind to case and to - or _; without one, the list of what is allowed.

    renamed: old names and what they are called today; what is close to the old one is taken for it.
    """
    names, renamed = sorted(candidates), renamed or {}
    close = _closest(name, [*names, *renamed])
    return f"did you mean {renamed.get(close, close)!r}?" if close else f"use one of: {', '.join(names)}"


def _closest(name: str, names: list[str]) -> str | None:
    folded = {other.lower().replace("-", "_"): other for other in names}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


# What sections and hooks were called in an earlier version; see `old_names`.
OLD_SECTIONS = {"evaluate": "eval.loss", "quality": "eval.fid", "score": "eval.classifier"}
OLD_HOOKS = {"evaluate": "eval-loss", "quality": "eval-fid"}

# What the paper, LlamaGen, the Mirai authors and DeepSpeed call our fields.
OTHER_NAMES = {
    "lambda": "foresight.weights",
    "lambdas": "foresight.weights",
    "lambda_": "foresight.weights",
    "proj_coeff": "foresight.weights",
    "k": "foresight.num_heads",
    "neighbours": "foresight.offsets",
    "neighbors": "foresight.offsets",
    "tau": "ema.decay",
    "l": "foresight.layer",
    "warmup": "foresight.warmup_epochs",
    "batch_size": "train.global_batch_size",
    "learning_rate": "optimizer.lr",
    "max_grad_norm": "optimizer.grad_clip",
    "gradient_clipping": "optimizer.grad_clip",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "mixed_precision": "train.precision",
    "gpt_model": "model.size",
    "drop_path_rate": "model.drop_path",
    "code_path": "data.path",
    "aug_feature_dir": "data.more_views",
    "vq_ckpt": "data.tokenizer",
    "num_workers": "data.workers",
    "encoder_depth": "foresight.layer",
    "enc_type": "foresight.encoder.name",
    "ema_decay": "ema.decay",
}


def from_validation(error: ValidationError, model: type[BaseModel], where: str = "") -> UserError:
    """pydantic's report as one line an error, each with field, value and fix."""
    lines = [_explain(item, model) for item in error.errors(include_url=False)]
    prefix = f"{where}: " if where else ""
    return UserError("\n".join(dict.fromkeys(prefix + line for line in lines)))


def _explain(error: Any, model: type[BaseModel]) -> str:
    location, kind, value = tuple(error["loc"]), error["type"], error.get("input")
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{_dotted(location)}: unknown key; {_suggest(location, model)}"
    if kind == "invalid_key":
        return f"{_dotted(location[:-1])}: the key {shown(value)} must be a name; quote it if it is one"
    if kind == "value_error" and isinstance(context.get("error"), ConfigError):
        return str(context["error"])
    if kind == "missing" and isinstance(location[-1], str):
        return f"{_dotted(location)}: is missing; give it a value"
    if kind in ("missing", "too_long", "too_short"):  # of a list of fixed length
        location = location[:-1] if kind == "missing" else location
        field = _field(location, model)
        length = len(field.default) if field else "other"
        return f"{_dotted(location)} = {shown(value)}: must have {length} values, e.g. {_example(location, model)}"
    return f"{_dotted(location)} = {shown(value)}: {_problem(kind, value, context, location, model, error['msg'])}"


_BOUNDS = {
    "greater_than": ("gt", "must be greater than"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be less than"),
    "less_than_equal": ("le", "must be at most"),
}
_WANTED = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "finite_number": "must be a finite number",
}


def _problem(kind: str, value: object, context: Any, location: Location, model: type[BaseModel], message: str) -> str:
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = context[key]
        return f"{words} {int(bound) if bound == int(bound) else bound}"
    if kind == "literal_error":
        return nearest(str(value), re.findall(r"'([^']*)'", context["expected"]))
    if kind == "string_pattern_mismatch":
        good = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-._") or "run"
        return f"may hold letters, digits, '.', '_' and '-' and starts with a letter or digit; use e.g. {good!r}"
    if kind == "model_type":
        names = ", ".join(_section_fields(location, model)[:3])
        begin = "the section is empty; remove it or give it" if value is None else "must be a section with"
        return f"{begin} fields such as {names}"
    if kind in _WANTED:
        return _WANTED[kind] + _type_fix(kind, value, location, model)
    return re.sub(r"^(Input|Value|String|List|Tuple|Dictionary) should ", "must ", message)


def _type_fix(kind: str, value: object, location: Location, model: type[BaseModel]) -> str:
    """What to write instead of a value of the wrong type."""
    example = _example(location, model)
    if value is None:
        return f"; leave the key out for the default, {example}" if example else "; give it a value"
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return f"; put it in quotes: '{shown(value)}'"
    if isinstance(value, str) and kind in ("int_type", "float_type"):
        bare = re.sub(r"[\s,_']", "", value)
        if re.fullmatch(r"[-+]?\d+(\.\d+)?", bare):
            return f"; write {bare}"
    if kind == "bool_type" and str(value).lower() in ("yes", "on", "1", "true", "no", "off", "0", "false"):
        return f"; write {'true' if str(value).lower() in ('yes', 'on', '1', 'true') else 'false'}"
    negated = ", not a section" if isinstance(value, dict) else ", not a list" if isinstance(value, (list, set)) else ""
    return f"{negated}, e.g. {example}" if example else negated


def _dotted(location: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field's annotation names, None for a plain value."""
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _field(location: Location, model: type[BaseModel]) -> FieldInfo | None:
    """The field that `location` (list positions left out) leads to."""
    current: type[BaseModel] | None = model
    field: FieldInfo | None = None
    for part in location:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if current else None
        current = section_of(field.annotation) if field else None
    return field


def _section_fields(location: Location, model: type[BaseModel]) -> list[str]:
    """Names of the fields of the section at `location`."""
    field = _field(location, model)
    section = model if not location else section_of(field.annotation) if field else None
    return list(section.model_fields) if section else []


def _example(location: Location, model: type[BaseModel]) -> str:
    """The default as the user would write it, or nothing where it would not help."""
    field = _field(location, model)
    default = field.default if field else None
    if default is None or not isinstance(default, (bool, int, float, str, list, tuple)):
        return ""
    if location and isinstance(location[-1], int):
        return ""
    return shown(list(default)) if isinstance(default, tuple) else shown(default)


def _leaves(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Dotted names of all fields below `model`."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        yield f"{path}{name}"
        if section:
            yield from _leaves(section, f"{path}{name}.")


def _suggest(location: Location, model: type[BaseModel]) -> str:
    """For an unknown key: another trainer's name for a field, a neighbour's name, or the same name elsewhere."""
    name = str(location[-1])
    folded = name.lower().replace("-", "_")
    siblings = _section_fields(location[:-1], model)
    renamed = {}
    if len(location) == 1:
        siblings, renamed = [*siblings, "base"], OLD_SECTIONS
    others = OTHER_NAMES | OLD_SECTIONS
    if folded in others:
        return f"did you mean {others[folded]!r}?"
    if not _closest(name, [*siblings, *renamed]):
        elsewhere = [path for path in _leaves(model) if path.rsplit(".", 1)[-1] == folded]
        if elsewhere:
            return f"did you mean {' or '.join(map(repr, elsewhere))}?"
    return nearest(name, siblings, renamed)
