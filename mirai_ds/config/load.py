"""Recipes: YAML files, `base:` inheritance, dotted overrides, and the resolved form that is stored with a run.

`NAME@text` is recipe NAME in the paper's convention as the text writes it (Eq. 10-11): the mean over K heads, with the
recipe's lambda.  `NAME@paper` is the same at the total weight of the sum: each lambda is taken K times.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from mirai_ds.config import deepspeed_file
from mirai_ds.config.errors import OLD_SECTIONS, ConfigError, UserError, from_validation, nearest
from mirai_ds.config.old_names import current_names, mention_old_names
from mirai_ds.config.run_config import RunConfig
from mirai_ds.config.yaml_text import parse

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_KINDS = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


TWIN, TEXT = "@paper", "@text"
TWINS = (TWIN, TEXT)
_LISTED = "`mirai-ds recipes list` names those that ship, e.g. digits-baseline"


@cache
def _shipped() -> dict[str, Traversable]:
    """Name -> file of every shipped recipe; folders only group them."""
    folder = resources.files("mirai_ds.config") / "recipes"
    groups = [folder, *(item for item in folder.iterdir() if item.is_dir())]
    files = [item for group in groups for item in group.iterdir() if item.name.endswith(".yaml")]
    return {_stem(item): item for item in sorted(files, key=_stem)}


def _stem(item: Traversable) -> str:
    return item.name.removesuffix(".yaml")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return list(_shipped())


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe, header comment included."""
    if name not in _shipped():
        hint = nearest(name, recipe_names())
        raise UserError(f"recipe {name!r}: no such recipe; {hint if hint.startswith('did you') else _LISTED}")
    return _shipped()[name].read_text(encoding="utf-8")


@cache
def _shipped_mapping(name: str) -> dict[str, Any]:
    """A shipped recipe as written; not to be changed."""
    return _parse(recipe_text(name), name)


def _parse(text: str, where: str) -> dict[str, Any]:
    data = parse(text, where)
    if data is None:
        return {}
    if not isinstance(data, dict):
        kind = _KINDS.get(type(data), type(data).__name__)
        raise UserError(f"{where}: a recipe is a mapping, not {kind}; write `section:` and its fields below")
    bad = [key for key in data if not isinstance(key, str)]
    if bad:
        raise UserError(f"{where}: keys must be names, not {bad[0]!r}; quote it if it is one")
    return data


def _read_source(source: str, beside: Path | None) -> tuple[str, str, Path | None]:
    """(text, label, folder) of a recipe name or a file; a `base:` file is looked for beside its recipe first."""
    if not source.endswith((".yaml", ".yml")):
        if Path(source).is_file():
            raise UserError(f"{source}: a recipe file must end in .yaml; rename it")
        if "/" not in source:
            return recipe_text(source), source, None
    candidates = [*([beside / source] if beside else []), Path(source)]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise UserError(f"{source}: no such recipe file; give a .yaml file; {_LISTED}")
    try:
        return path.read_text(encoding="utf-8"), str(path), path.parent
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read: {error}; a recipe is UTF-8 text") from None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section; lists and scalars replace."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def read_recipe(source: str, beside: Path | None = None, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The raw mapping of a recipe with its `base:` recipes merged below it."""
    for suffix in TWINS:
        if source.endswith(suffix):
            return _twin(source.removesuffix(suffix), suffix, beside, seen)
    try:
        text, label, folder = _read_source(source, beside)
    except UserError as error:
        if not seen:
            raise
        raise UserError(f"{seen[-1]}: base = {source!r}: {error}") from None
    identity = label if folder is None else str(Path(label).resolve())
    if identity in seen:
        raise UserError(f"{label}: base: goes round in a circle ({' -> '.join([*seen, identity])}); remove one `base:`")
    data = _parse(text, label) if folder is not None else deepcopy(_shipped_mapping(label))
    data.pop("paper", None)  # in copies of an earlier version's recipes: where a recipe stood in the paper, no setting
    mention_old_names(data)
    data = current_names(data, label)  # before the merge: a base and what builds on it may have names of two versions
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise UserError(f"{label}: {ConfigError('base', base, 'must be the name or file of one recipe')}")
    return merge(read_recipe(base, folder, (*seen, identity)), data)


def _twin(source: str, suffix: str, beside: Path | None, seen: tuple[str, ...]) -> dict[str, Any]:
    """Recipe `source` in the paper's convention: of `@paper` with the total weight that it has in its own."""
    data = read_recipe(source, beside, seen)
    ours = build(data, source)
    if ours.foresight.method == "none" or ours.foresight.convention == "paper":
        reason = "foresight.method is none" if ours.foresight.method == "none" else "it is in the paper's convention"
        raise UserError(f"{source}{suffix}: there is no such twin, because {reason}; use {source}")
    data = merge(data, {"name": f"{ours.name}-{suffix[1:]}", "foresight": {"convention": "paper"}})
    theirs = build(data, source + suffix)
    if suffix == TWIN and (ours.foresight.heads_reduction, theirs.foresight.heads_reduction) == ("sum", "mean"):
        weights = [weight * ours.foresight.heads for weight in ours.foresight.weights or []]
        data = merge(data, {"foresight": {"weights": weights}})
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Apply one `a.b.c=value` (the value is YAML) in place.  `deepspeed.x=...` changes a copy of the DeepSpeed file."""
    key, sign, raw = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise UserError(f"--set {override!r}: write it as section.field=value")
    if parts[0] == "base":
        raise UserError(f"--set {override!r}: base belongs into the recipe file; give that recipe's name instead")
    value = parse(raw, f"--set {override!r}")
    mention_old_names({parts[0]: value})
    parts = [*OLD_SECTIONS.get(parts[0], parts[0]).split("."), *parts[1:]]
    if parts[0] == "deepspeed" and len(parts) > 1 and isinstance(data.setdefault("deepspeed", _default_file()), str):
        data["deepspeed"] = deepspeed_file.read(data["deepspeed"])
    here = data
    for depth, part in enumerate(parts[:-1], start=1):
        inner = here.get(part)
        if inner is None:
            inner = here[part] = {}
        if not isinstance(inner, dict):
            error = ConfigError(".".join(parts[:depth]), inner, "is a value, not a section; set the whole value")
            raise UserError(f"--set {override!r}: {error}")
        here = inner
    here[parts[-1]] = value


def _default_file() -> str:
    default: str = RunConfig.model_fields["deepspeed"].default
    return default


def build(data: dict[str, Any], where: str = "") -> RunConfig:
    """Validate a mapping, of an earlier version too, into a `RunConfig`; raises `UserError` with one line an error."""
    try:
        return RunConfig.model_validate(current_names(data, where))
    except ValidationError as error:
        raise from_validation(error, RunConfig, where) from None


def load(source: str, overrides: tuple[str, ...] | list[str] = (), deepspeed: str | None = None) -> RunConfig:
    """A run from a recipe name or file, optionally another DeepSpeed file, and dotted overrides on top."""
    data = read_recipe(source)
    if deepspeed is not None:
        data["deepspeed"] = deepspeed
    for override in overrides:
        apply_override(data, override)
    return build(data, where=source)


def dump(config: RunConfig) -> str:
    """The resolved run as YAML: every field written out, loads back to the same run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
