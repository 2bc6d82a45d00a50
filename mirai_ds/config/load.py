"""Recipes: YAML files, `base:` inheritance, dotted overrides, and the resolved form that is stored with a run."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mirai_ds.config.errors import ConfigError, UserError, from_validation, nearest
from mirai_ds.config.run_config import RunConfig


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("mirai_ds.config") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe, header comment included."""
    if name not in recipe_names():
        raise UserError(f"recipe {name!r}: no such recipe; {nearest(name, recipe_names())}")
    return (resources.files("mirai_ds.config") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise UserError(f"{place}: not valid YAML: {problem}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{where}: a recipe is a mapping of sections, not a {type(data).__name__}")
    bad = [key for key in data if not isinstance(key, str)]
    if bad:
        raise UserError(f"{where}: keys must be names, not {bad[0]!r}")
    return data


def _read_source(source: str, beside: Path | None) -> tuple[str, str, Path | None]:
    """(text, label, folder) of a recipe name or a file; relative files are looked for beside the including one too."""
    is_file = source.endswith((".yaml", ".yml")) or "/" in source
    if not is_file:
        if Path(source).is_file():
            raise UserError(f"{source}: a recipe file must end in .yaml")
        return recipe_text(source), source, None
    candidates = [Path(source)] + ([beside / source] if beside else [])
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        known = ", ".join(recipe_names())
        raise UserError(f"{source}: no such recipe file; give a .yaml file or one of: {known}")
    try:
        return path.read_text(encoding="utf-8"), str(path), path.parent
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read: {error}") from None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section; lists and scalars replace."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def read_recipe(source: str, beside: Path | None = None, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The raw mapping of a recipe with its `base:` recipes merged below it."""
    text, label, folder = _read_source(source, beside)
    if label in seen:
        raise UserError(f"{label}: base: goes round in a circle ({' -> '.join([*seen, label])})")
    data = _parse(text, label)
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ConfigError("base", base, "must be the name or file of one recipe")
    return merge(read_recipe(base, folder, (*seen, label)), data)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Apply one `a.b.c=value` (the value is YAML) in place."""
    key, sign, raw = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise UserError(f"--set {override}: write it as section.field=value")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not valid YAML; quote it") from None
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a string; a user means a number.
        try:
            value = float(value)
        except ValueError:
            pass
    here = data
    for part in parts[:-1]:
        if not isinstance(here.get(part), dict):
            here[part] = {}
        here = here[part]
    here[parts[-1]] = value


def _fix_numbers(value: Any) -> Any:
    """1e-4 without a dot is a string in YAML 1.1; make numbers of such strings, everywhere but in free text."""
    if isinstance(value, dict):
        return {key: _fix_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_fix_numbers(item) for item in value]
    if isinstance(value, str) and value[:1].isdigit() and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def build(data: dict[str, Any], where: str = "") -> RunConfig:
    """Validate a mapping into a `RunConfig`; raises `UserError` with one line an error."""
    try:
        return RunConfig.model_validate(_fix_numbers(data))
    except ValidationError as error:
        raise from_validation(error, RunConfig, where) from None


def load(source: str, overrides: tuple[str, ...] | list[str] = (), deepspeed: str | None = None) -> RunConfig:
    """A run from a recipe name or file, dotted overrides and optionally another DeepSpeed file."""
    data = read_recipe(source)
    for override in overrides:
        apply_override(data, override)
    if deepspeed is not None:
        data["deepspeed"] = deepspeed
    return build(data, where=source)


def dump(config: RunConfig) -> str:
    """The resolved run as YAML: every field written out, loads back to the same run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
