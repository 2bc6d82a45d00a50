"""A resolved configuration said in the paper's words, independently of the data that it is compared with."""

from __future__ import annotations

from typing import Any

from mirai_ds.config import RunConfig
from mirai_ds.config.encoder_config import ENCODERS
from mirai_ds.foresight import offsets

MODELS = {"GPT-B": "LlamaGen-B", "GPT-L": "LlamaGen-L", "GPT-XL": "LlamaGen-XL"}
TOKENS = {(0, 0): "current", (0, 1): "right", (1, 0): "below"}
ENCODER_NAMES = {
    "dinov2-b": "DINOv2-B", "dinov2-l": "DINOv2-L", "dinov3-b": "DINOv3-B", "mae-b": "MAE-B", "mae-l": "MAE-L"
}  # fmt: skip
PIXELS_A_TOKEN = 16  # VQ-16


def read_back(config: RunConfig) -> dict[str, Any]:
    """Every setting of which the paper says something, by the names of `mirai_ds.paper.published.Setting`."""
    model, optimizer, sampling = config.model, config.optimizer, config.sampling
    assert config.model.grid_size is not None
    values: dict[str, Any] = {
        "model": "PAR-B" if model.par_tokens else MODELS[model.size],
        "resolution": config.model.grid_size * PIXELS_A_TOKEN, "epochs": config.train.epochs,
        "batch_size": config.train.global_batch_size, "lr": optimizer.lr, "lr_schedule": optimizer.schedule,
        "betas": list(optimizer.betas), "weight_decay": optimizer.weight_decay, "grad_clip": optimizer.grad_clip,
        "token_dropout": model.token_dropout, "attention_dropout": model.resid_dropout,
        "ffn_dropout": model.ffn_dropout, "class_dropout": model.class_dropout, "ema_decay": config.ema.decay,
        "dtype": "bfloat16" if config.train.precision.startswith("bf16") else "float32",
        "cfg_scale": sampling.cfg_scale, "temperature": sampling.temperature, "top_k": sampling.top_k,
        "top_p": sampling.top_p, "method": _method(config),
    }  # fmt: skip
    if config.foresight.active:
        values |= _foresight(config)
    return values


def _method(config: RunConfig) -> str:
    named = {"none": "none", "mtp": "output", "mirai-e": "Mirai-E", "mirai-i": "Mirai-I"}[config.foresight.method]
    return f"{named} (Pretrained)" if config.foresight.teacher_weights else named


def _foresight(config: RunConfig) -> dict[str, Any]:
    f = config.foresight
    values: dict[str, Any] = {"layout": f.layout.upper(), "K": f.num_heads, "layer": f.layer}
    if f.predicts_tokens:
        return values
    cells = [(down, right) for down, right in offsets(f)]
    values["tokens"] = [TOKENS[cell] for cell in cells] if all(cell in TOKENS for cell in cells) else None
    values |= _lambda(config) | {"warmup_epochs": f.warmup_epochs}
    values["head"] = {"mlp": "MLP", "transformer": "transformer"}[f.head or ""]
    if f.teacher_layer != f.layer:
        values["teacher_layer"] = f.teacher_layer
    if f.encoder is not None:
        values["encoder"] = ENCODER_NAMES[f.encoder.name]
        assert f.encoder.timm_name == ENCODERS[f.encoder.name].timm_name
        values |= {"encoder_layer": f.encoder.layer, "block_causal": f.encoder.block_causal}
    return {name: value for name, value in values.items() if value is not None}


def _lambda(config: RunConfig) -> dict[str, Any]:
    schedule, weights = config.foresight.schedule, config.foresight.weights or []
    assert len(set(weights)) == 1, "one lambda for all heads"
    multipliers = {"const": [1.0], "step": schedule.multipliers, "cosine": [1.0, schedule.final]}[schedule.kind]
    assert schedule.start_epoch == 0
    assert multipliers is not None
    values = {"lambda": [weights[0] * m for m in multipliers], "schedule": schedule.kind}
    return values | ({"change_epochs": schedule.at_epochs} if schedule.kind == "step" else {})
