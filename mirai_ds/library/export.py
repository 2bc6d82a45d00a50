"""A model as a folder of its own, with its configuration, weights and card, for others to load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mirai_ds.checkpoint.llamagen import write_llamagen
from mirai_ds.checkpoint.model_folder import CARD, CODEBOOK, CONFIG, MODEL_TYPE, WEIGHTS
from mirai_ds.checkpoint.weights import LoadedWeights, load_weights
from mirai_ds.config import RunConfig, UserError
from mirai_ds.config.eval_config import Weights
from mirai_ds.data.token_source import TokenDecoder
from mirai_ds.library.model_card import model_card
from mirai_ds.runtime.disk import sync, temporary_name, write_whole
from mirai_ds.sampling.grid import meaning_of, open_decoder
from mirai_ds.tokenizer import PatchCodebook
from mirai_ds.version import __version__

# Of a run's configuration what tells of a model; where files lie and how it was started is the machine's own business.
SECTIONS = ("name", "seed", "model", "foresight", "optimizer", "train", "ema", "sampling")
# Fields that name a file: its name alone is kept.
FILES = (("foresight", "teacher_weights"), ("train", "init_from"), ("foresight", "encoder", "path"))


def export_folder(
    source: Path, out: Path, weights: Weights | None, step: int | None, heads: bool, recipe: str | None
) -> str:  # fmt: skip
    """Write `out`, a new folder, from a run or a weights file: `ImageModel.from_pretrained` and every verb that takes a
    weights file read it.  weights: default the run's choice for sampling.  heads: with `projectors.*`.

    Returns a line that says what was written.  Raises UserError where the folder is there already.
    """
    if out.exists():
        raise UserError(f"--out {out}: is there already, and nothing is overwritten; give a new folder")
    loaded = load_weights(source, weights, step, recipe, heads=heads)
    decoder, tokenizer, classes = _what_shows_it(loaded)
    codebook = decoder if isinstance(decoder, PatchCodebook) else None
    part = temporary_name(out)
    try:
        part.mkdir(parents=True)
        info = {"name": loaded.config.name, "weights": loaded.kind, **loaded.model}
        write_llamagen(part / WEIGHTS, loaded.gpt, steps=loaded.step, info=info)
        if codebook is not None:
            codebook.save(part / CODEBOOK)
        told = {
            "model_type": MODEL_TYPE, "mirai_ds": __version__, "weights": loaded.kind, "step": loaded.step,
            "tokenizer": tokenizer, "classes": classes, "recipe": public_recipe(loaded.config),
        }  # fmt: skip
        write_whole(part / CONFIG, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        write_whole(part / CARD, model_card(source, loaded, tokenizer, codebook is not None, classes or []))
        part.rename(out)
        sync(out.parent)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shows = "" if codebook else f"; its tokens need {tokenizer}, which is not in it"
    return f"{out}: {len(loaded.gpt)} tensors of {loaded.kind} weights, step {loaded.step}, and a model card{shows}"


def public_recipe(config: RunConfig) -> dict[str, Any]:
    """The sections that say what the model is and how it was trained, without this machine's folders."""
    told = {name: value for name, value in config.model_dump(mode="json").items() if name in SECTIONS}
    for *sections, field in FILES:
        place: Any = told
        for name in sections:
            place = (place or {}).get(name)
        if place and place.get(field):
            place[field] = Path(place[field]).name
    return told


def _what_shows_it(loaded: LoadedWeights) -> tuple[TokenDecoder | None, str, list[str] | None]:
    """The decoder where there is one, what the tokenizer is called, and the classes' names where they are known."""
    import torch

    decoder, _ = open_decoder(loaded, None, torch.device("cpu"))
    classes: list[str] | None = None
    tokenizer = "the tokenizer it was trained on"
    meaning = meaning_of(loaded)
    if meaning is not None and meaning.classes is not None:
        classes = list(meaning.classes)
    if meaning is not None and meaning.tokenizer is not None:
        name, digest = meaning.tokenizer
        tokenizer = f"{name} (digest {digest[:12]})"
    if decoder is not None:
        tokenizer = f"{getattr(decoder, 'name', type(decoder).__name__)} (digest {decoder.digest[:12]})"
    return decoder, tokenizer, classes
