"""Which model foreign weights are of, whether they fit one, and files that LlamaGen's own samplers read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from mirai_ds.checkpoint.gpt_file import AVERAGE, PROJECTORS
from mirai_ds.config import SIZES, ConfigError, ModelConfig, UserError
from mirai_ds.config.errors import from_validation, shown
from mirai_ds.model import GPT
from mirai_ds.runtime.disk import replacing
from mirai_ds.runtime.weight_files import SAFETENSORS, first_line, write_safetensors

LEARNABLE = "spe_tok_embeddings.special_embeddings.weight"  # PAR's n - 1 tokens


class _Shape(NamedTuple):
    """What a state dict's shapes tell."""

    dim: int
    n_layer: int
    vocab_size: int
    num_classes: int
    ffn_hidden: int
    par_tokens: int | None

    @property
    def size(self) -> str | None:
        """The named size with this width and depth; None when there is none."""
        return next((name for name, s in SIZES.items() if (s.dim, s.n_layer) == (self.dim, self.n_layer)), None)


def _measure(weights: Mapping[str, Tensor]) -> _Shape | None:
    """Sizes by the shapes alone; None when the tables that tell them are not there."""
    tokens, labels = weights.get("tok_embeddings.weight"), weights.get("cls_embedding.embedding_table.weight")
    w1 = weights.get("layers.0.feed_forward.w1.weight")
    blocks = [int(block[1]) for key in weights if (block := re.match(r"layers\.(\d{1,9})\.", key))]
    if tokens is None or labels is None or w1 is None or not blocks or {tokens.ndim, labels.ndim, w1.ndim} != {2}:
        return None
    learnable = weights.get(LEARNABLE)
    par_tokens = None if learnable is None or learnable.ndim != 2 else len(learnable) + 1
    return _Shape(tokens.shape[1], max(blocks) + 1, tokens.shape[0], labels.shape[0] - 1, w1.shape[0], par_tokens)


def infer_model_config(weights: Mapping[str, Tensor], block_size: int = 256, n_head: int | None = None) -> ModelConfig:
    """The model that a state dict belongs to, by its shapes.

    They do not tell `block_size` (positions have no parameters) and, unless width and depth are those of a LlamaGen
    size, not `n_head` either.  Raises UserError when something is missing, ConfigError when nothing fits.
    """
    shape = _measure(weights)
    if shape is None:
        raise UserError("not a GPT's weights: tok_embeddings, cls_embedding or layers.0.feed_forward is missing")
    sizes: dict[str, Any] = {name: getattr(shape, name) for name in ("vocab_size", "num_classes", "par_tokens")}
    sizes["block_size"] = block_size
    if shape.size is None:
        if n_head is None:
            known = f"no LlamaGen size has dim {shape.dim}, n_layer {shape.n_layer}"
            raise ConfigError("model.n_head", None, f"{known}, and weights do not tell the number of heads: give it")
        sizes |= {"dim": shape.dim, "n_layer": shape.n_layer}
    if n_head is not None:
        sizes["n_head"] = n_head
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        try:
            config = ModelConfig(size=shape.size or "custom", ffn_multiple_of=multiple, **sizes)
        except ValidationError as error:
            raise from_validation(error, ModelConfig, "these weights") from None
        if config.ffn_hidden == shape.ffn_hidden:
            return config
    raise ConfigError(
        "model.ffn_multiple_of", 256, f"no value gives a feed-forward width of {shape.ffn_hidden} at dim {shape.dim}"
    )


# Of what shapes do not tell, which a file may: what makes other numbers, and with `block_size` other places.
UNSEEN = ("n_head", "norm_eps", "rope_base", "block_size")


def check_told(told: Mapping[str, Any], config: ModelConfig, path: Path, names: Sequence[str] = UNSEEN) -> None:
    """That the model whose fields a file tells has the `names` of this one; raises UserError."""
    for name in names:
        if told.get(name, (ours := getattr(config, name))) != ours:
            raise UserError(f"{path}: is of a model with {name} = {told[name]}, this one has {ours}; set model.{name}")


def check_gpt_weights(weights: Mapping[str, Tensor], config: ModelConfig, path: Path) -> None:
    """Strict: every tensor of the GPT with its shape, and nothing else but `projectors.*`; raises UserError."""
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in GPT(config).state_dict().items()}
    missing = [key for key in wanted if key not in weights]
    unexpected = [key for key in weights if key not in wanted and not key.startswith(PROJECTORS)]
    misshaped = [key for key in wanted if key in weights and tuple(weights[key].shape) != wanted[key]]
    if not (missing or unexpected or misshaped):
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(wanted)} tensors missing (first: {missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected (first: {shown(unexpected[0])})")
    if misshaped:
        key = misshaped[0]
        parts.append(f"{len(misshaped)} misshaped (first: {key} is {tuple(weights[key].shape)}, needed {wanted[key]})")
    raise UserError(f"{path}: does not fit the model: {', '.join(parts)}; {_hint(weights, config)}")


def check_heads(weights: Mapping[str, Tensor], heads: Mapping[str, Tensor], path: Path) -> None:
    """Strict, of weights that hold alignment heads: those of `heads`, by `projectors.*` key, with their shapes, and no
    others; raises UserError."""
    found, wanted = (
        {key: tuple(value.shape) for key, value in tensors.items() if key.startswith(PROJECTORS)}
        for tensors in (weights, heads)
    )
    if not found or found == wanted:
        return
    key = next(key for key in (*found, *wanted) if found.get(key) != wanted.get(key))
    ours, theirs = wanted.get(key, "no such tensor"), found.get(key, "no such tensor")
    raise UserError(
        f"{path}: its alignment heads are not this run's: {key} is {theirs} there and {ours} here; set "
        "foresight.head, num_heads and projector_dim as there, or give a file without heads, which `mirai-ds export` "
        "writes of it"
    )


def _hint(weights: Mapping[str, Tensor], config: ModelConfig) -> str:
    shape = _measure(weights)
    if shape is None:
        return "these are not a LlamaGen GPT's weights"
    hints = []
    if (shape.dim, shape.n_layer) != (config.width, config.depth):
        size = f"model.size = {shape.size or 'custom'}"
        hints.append(f"{size} (dim {shape.dim}, n_layer {shape.n_layer}; the model is {config.width}, {config.depth})")
    hints += [
        f"model.{name} = {shown(getattr(shape, name))}, not {shown(getattr(config, name))}"
        for name in ("vocab_size", "num_classes", "par_tokens")
        if getattr(shape, name) != getattr(config, name)
    ]
    if not hints and shape.ffn_hidden != config.ffn_hidden:
        hints.append(f"a feed-forward width of {shape.ffn_hidden}, not {config.ffn_hidden} (model.ffn_multiple_of)")
    return f"the file's shapes mean {', '.join(hints)}" if hints else "the file is of this size but not this network"


def write_llamagen(
    path: Path,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None = None,
    steps: int = 0,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write a file that LlamaGen's own samplers load: {"model", "ema"?, "steps", "args"}, weights in fp32, atomically.

    `info` becomes `args` and must be JSON values.  The samplers take "model", so give the averaged weights as `model`
    where they should be sampled, and say `weights: ema` in `info`.  A .safetensors path holds `model`'s keys, those of
    `ema` after "ema."; `steps` and `info` are its metadata.  Raises UserError when the file cannot be written.
    """
    args = json.loads(json.dumps(dict(info or {})))
    plain = _plain(model)
    if path.suffix == SAFETENSORS:
        plain |= {f"{AVERAGE}.{key}": value for key, value in _plain(ema or {}).items()}
        notes = {key: value if isinstance(value, str) else json.dumps(value) for key, value in args.items()}
        notes = {"format": "pt", **notes, "steps": str(steps)}
        _write_atomically(path, lambda part: write_safetensors(Path(part), plain, notes))
        return
    data: dict[str, Any] = {"model": plain, "steps": steps, "args": args}
    if ema is not None:
        data["ema"] = _plain(ema)
    _write_atomically(path, lambda part: torch.save(data, part))


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fp32 on CPU, each tensor alone in its memory: a view would drag the whole it is a view of into the file."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in weights.items():
        tensor = value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype).contiguous()
        memory = tensor.untyped_storage()
        if memory.nbytes() != tensor.nbytes or memory.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        out[key] = tensor
    return out


def _write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """`write` a file whole or not at all.  Raises UserError."""
    from safetensors import SafetensorError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            write(str(part))
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from None
