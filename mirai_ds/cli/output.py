"""What verbs share of their options and of what they print.  Heavy modules are imported inside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

PATH = click.Path(path_type=Path)
METHODS = ("none", "mirai-e", "mirai-i")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")


def print_parts(parts: list[RenderableType], width: int = 150) -> None:
    """Tables and sentences, as wide as the terminal; `width` columns where there is none."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else width, highlight=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, Text))  # sentences stay one line, for grep


def print_json(value: dict[str, Any]) -> None:
    """One JSON object; NaN is refused."""
    click.echo(json.dumps(value, indent=1, allow_nan=False))
