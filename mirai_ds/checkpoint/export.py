"""A run's weights as a file for LlamaGen's own samplers."""

from __future__ import annotations

from pathlib import Path

from mirai_ds.checkpoint.format import StateReader
from mirai_ds.checkpoint.llamagen import write_llamagen
from mirai_ds.checkpoint.weights import checkpoint_of
from mirai_ds.runs.configuration import read_run_config


def export_run(run: Path, out: Path, weights: str, step: int | None, with_projectors: bool) -> str:
    """weights: raw, ema (under "model") or both ("model" and "ema"); returns a line that says what was written."""
    config = read_run_config(run)
    folder, steps = checkpoint_of(run, step)
    reader = StateReader(folder)

    def read(kind: str) -> dict[str, object]:
        tensors: dict[str, object] = dict(reader.weights(kind))
        if with_projectors:
            tensors |= {f"projectors.{name}": value for name, value in reader.weights(kind, "projectors.").items()}
        return tensors

    model = read("ema" if weights == "ema" else "master")
    ema = read("ema") if weights == "both" else None
    info = {"recipe": config.name, "weights": weights, **config.model.model_dump(mode="json")}
    write_llamagen(out, model, ema, steps=steps, info=info)  # type: ignore[arg-type]
    return f"{out}: {len(model)} tensors of {weights} weights, step {steps}"
