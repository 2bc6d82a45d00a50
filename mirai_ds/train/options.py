"""The options of a training run, declared once: for `mirai-ds train` and for each of its ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click


@dataclass(frozen=True)
class TrainOptions:
    """What a user asks of a run.  overrides: `section.field=value`; the others are as the options below say."""

    recipe: str
    overrides: tuple[str, ...] = ()
    deepspeed: str | None = None
    run_dir: Path | None = None
    resume: str | None = None
    fresh: bool = False
    allow_change: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """The words that a rank is started with."""
        words = [self.recipe, *(word for override in self.overrides for word in ("--set", override))]
        for name, value in (("--deepspeed", self.deepspeed), ("--run-dir", self.run_dir), ("--resume", self.resume)):
            words += [name, str(value)] if value else []
        words += [word for field in self.allow_change for word in ("--allow-change", field)]
        return words + ["--fresh"] * self.fresh


def train_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command with the options; it is called with one `TrainOptions` and what other options it has."""
    names = [field.name for field in fields(TrainOptions)]

    def called(**values: Any) -> Any:
        given = TrainOptions(**{name: values.pop(name) for name in names})
        return function(given, **values)

    called.__doc__, called.__name__ = function.__doc__, function.__name__
    called.__click_params__ = list(getattr(function, "__click_params__", []))  # type: ignore[attr-defined]
    for option in reversed(_OPTIONS):
        called = option(called)
    return called


_OPTIONS: list[Callable[[Any], Any]] = [
    click.argument("recipe"),
    click.option(
        "--set", "overrides", multiple=True, metavar="SECTION.FIELD=VALUE", help="Override one field; repeatable."
    ),
    click.option("--deepspeed", metavar="FILE", help="A DeepSpeed JSON file, or the name of one in ds_configs/."),
    click.option("--run-dir", type=click.Path(path_type=Path), help="Run folder; default OUTPUT_DIR/NAME."),
    click.option("--resume", metavar="auto|if-present|STEP", help="Continue from the newest checkpoint, or a step."),
    click.option(
        "--allow-change",
        multiple=True,
        metavar="FIELD",
        help="Resume although this field, or section, is another than the checkpoint's; repeatable.",
    ),
    click.option("--fresh", is_flag=True, help="Set an earlier run of this name aside (renamed, not deleted)."),
]
