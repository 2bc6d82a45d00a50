"""What the ranks run: small engines on toy data, results as plain NumPy."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mirai_ds.config import RunConfig, build
from mirai_ds.config.deepspeed_file import resolve
from mirai_ds.data import Batch, BatchLoader, DataOrder, TokenSource
from mirai_ds.engine.engine import TrainEngine
from mirai_ds.engine.recompute import block_runner
from mirai_ds.foresight import MiraiObjective
from mirai_ds.model import initialise

SGD_LR = 2.0**14  # a power of two: (before - after) / lr is the applied gradient, exactly scaled
ENCODER_DIM = 24


def toy_config(
    method: str = "mirai-e", stage: int = 2, precision: str = "fp32", accumulation: int = 1, micro: int | None = None,
    recompute: dict[str, Any] | None = None, dropout: float = 0.1, **sections: Any,
) -> RunConfig:
    """A 3-block GPT on 4x4 grids; global batch 12."""
    foresight: dict[str, Any] = {"method": method}
    if method != "none":
        foresight |= {"projector_dim": 16, "warmup_epochs": 0.0, "num_heads": 3, "convention": "official"}
        foresight |= sections.pop("foresight", {})
    data = {
        "model": {
            "size": "custom", "dim": 32, "n_layer": 3, "n_head": 2, "vocab_size": 20, "num_classes": 5, "block_size": 16,
            "ffn_multiple_of": 32, "token_dropout": dropout, "resid_dropout": dropout, "ffn_dropout": dropout,
            "class_dropout": dropout,
        },
        "foresight": foresight,
        "optimizer": {"lr": 1e-2, "grad_clip": 0.0, **sections.pop("optimizer", {})},
        "train": {
            "epochs": 100, "global_batch_size": 12, "precision": precision, "grad_accum_steps": accumulation,
            "micro_batch_size": micro, "recompute": recompute or {},
        },
        "ema": {"decay": 0.9},
        "deepspeed": {
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 40}
        },
        **sections,
    }  # fmt: skip
    return build(data)


def toy_source(samples: int = 120) -> TokenSource:
    """Random codes, labels and (for the encoder's stand-in) images."""
    rng = np.random.default_rng(0)
    return TokenSource(rng.integers(0, 20, (samples, 1, 16)), rng.integers(0, 5, samples))


def toy_objective(config: RunConfig, output_scale: float = 0.05) -> MiraiObjective:
    """Initialised, with an output matrix that is not zero (else the trunk would have no gradient from the logits)."""
    width = ENCODER_DIM if config.foresight.method == "mirai-i" else None
    objective = MiraiObjective(config.model, config.foresight, width)
    initialise(objective, config.seed)
    with torch.no_grad():
        objective.gpt.output.weight.normal_(0, output_scale, generator=torch.Generator().manual_seed(5))
    return objective


def toy_engine(config: RunConfig, optimizer_factory: Any = None) -> TrainEngine:
    """An engine on this rank's CPU."""
    ds_config = resolve(config, dist.get_world_size())
    return TrainEngine(toy_objective(config), config, ds_config, torch.device("cpu"), optimizer_factory)


def toy_loader(config: RunConfig, rank: int, world: int, accumulation: int) -> BatchLoader:
    """The loader of one rank."""
    source = toy_source()
    order = DataOrder(len(source), config.train.global_batch_size, config.seed)
    micro = config.train.global_batch_size // (world * accumulation)
    return BatchLoader(source, order, micro, rank, world, torch.device("cpu"), images=False)


def fixed_target(config: RunConfig, batch: Batch, step: int) -> torch.Tensor | None:
    """A stand-in for any teacher: features that are a function of the samples."""
    if not config.foresight.active:
        return None
    rows = config.model.block_size + (1 if config.foresight.teacher_sees_last_token else 0)
    width = config.model.width if config.foresight.method == "mirai-e" else ENCODER_DIM
    table = torch.randn(20, width, generator=torch.Generator().manual_seed(9 + step))
    features = table[batch.tokens]
    return torch.cat([features, features[:, :1]], dim=1)[:, :rows] if rows > 16 else features


def release(engine: TrainEngine) -> None:
    """Destroy an engine so that the next case starts clean."""
    engine.destroy()
    gc.collect()


def reference_gradients(config: RunConfig, steps: int, world: int, accumulation: int, active: bool) -> dict[str, Any]:
    """Autograd's mean over all micro-batches of the global batch, in one process, activations kept."""
    objective = toy_objective(config)
    total: dict[str, torch.Tensor] = {}
    for rank in range(world):
        for batch in toy_loader(config, rank, world, accumulation).micro_batches(steps):
            target = fixed_target(config, batch, steps) if active else None
            loss, _ = objective(batch.tokens, batch.labels, batch.keys, target, 1.0)
            objective.zero_grad()
            loss.backward()
            for name, p in objective.named_parameters():
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                total[name] = total.get(name, torch.zeros_like(p)) + grad / (world * accumulation)
    return {name: grad.numpy() for name, grad in total.items()}


def gradient_case(
    method: str, stage: int, accumulation: int, recompute: dict[str, Any], precision: str = "fp32", active: bool = True
) -> float:
    """Largest error of any parameter's applied gradient, relative to that parameter's largest gradient."""
    config = toy_config(method, stage, precision, accumulation, recompute=recompute)
    world, rank = dist.get_world_size(), dist.get_rank()
    engine = toy_engine(config, lambda groups: torch.optim.SGD(groups, lr=SGD_LR))
    for group in engine.layout.base_optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = engine.gather_weights("raw", prefix="")
    for batch in toy_loader(config, rank, world, accumulation).micro_batches(0):
        target = fixed_target(config, batch, 0) if active else None
        loss, _ = engine.forward(batch.tokens, batch.labels, batch.keys, target, 1.0)
        engine.backward(loss)
        engine.step()
    after = engine.gather_weights("raw", prefix="")
    release(engine)
    expected = reference_gradients(config, 0, world, accumulation, active)
    worst = 0.0
    for name, want in expected.items():
        # w - lr * g rounds to an ulp of w + lr * g; lr is large, so g survives.
        got = ((before[name].double() - after[name].double()) / SGD_LR).numpy()
        scale = np.abs(want).max()
        error = np.abs(got - want).max()
        worst = max(worst, error / scale if scale > 0 else float(error > 0))
    return float(worst)


def uses_recompute(recompute: dict[str, Any]) -> bool:
    """Whether a policy really wraps blocks (so that the matrix does not test `none` four times)."""
    return block_runner(build({"train": {"recompute": recompute}}).train.recompute) is not None
