"""User mistakes as one clear line: the field, the value, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError


class UserError(Exception):
    """A mistake the user can mend; shown as one line without a traceback, exit code 2."""


class ConfigError(UserError, ValueError):
    """A wrong configuration value: names the field, the value and the fix."""

    def __init__(self, field: str, value: object, problem: str) -> None:
        self.field, self.value, self.problem = field, value, problem
        super().__init__(f"{field} = {shown(value)}: {problem}")


def shown(value: object, limit: int = 60) -> str:
    """`value` as the user wrote it, short enough for one line."""
    text = "null" if value is None else str(value) if isinstance(value, (int, float)) else repr(value)
    text = {"True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint `; did you mean 'x'?` with the closest candidate, or the list of what is allowed."""
    names = sorted(candidates)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"use one of: {', '.join(names)}"


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Names allowed beside the last element of `location` inside `model`."""
    current: Any = model
    for part in location[:-1]:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            return []
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        current = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    fields = getattr(current, "model_fields", {})
    return [field.alias or name for name, field in fields.items()]


def _explain(error: Any, model: type[BaseModel]) -> str:
    location = tuple(error["loc"])
    field = ".".join(str(part) for part in location) or model.__name__
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return f"{field}: unknown key; {nearest(str(location[-1]), _fields_at(model, location))}"
    if kind == "missing":
        return f"{field}: missing; give it a value"
    if kind == "value_error" and isinstance(error.get("ctx", {}).get("error"), ConfigError):
        return str(error["ctx"]["error"])
    if kind == "literal_error":
        allowed = [a.strip("'") for a in error["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        return f"{field} = {shown(value)}: {nearest(str(value), allowed)}"
    message = error["msg"]
    return f"{field} = {shown(value)}: {message[0].lower() + message[1:]}"


def from_validation(error: ValidationError, model: type[BaseModel], where: str = "") -> UserError:
    """pydantic's report as one line an error, most useful first, each with field, value and fix."""
    lines = [_explain(item, model) for item in error.errors(include_url=False)]
    prefix = f"{where}: " if where else ""
    return UserError("\n".join(dict.fromkeys(prefix + line for line in lines)))
