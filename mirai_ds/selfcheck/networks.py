"""Reference vectors of the networks that are trained: LlamaGen's GPT, PAR's, and Mirai's objective."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from mirai_ds.config import ForesightConfig, ModelConfig, UserError
from mirai_ds.config.errors import from_validation
from mirai_ds.foresight import EmaTeacher, MiraiObjective
from mirai_ds.model import GPT, next_token_loss
from mirai_ds.selfcheck.vectors import Reading, Vector, rule_tensor, weights

REFERENCE_NAMES = ("dim", "n_layer", "n_head", "vocab_size", "block_size", "num_classes")


def _model_config(vector: Vector) -> ModelConfig:
    given = vector.settings()
    fields = {name: vector.setting(name) for name in REFERENCE_NAMES}
    if vector.text("kind") == "par_gpt":
        fields["par_tokens"] = vector.setting("ar_token_num")
    for theirs, ours in (("norm_eps", "norm_eps"), ("rope_base", "rope_base"), ("multiple_of", "ffn_multiple_of")):
        if theirs in given:
            fields[ours] = given[theirs]
    try:
        config = ModelConfig(size="custom", **fields)
    except ValidationError as error:
        raise from_validation(error, ModelConfig, str(vector.path)) from None
    wanted = config.slots - config.block_size
    if "par_tokens" in fields and (config.par_tokens is None or given.get("spe_token_num", wanted) != wanted):
        wrong = f"`config` has ar_token_num = {fields['par_tokens']}, spe_token_num = {given.get('spe_token_num')}"
        raise vector.fail(f"{wrong}: the one must be a number, the other one less")
    return config


def _batch(vector: Vector, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """tokens (B, N) and labels (B,) int64."""
    tokens = vector.integers("tokens", 0, config.vocab_size - 1)
    labels = vector.integers("labels", 0, config.num_classes)
    if tokens.ndim != 2 or tokens.shape[1] != config.block_size or labels.shape != tokens.shape[:1]:
        shapes = f"`tokens` {tuple(tokens.shape)} and `labels` {tuple(labels.shape)}"
        raise vector.fail(f"{shapes} do not fit block_size = {config.block_size}")
    return tokens, labels


@torch.no_grad()
def _network_arrays(vector: Vector, gpt: GPT, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What the GPT alone gives: logits, logits_uncond and hidden_last at `keep`, hidden of every block, rope; all by
    slot, which for PAR's logits is the order of its sequence."""
    out = {"rope": gpt.rope}
    keep: Tensor | slice = slice(None)
    if "keep" in vector:
        keep = vector.integers("keep", 0, gpt.config.block_size - 1).flatten()
    if {"logits", "hidden", "hidden_last"} & vector.arrays.keys():
        result = gpt(tokens[:, :-1], labels, tap=tuple(range(1, gpt.config.depth + 1)))
        out["logits"] = gpt.order.to_sequence(result.logits)[:, keep]
        out["hidden"] = torch.stack([result.hidden[i + 1] for i in range(gpt.config.depth)])
        out["hidden_last"] = result.hidden[gpt.config.depth][:, keep]
    if "logits_uncond" in vector:
        nothing = torch.full_like(labels, gpt.config.num_classes)
        out["logits_uncond"] = gpt.order.to_sequence(gpt(tokens[:, :-1], nothing).logits)[:, keep]
    return out


def _gradient_arrays(vector: Vector, module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """`grad/*` and the global L2 norm over all parameters, where the file holds any."""
    if not any(name == "grad_norm" or name.startswith("grad/") for name in vector.arrays):
        return {}
    loss.backward()
    grads = {
        "grad/" + name.removeprefix("gpt."): torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters()
    }
    norm = torch.stack([grad.double().pow(2).sum() for grad in grads.values()]).sum().sqrt()
    return grads | {"grad_norm": norm}


def read_gpt(vector: Vector) -> Iterator[Reading]:
    """`llamagen_gpt` and `par_gpt`: the network, its loss and every gradient.  PAR's tokens are in sequence order."""
    config = _model_config(vector)
    tokens, labels = _batch(vector, config)
    gpt = GPT(config).eval()
    tokens = gpt.order.to_raster(tokens)
    gpt.load_state_dict(weights(vector, gpt.state_dict()))
    out = _network_arrays(vector, gpt, tokens, labels)
    if any(name in ("loss", "grad_norm") or name.startswith("grad/") for name in vector.arrays):
        loss = next_token_loss(gpt(tokens[:, :-1], labels).logits, tokens)
        out |= {"loss": loss.detach()} | _gradient_arrays(vector, gpt, loss)
    yield "", out


def _foresight_config(vector: Vector, model: ModelConfig, stride: int) -> ForesightConfig:
    """The authors' alignment rule with the file's heads; `stride` is the flat shift of one row down."""
    variant = vector.text("variant")
    if variant not in ("E", "I"):
        raise vector.fail(f"`variant` = {variant!r}; use 'E' or 'I'")
    coefficients = vector.need("coefficients")
    layer = vector.setting("encoder_depth")
    try:
        config = ForesightConfig(
            method="mirai-e" if variant == "E" else "mirai-i", convention="official", layer=layer,
            num_heads=vector.setting("num_heads"), weights=[float(c) for c in coefficients.flatten()],
            projector_dim=vector.setting("projector_dim"), flat_stride=None if stride == model.grid else stride,
        )  # fmt: skip
        config.fill_from_model(model)
    except ValidationError as error:
        raise from_validation(error, ForesightConfig, str(vector.path)) from None
    except UserError as error:
        raise vector.fail(str(error)) from None
    return config


def _teacher_features(
    vector: Vector, model: ModelConfig, foresight: ForesightConfig, batch: tuple[Tensor, Tensor]
) -> Tensor:
    """Variant I: given, (B, N, C).  Variant E: the EMA teacher with weights by `teacher_seed`."""
    if foresight.teacher == "encoder":
        given = vector.need("teacher_features")
        if given.ndim != 3 or given.shape[:2] != tuple(batch[0].shape) or given.dtype.kind != "f":
            raise vector.fail(f"`teacher_features` is {given.dtype} {given.shape}, not {(*batch[0].shape, 'C')} floats")
        return torch.from_numpy(given.astype(np.float32))
    teacher = EmaTeacher(model, foresight, torch.float32, torch.device("cpu"), autocast=False)
    seed = vector.number("teacher_seed")
    teacher.load((name, rule_tensor(name, p.shape, seed)) for name, p in teacher.trunk.named_parameters())
    return teacher.features(*batch, None)


def read_mirai(vector: Vector) -> Iterator[Reading]:
    """`mirai_objective`: the authors' objective, variant E or I.

    Their flat shifts are written for a 16 grid.  On another grid a file may mean one grid row or, literally, 16; unless
    its `config` has `flat_stride`, both are tried and the result says which one it is.
    """
    model = _model_config(vector)
    batch = _batch(vector, model)
    given = vector.settings().get("flat_stride")
    strides = dict.fromkeys([model.grid, 16] if given is None else [given])
    for stride in strides:
        foresight = _foresight_config(vector, model, stride)
        target = _teacher_features(vector, model, foresight, batch)
        width = vector.setting("z_dims")
        if not isinstance(width, list) or width != [target.shape[-1]]:
            raise vector.fail(f"`config` has z_dims = {width}, the teacher's features are {target.shape[-1]} wide")
        try:
            objective = MiraiObjective(model, foresight, target.shape[-1]).eval()
        except UserError as error:
            raise vector.fail(str(error)) from None
        names = {name.removeprefix("gpt."): value for name, value in objective.state_dict().items()}
        state = weights(vector, names)
        objective.load_state_dict({name: state[name.removeprefix("gpt.")] for name in objective.state_dict()})
        total, metrics = objective(*batch, None, target, 1.0)
        out = {"ntp_loss": metrics["ntp"], "head_losses": -metrics["cosine"], "total_loss": total.detach()}
        out |= _gradient_arrays(vector, objective, total) | _network_arrays(vector, objective.gpt, *batch)
        if foresight.teacher == "gpt":
            out["teacher_features"] = target
        yield (f"one row down = flat shift {stride}" if len(strides) > 1 else ""), out


_COMMON = {"kind", "config", "seed", "tokens", "labels", "keep"}


def gpt_inputs(vector: Vector) -> set[str]:
    """Names of the arrays of a `llamagen_gpt` or `par_gpt` file that are only inputs."""
    return _COMMON | {name for name in vector.arrays if name.startswith("state/")}


def mirai_inputs(vector: Vector) -> set[str]:
    """Names of the arrays of a `mirai_objective` file that are only inputs."""
    given = {"teacher_features"} if vector.text("variant") == "I" else set()
    return gpt_inputs(vector) | {"teacher_seed", "variant", "coefficients"} | given
