"""Images from a run or a weights file, on one device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mirai_ds.checkpoint.weights import LoadedWeights, load_weights
from mirai_ds.config import RunConfig, UserError
from mirai_ds.data import load_decoder
from mirai_ds.data.meaning import Meaning, class_names
from mirai_ds.data.sources import load_meaning
from mirai_ds.data.token_source import TokenDecoder
from mirai_ds.model import GPT, SamplingRules, gpt_from_weights, sample_tokens
from mirai_ds.model.rules import rules_of
from mirai_ds.runtime.disk import write_arrays
from mirai_ds.tokenizer import open_tokenizer
from mirai_ds.tracking.pictures import labelled_grid, save_png

NO_DATA = "a weights file does not say what shows its tokens; give --tokenizer FILE, or its --recipe"


def sample_to_folder(
    source: Path, out: Path | None, per_class: int | None, classes: str | None, weights: str | None, step: int | None,
    cfg_scale: float | None, cfg_interval: int | None, temperature: float | None, top_k: int | None,
    top_p: float | None, seed: int, recipe: str | None,
    block_size: int | None = None, tokenizer: Path | None = None,
) -> str:  # fmt: skip
    """Write tokens.npz and, where something can decode its tokens, grid.png; returns a line that says what was done."""
    loaded = load_weights(source, weights, step, recipe, block_size)  # type: ignore[arg-type]
    config = loaded.config
    given = {
        "cfg_scale": cfg_scale, "cfg_interval": cfg_interval, "temperature": temperature, "top_k": top_k,
        "top_p": top_p,
    }  # fmt: skip
    rules = replace(rules_of(config.sampling), **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    check_rules(rules)
    columns = per_class or config.sampling.per_class
    labels = torch.tensor(chosen_classes(classes, config)).repeat_interleave(columns)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder, reason = open_decoder(loaded, tokenizer, device)
    folder = out or (source / "samples" if source.is_dir() and loaded.data is not None else Path("samples"))
    folder.mkdir(parents=True, exist_ok=True)
    gpt = gpt_from_weights(config.model, {name: value.to(device) for name, value in loaded.gpt.items()})
    tokens = draw_in_batches(gpt, labels, rules, seed, device)
    arrays = {"tokens": tokens.numpy().astype(np.uint16), "labels": labels.numpy()}
    if decoder is not None:
        arrays["images"] = decoder.decode(tokens)
        names = class_names(meaning_of(loaded), labels[::columns].tolist())
        save_png(folder / "grid.png", labelled_grid(arrays["images"], columns, rows=names))
    write_arrays(folder / "tokens.npz", arrays)
    written = f"{len(labels)} images from {loaded.origin}, cfg {rules.cfg_scale:g}: {folder}/tokens.npz"
    return f"{written} and grid.png" if "images" in arrays else f"{written} (no pictures: {reason})"


def meaning_of(loaded: LoadedWeights) -> Meaning | None:
    """What the labels stand for, by what lies beside the weights, else by the data; None where nobody says."""
    return load_meaning(loaded.data) if loaded.classes is None else Meaning(classes=loaded.classes)


def open_decoder(
    loaded: LoadedWeights, tokenizer: Path | None, device: torch.device
) -> tuple[TokenDecoder | None, str]:
    """What shows the tokens, the given tokenizer or the data's own; else None and why nothing does: they are worth
    having all the same.  Raises UserError."""
    file = tokenizer or loaded.codebook
    if file is not None:
        decoder: TokenDecoder | None = open_tokenizer(file, str(device))
    elif loaded.data is None:
        return None, NO_DATA
    else:
        try:
            decoder = load_decoder(loaded.data)
        except UserError as error:  # data that has moved
            return None, str(error)
    if decoder is None:
        return None, "the data has no codebook; --tokenizer FILE shows them"
    check_vocabulary(decoder, loaded.config, given=tokenizer is not None)
    return decoder, ""


def draw_in_batches(
    gpt: GPT, labels: Tensor, rules: SamplingRules, seed: int, device: torch.device, batch: int = 256
) -> Tensor:
    """Tokens (n, N) int64 on CPU for labels (n,); image i's numbers depend on (seed, i) alone."""
    parts = [
        sample_tokens(gpt, labels[indices].to(device), indices.to(device), rules, seed).cpu()
        for indices in torch.arange(len(labels)).split(batch)
    ]
    return torch.cat(parts)


def chosen_classes(text: str | None, config: RunConfig) -> list[int]:
    """Of `--classes 0,3,7`, else those that the run shows; raises UserError."""
    if text is None:
        return list(range(config.sampling.classes))
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--classes {text}: write numbers with commas, e.g. 0,3,7") from None
    bad = [c for c in classes if not 0 <= c < config.model.num_classes]
    if bad:
        raise UserError(f"--classes {text}: {bad[0]} is outside 0..{config.model.num_classes - 1}")
    return classes


def check_vocabulary(decoder: TokenDecoder, config: RunConfig, given: bool) -> None:
    """Raises UserError when the decoder, `given` by --tokenizer or the data's, is not of the model's tokens."""
    if decoder.vocab_size != config.model.vocab_size:
        what, fix = ("--tokenizer", "") if given else ("the data's codebook", "; give --tokenizer FILE")
        raise UserError(
            f"{what}: has {decoder.vocab_size} codes, the model {config.model.vocab_size}: not the one it was "
            f"trained on{fix}"
        )


def check_rules(rules: SamplingRules) -> None:
    """Raises UserError for values that mean nothing."""
    if not 0 < rules.top_p <= 1:
        raise UserError(f"--top-p {rules.top_p}: must be in (0, 1]; 1 = off")
    if rules.top_k < 0 or rules.temperature < 0 or rules.cfg_scale < 0 or rules.cfg_interval < -1:
        raise UserError(
            "--top-k, --temperature, --cfg and --cfg-interval must not be negative (--cfg-interval -1 = all)"
        )
