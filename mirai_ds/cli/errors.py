"""What all verbs share: how help looks, and how a mistake of the user ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def mistakes_in_one_line(function: Callable[..., Any]) -> Callable[..., Any]:
    """A `UserError`, and memory that is too small, become `mirai-ds: error: ...` and exit code 2."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from mirai_ds.config.errors import UserError

        try:
            return function(*args, **kwargs)
        except UserError as error:
            click.echo(f"mirai-ds: error: {error}", err=True)
            sys.exit(2)
        except (RuntimeError, MemoryError, OSError) as error:
            from mirai_ds.runtime.failures import gist, lacking_memory

            lacking = lacking_memory(error)
            if not lacking:
                raise
            smaller = next((name for name in ("batch", "batch_size") if name in kwargs), "")
            advice = f"; smaller batches need less (--{smaller.replace('_', '-')})" if smaller else ""
            click.echo(f"mirai-ds: error: out of {lacking} ({gist(error)}){advice}", err=True)
            sys.exit(2)

    return wrapped
