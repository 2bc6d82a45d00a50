"""The configuration that a run's folder holds."""

from __future__ import annotations

from pathlib import Path

import yaml

from mirai_ds.config import RunConfig, UserError, build


def read_run_config(run: Path) -> RunConfig:
    """The resolved configuration stored with a run.  Raises UserError when it has none, or one that is not valid."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: not a run folder (it has no config.yaml)")
    return build(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
