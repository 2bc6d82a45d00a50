"""YAML as people write recipes: safe, duplicate keys refused, `1e-4` a number, one plain sentence for a mistake."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from mirai_ds.config.errors import UserError

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class _Loader(yaml.SafeLoader):
    """SafeLoader in which a date is text: a run may be called 2026-01-31."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own way)
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def number_in(text: str) -> int | float | None:
    """The finite number that `text` spells, whole where it is whole; None if it spells none.

    YAML 1.1 reads `1e-4` (no dot) as text, so fields that hold numbers ask again.
    """
    if not _NUMBER.fullmatch(text.strip()):
        return None
    value = float(text)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else value


def parse(text: str, where: str) -> Any:
    """The value of a YAML text; raises `UserError` with place and reason."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_duplicates(node, where, "", ())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise UserError(f"{place}: not valid YAML: {_plain(error)}") from None
    except ValueError as error:  # `0b_` is a number to YAML's pattern and not to Python
        raise UserError(f"{where}: not valid YAML: {str(error).splitlines()[0]}; quote text") from None


def _refuse_duplicates(node: yaml.Node, where: str, path: str, above: tuple[int, ...]) -> None:
    """PyYAML silently takes the last of two equal keys; the other one was meant too, so it is a mistake."""
    if id(node) in above:
        raise UserError(f"{where}: {path}: an alias of the section it is in; remove it")
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, where, path, above)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line = f"{path}.{key.value}".lstrip("."), key.start_mark.line + 1
        first = lines.get((key.tag, key.value))
        if first is not None:
            raise UserError(f"{where}:{line}: {name}: given twice (first in line {first}); keep one")
        lines[key.tag, key.value] = line
        _refuse_duplicates(value, where, name, above)


def _plain(error: yaml.YAMLError) -> str:
    """PyYAML's reason in the words of somebody who writes a recipe."""
    problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read")
    context = str(getattr(error, "context", None) or "")
    for part, plain in _REASONS.items():
        if part in problem or part in context:
            return plain
    if "cannot start any token" in problem:
        problem = problem.removeprefix("found ")
        return problem.replace("that cannot start any token", "cannot start a value; quote the text")
    return " ".join(problem.split())


_REASONS = {
    "character '\\t'": "a tab; indent with spaces",
    "mapping values are not allowed": "unexpected ':'; check the indentation, or quote text that holds ': '",
    "expected <block end>": "the indentation does not line up with the lines above",
    "but got '<stream end>'": "a bracket is not closed",
    "quoted scalar": "a quote is not closed, or holds a bad \\ escape",
    "could not determine a constructor": "tags such as !!python are not allowed; remove the tag",
    "single document": "one recipe a file; remove the '---'",
    "could not find expected ':'": "a key without ':'",
    "special characters": "a control character; remove it",
    "unhashable key": "a key must be a name, not a list or section",
}
