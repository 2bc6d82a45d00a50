"""What is asked for, checked: which weights, labels and rules, at which size, how fast, and where it goes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mirai_ds.checkpoint.model_folder import is_model_folder
from mirai_ds.checkpoint.weights import LoadedWeights, load_weights
from mirai_ds.config import RunConfig, UserError
from mirai_ds.config.eval_config import Weights
from mirai_ds.data import load_decoder
from mirai_ds.data.meaning import Meaning
from mirai_ds.data.token_source import TokenDecoder
from mirai_ds.model import SamplingRules, Speed
from mirai_ds.model.orders import token_order
from mirai_ds.model.rules import Policy, rules_of
from mirai_ds.runtime.environment import cpu_name
from mirai_ds.sampling.grid import NO_DATA, check_rules, check_vocabulary, chosen_classes, meaning_of
from mirai_ds.tokenizer import open_tokenizer
from mirai_ds.tokenizer.vq import weights_digest
from mirai_ds.version import __version__

Switch = Literal["auto", "on", "off"]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH = {"cuda": 64, "cpu": 16}


@dataclass(frozen=True)
class SamplingRequest:
    """The options of `mirai-ds sample --num`; None means the run's value or a default."""

    source: Path
    num: int
    out: Path | None = None
    policy: Policy = "random"
    classes: str | None = None
    weights: Weights | None = None
    step: int | None = None
    recipe: str | None = None
    block_size: int | None = None
    cfg_scale: float | None = None
    cfg_interval: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    tokenizer: Path | None = None
    image_size: int | None = None
    image_size_eval: int | None = None
    precision: str | None = None
    batch: int | None = None
    compile: Switch = "auto"
    cuda_graphs: Switch = "auto"
    png: bool = False
    stall_timeout: float = 300.0


@dataclass(frozen=True)
class Drawing:
    """A request with everything it needs in memory.  gpt: weights by official key on CPU, as stored."""

    config: RunConfig
    gpt: dict[str, Tensor]
    decoder: TokenDecoder
    rules: SamplingRules
    speed: Speed
    dtype: torch.dtype
    classes: list[int]
    batch: int
    size: int
    out: Path
    protocol: dict[str, Any]
    in_any_company: bool  # whether an image is the same in every batch
    meaning: Meaning | None = None  # of the labels

    @property
    def settings(self) -> dict[str, str]:
        """The protocol as text, value by value: what a later start must share to go on."""
        return {name: json.dumps(value) for name, value in self.protocol.items()}


def prepare(request: SamplingRequest, device: torch.device) -> Drawing:
    """Load and check; raises UserError.  The same on every rank but for the device's number."""
    given = None if request.tokenizer is None else open_tokenizer(request.tokenizer, str(device))
    loaded = load_weights(
        request.source, request.weights, request.step, request.recipe, _tokens_an_image(request, given)
    )
    config = loaded.config
    decoder = given or _decoder_of_the_source(loaded, device)
    check_vocabulary(decoder, config, given is not None)
    decoded = config.model.grid * decoder.downsampling
    if request.image_size not in (None, decoded):
        raise UserError(
            f"--image-size {request.image_size}: the model's {config.model.block_size} tokens decode to {decoded}; "
            "leave it out (--image-size-eval is the size of the images in the file)"
        )
    rules, speed = _rules(request, config), _speed(request, config, device)
    classes = list(range(config.model.num_classes))
    if request.classes is not None:
        classes = chosen_classes(request.classes, config)
    _check_balance(request, classes)
    precision = request.precision or ("bf16" if device.type == "cuda" else "fp32")
    batch = request.batch or BATCH.get(device.type, BATCH["cpu"])
    size = request.image_size_eval or decoded
    protocol = {
        "checkpoint_step": loaded.step if request.source.is_dir() else None, "weights": loaded.kind,
        "weights_digest": weights_digest(loaded.gpt), "model": config.model.model_dump(mode="json"),
        "num": request.num, "policy": request.policy, "classes": _short(classes), "seed": request.seed,
        "cfg_scale": rules.cfg_scale, "cfg_interval": rules.cfg_interval, "temperature": rules.temperature,
        "top_k": rules.top_k, "top_p": rules.top_p, "image_size": decoded, "image_size_eval": size,
        "tokenizer": getattr(decoder, "name", type(decoder).__name__), "tokenizer_digest": decoder.digest,
        "precision": precision, "decoder_precision": "fp32", "batch": batch, "compile": speed.compile,
        "cuda_graphs": speed.graphs, "png": request.png,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "torch": torch.__version__, "mirai_ds": __version__,
    }  # fmt: skip
    out = request.out or _default_out(request, config, protocol)
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: must end in .npz")
    dtype = PRECISIONS[precision]
    alone = device.type == "cpu" and precision == "fp32" and not speed.compile
    meaning = meaning_of(loaded)
    return Drawing(
        config, loaded.gpt, decoder, rules, speed, dtype, classes, batch, size, out, protocol, alone, meaning
    )


def _tokens_an_image(request: SamplingRequest, tokenizer: TokenDecoder | None) -> int | None:
    """Of a weights file whose shapes do not tell: by the image's size where both are known; None: nobody says."""
    if request.block_size is not None:
        return request.block_size
    if request.image_size is None or tokenizer is None:
        return None
    side = request.image_size / tokenizer.downsampling
    if side != int(side):
        raise UserError(
            f"--image-size {request.image_size}: must be a multiple of {tokenizer.downsampling}, pixels a token"
        )
    return int(side) ** 2


def _decoder_of_the_source(loaded: LoadedWeights, device: torch.device) -> TokenDecoder:
    if loaded.codebook is not None:
        return open_tokenizer(loaded.codebook, str(device))
    if loaded.data is None:
        raise UserError(f"--num: {NO_DATA}")
    try:
        decoder = load_decoder(loaded.data, str(device))
    except UserError as error:
        raise UserError(f"{error}; or give --tokenizer FILE") from None
    if decoder is None:
        raise UserError("--num: the data has no codebook to show tokens with; give --tokenizer FILE")
    return decoder


def _rules(request: SamplingRequest, config: RunConfig) -> SamplingRules:
    names = ("cfg_scale", "cfg_interval", "temperature", "top_k", "top_p")
    given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    rules = replace(rules_of(config.sampling), **given)
    check_rules(rules)
    return rules


def _speed(request: SamplingRequest, config: RunConfig, device: torch.device) -> Speed:
    on_gpu = device.type == "cuda"
    if not token_order(config.model.grid, config.model.par_tokens).one_by_one:
        for option, value in (("--compile", request.compile), ("--cuda-graphs", request.cuda_graphs)):
            if value == "on":
                raise UserError(
                    f"{option} on: this model (PAR) makes many tokens a step, which is not compiled; leave it out"
                )
        return Speed()
    if request.cuda_graphs == "on" and not on_gpu:
        raise UserError("--cuda-graphs on: there is no CUDA device here; leave it out")
    decide = {"auto": on_gpu, "on": True, "off": False}
    return Speed(decide[request.compile], decide[request.cuda_graphs])


def _check_balance(request: SamplingRequest, classes: list[int]) -> None:
    count = len(classes)
    if request.policy == "balanced" and request.num % count:
        near = request.num // count * count
        instead = f"{near} or {near + count}" if near else str(count)
        raise UserError(f"--num {request.num}: --policy balanced gives each of {count} classes as many; use {instead}")


def _short(classes: list[int]) -> list[int] | str:
    """Shortens labels 0..n-1, which need no list of a thousand numbers."""
    return f"0..{len(classes) - 1}" if classes == list(range(len(classes))) else classes


def _default_out(request: SamplingRequest, config: RunConfig, protocol: dict[str, Any]) -> Path:
    """In a run's samples/, else in ./samples, under a name that says the protocol, as LlamaGen's sampler does."""
    p = protocol
    if request.source.is_dir() and not is_model_folder(request.source):
        folder, name = request.source / "samples", f"{config.name}-step-{p['checkpoint_step']:08d}-{p['weights']}"
    else:
        folder, name = Path("samples"), request.source.stem
    parts = [name, f"size-{p['image_size']}-size-{p['image_size_eval']}", f"topk-{p['top_k']}", f"topp-{p['top_p']}",
             f"temperature-{p['temperature']}", f"cfg-{p['cfg_scale']}", f"seed-{p['seed']}"]  # fmt: skip
    if p["cfg_interval"] >= 0:
        parts.insert(-1, f"interval-{p['cfg_interval']}")
    parts += [f"{p['policy']}-{p['num']}"]
    return folder / ("-".join(parts) + ".npz")


def bytes_needed(drawing: Drawing, num: int) -> int:
    """On the disk while the archive is put together: every image in its part and in the archive."""
    return 2 * num * (drawing.size**2 * 3 + 2 * drawing.config.model.block_size) + math.ceil(num / 100) * 1024
