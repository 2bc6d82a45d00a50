"""A trained model in memory: to draw from, to look into, to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mirai_ds.checkpoint.gpt_file import PROJECTORS
from mirai_ds.checkpoint.weights import load_weights
from mirai_ds.config import DataConfig, RunConfig, UserError
from mirai_ds.config.eval_config import Weights
from mirai_ds.data import load_dataset
from mirai_ds.data.meaning import Meaning, class_names
from mirai_ds.data.token_source import TokenDecoder
from mirai_ds.foresight import index_table, method_of, slot_counts
from mirai_ds.foresight.heads import heads
from mirai_ds.foresight.methods import Heads
from mirai_ds.model import GPT, gpt_from_weights, next_token_loss, token_features
from mirai_ds.model.features import Slots
from mirai_ds.model.rules import rules_of
from mirai_ds.sampling.grid import check_rules, draw_in_batches, meaning_of, open_decoder
from mirai_ds.tracking.pictures import labelled_grid, png_of, save_png

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, repr=False)
class Samples:
    """Drawn images.  tokens (n, N) int64 in raster order, labels (n,) int64, both on CPU; images uint8 (n, H, W, 3),
    None where nothing decodes the tokens; names: each image's class.  A notebook shows them as a sheet of `columns`
    images a row."""

    tokens: Tensor
    labels: Tensor
    images: np.ndarray[Any, Any] | None
    columns: int
    names: Sequence[str] = ()

    def sheet(self) -> Image:
        """All images on one picture, their classes named left of the rows, or below each image.  Raises UserError
        where there are only tokens."""
        from PIL import Image

        if self.images is None:
            raise UserError("nothing decodes these tokens: give ImageModel.from_pretrained a tokenizer")
        labels = self.labels.tolist()
        of_rows = all(len(set(labels[i : i + self.columns])) == 1 for i in range(0, len(labels), self.columns))
        rows, captions = (self.names[:: self.columns], ()) if of_rows else ((), self.names)
        return Image.fromarray(labelled_grid(self.images, self.columns, rows, captions))

    def save(self, path: str | Path) -> None:
        """Write the sheet as a PNG, whole or not at all.  Raises UserError."""
        save_png(Path(path), np.asarray(self.sheet()))

    def __repr__(self) -> str:
        pictures = "tokens alone" if self.images is None else f"{self.images.shape[2]}x{self.images.shape[1]} pixels"
        return f"Samples({len(self.tokens)} images, {pictures})"

    def _repr_png_(self) -> bytes | None:
        return None if self.images is None else png_of(np.asarray(self.sheet()))


class ImageModel:
    """A GPT with the configuration it was trained by, frozen and in eval mode, on one device.

    gpt: the network.  config: model, method, sampling rules.  projectors: alignment heads, None where the source has
    none.  decoder: what shows tokens as pictures, None where nothing does, for the `reason` given.  origin: where the
    weights came from; step: of the training, 0 if unknown; weights: raw or ema.  data: what it was trained on, None
    where nobody says.  meaning: what its classes are called, None where nobody says.
    """

    def __init__(
        self, gpt: GPT, config: RunConfig, projectors: torch.nn.ModuleList | None = None,
        decoder: TokenDecoder | None = None, reason: str = "", origin: str = "", step: int = 0,
        weights: Weights = "raw", data: DataConfig | None = None, meaning: Meaning | None = None,
    ) -> None:  # fmt: skip
        self.gpt, self.config, self.projectors = gpt, config, projectors
        self.decoder, self.reason = decoder, reason
        self.origin, self.step, self.weights = origin, step, weights
        self.data, self.meaning = data, meaning

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, weights: Weights | None = None, step: int | None = None, recipe: str | None = None,
        block_size: int | None = None, tokenizer: str | Path | None = None, device: str | torch.device | None = None,
    ) -> ImageModel:  # fmt: skip
        """The model of a run folder, of a folder or file that `mirai-ds export` wrote, or of a released LlamaGen file.

        weights: raw or ema; default the run's choice for sampling (ema), of a file what it has.  step: of a run's
        checkpoint, default the newest whole one.  recipe, block_size: of a file that does not say what it is of.
        tokenizer: the file that decodes its tokens, where the source does not know.  device: default the GPU where
        there is one.  Raises UserError.
        """
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loaded = load_weights(Path(source), weights, step, recipe, block_size, heads=True)
        mine = {name: value.to(where) for name, value in loaded.gpt.items()}
        of_heads = {key.removeprefix(PROJECTORS): mine.pop(key) for key in list(mine) if key.startswith(PROJECTORS)}
        decoder, reason = open_decoder(loaded, None if tokenizer is None else Path(tokenizer), where)
        gpt = gpt_from_weights(loaded.config.model, mine)
        projectors = _heads_from_weights(loaded.config, of_heads) if of_heads else None
        return cls(
            gpt, loaded.config, projectors, decoder, reason, loaded.origin, loaded.step, loaded.kind, loaded.data,
            meaning_of(loaded),
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.gpt.norm.weight.device

    def __repr__(self) -> str:
        model = self.config.model
        size = f"{model.size} of {model.depth} blocks, width {model.width}, {model.grid}x{model.grid} tokens"
        return f"ImageModel({size}, {model.num_classes} classes, {self.origin or 'no origin'}, step {self.step})"

    def sample(
        self, classes: Sequence[int] | Tensor | None = None, per_class: int = 1, seed: int = 0, batch: int = 64,
        **rules: Any,
    ) -> Samples:  # fmt: skip
        """Draw `per_class` images of each of `classes` (default: as many as the run shows).

        rules: cfg_scale, cfg_interval, temperature, top_k, top_p; default the run's.  Image i depends on seed and i
        alone; on CPUs not on `batch` either, the images drawn at a time.  Raises UserError on a class or a rule that
        there is not, and on a value without meaning.
        """
        model = self.config.model
        chosen = list(range(self.config.sampling.classes)) if classes is None else [int(c) for c in classes]
        bad = [c for c in chosen if not 0 <= c < model.num_classes]
        if bad:
            raise UserError(f"class {bad[0]}: the model has 0..{model.num_classes - 1}")
        try:
            asked = replace(rules_of(self.config.sampling), **rules)
        except TypeError:
            known = "cfg_scale, cfg_interval, temperature, top_k, top_p"
            raise UserError(f"sampling rules {', '.join(rules)}: use {known}") from None
        check_rules(asked)
        labels = torch.tensor(chosen, dtype=torch.int64).repeat_interleave(per_class)
        tokens = draw_in_batches(self.gpt, labels, asked, seed, self.device, batch)
        images = None if self.decoder is None else self.decoder.decode(tokens)
        columns = per_class if per_class > 1 else min(len(chosen), 8)
        return Samples(tokens, labels, images, columns, class_names(self.meaning, labels.tolist()))

    def examples(self, count: int, held_out: bool = True) -> tuple[Tensor, Tensor]:
        """The first `count` images, or all there are, of the data that it was trained on: tokens (n, N) of their first
        stored view and labels (n,), int64.  held_out: of those not trained on.  Raises UserError."""
        if self.data is None:
            raise UserError(f"{self.origin or 'this model'}: does not say what it was trained on; give its recipe")
        dataset = load_dataset(self.data, self.config.model)
        source = dataset.held_out if held_out else dataset.train
        if len(source) == 0:
            raise UserError("nothing was held out of this data; give examples(..., held_out=False)")
        indices = torch.arange(min(count, len(source)))
        tokens, labels, _ = source.gather(indices, torch.zeros_like(indices))
        return tokens, labels

    def features(self, tokens: Tensor, labels: Tensor, layer: int | None = None, slots: Slots = "input") -> Tensor:
        """Hidden states after block `layer` (1-based; default the aligned one, else two thirds of the depth), float32
        on CPU, of tokens (n, N) int64 and labels (n,) int64, without dropout.

        slots: (n, N, D) of the slot that holds (`input`) or predicts (`predict`) each token, in raster order; `all`:
        (n, 1 + N, D), the class first, which is what Mirai-E's teacher gives.  Raises UserError.
        """
        depth = self.config.model.depth
        layer = layer or self.config.foresight.layer or max(1, round(depth * 8 / 12))
        if not 1 <= layer <= depth:
            raise UserError(f"layer {layer}: the model has blocks 1..{depth}")
        return token_features(self.gpt, tokens, labels, layer, slots)

    @torch.no_grad()
    def loss(self, tokens: Tensor, labels: Tensor) -> float:
        """Mean next-token loss, in nats a token, of tokens (n, N) and labels (n,), int64, without dropout."""
        tokens, labels = tokens.to(self.device), labels.to(self.device)
        return float(next_token_loss(self.gpt(tokens[:, :-1], labels).logits, tokens))

    @torch.no_grad()
    def alignment(self, tokens: Tensor, labels: Tensor, target: Tensor) -> tuple[float, list[float]]:
        """(weighted alignment loss, each head's cosine or entropy) of tokens (n, N) and labels (n,), int64, by the
        run's own rule and heads, without dropout.

        target: of Mirai-E (n, 1 + N, D), `features(..., slots="all")` of the averaged model; of Mirai-I (n, N, C), the
        encoder's features; of multi-token prediction the tokens.  Raises UserError where the source has no heads.
        """
        foresight, model = self.config.foresight, self.config.model
        method = method_of(foresight)
        if method is None or self.projectors is None or foresight.layer is None:
            raise UserError(f"{self.origin}: has no alignment heads; `mirai-ds export --projectors` keeps a run's")
        table = index_table(foresight, model.grid, model.par_tokens)
        device = self.device
        parts = Heads(
            self.projectors, self.gpt.head, table.int().to(device), torch.tensor(foresight.weights, device=device),
            slot_counts(foresight, table, model.block_size).to(device), foresight, 1.0, False,
        )  # fmt: skip
        tokens, labels = tokens.to(device), labels.to(device)
        x = self.gpt.embed(tokens[:, :-1], labels, None)
        _, hidden = self.gpt.blocks(x, None, (foresight.layer,))
        loss, each = method.loss(parts, hidden[foresight.layer], target.to(device))
        return float(loss), each.tolist()


def _heads_from_weights(config: RunConfig, weights: dict[str, Tensor]) -> torch.nn.ModuleList:
    """The alignment heads of these weights, as wide as their last layer says."""
    last = max((key for key in weights if key.startswith("0.") and weights[key].ndim == 2), key=_place)
    with torch.device("meta"):
        made = heads(config.foresight, config.model.width, len(weights[last]))
    made.load_state_dict(weights, assign=True)
    return made.eval().requires_grad_(False)


def _place(key: str) -> tuple[bool, str]:
    """Orders a head's layers; a transformer head's last one is called `linear`."""
    return "linear" in key, key
