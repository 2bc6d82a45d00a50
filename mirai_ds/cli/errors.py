"""What all verbs share: how help looks, and how a mistake of the user ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def mistakes_in_one_line(function: Callable[..., Any]) -> Callable[..., Any]:
    """A `UserError` becomes `mirai-ds: error: ...` and exit code 2."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from mirai_ds.config.errors import UserError

        try:
            return function(*args, **kwargs)
        except UserError as error:
            click.echo(f"mirai-ds: error: {error}", err=True)
            sys.exit(2)

    return wrapped
