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
from mirai_ds.engine.compiled import compile_blocks
from mirai_ds.engine.engine import TrainEngine
from mirai_ds.foresight import EmaTeacher, MiraiObjective
from mirai_ds.model import initialise

SGD_LR = 2.0**14  # a power of two: (before - after) / lr is the applied gradient, exactly scaled
ENCODER_DIM = 24
HEAD_SCALE = 0.3


def toy_config(
    method: str = "mirai-e",
    stage: int = 2,
    precision: str = "fp32",
    accumulation: int = 1,
    micro: int | None = None,
    recompute: dict[str, Any] | None = None,
    dropout: float = 0.1,
    par_tokens: int | None = None,
    **sections: Any,
) -> RunConfig:
    """A 3-block GPT (or PAR) on 4x4 grids; global batch 12.  method: `mirai-e+transformer` takes another head than the
    MLP."""
    method, _, head = method.partition("+")
    foresight: dict[str, Any] = {"method": method, **({"head": head} if head else {})}
    if method != "none":
        foresight |= {"projector_dim": 16, "warmup_epochs": 0.0, "num_heads": 3, "convention": "official"}
        foresight |= sections.pop("foresight", {})
    data = {
        "model": {
            "size": "custom", "dim": 32, "n_layer": 3, "n_head": 2, "vocab_size": 20, "num_classes": 5,
            "block_size": 16, "par_tokens": par_tokens,
            "ffn_multiple_of": 32, "token_dropout": dropout, "resid_dropout": dropout, "ffn_dropout": dropout,
            "class_dropout": dropout,
        },
        "foresight": foresight,
        "optimizer": {"lr": 1e-2, "grad_clip": 0.0, **sections.pop("optimizer", {})},
        "train": {
            "epochs": 100, "global_batch_size": 12, "precision": precision, "grad_accum_steps": accumulation,
            "micro_batch_size": micro, "recompute": recompute or {}, **sections.pop("train", {}),
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


def toy_objective(config: RunConfig, head_scale: float = 0.02) -> MiraiObjective:
    """Initialised, with an output matrix that is not zero (else the trunk would have no gradient from the logits).

    Heads of scale 0.02 project this narrow model to tiny vectors, whose cosine is ill-conditioned: tests of gradients
    take a larger `head_scale`.
    """
    width = ENCODER_DIM if config.foresight.method == "mirai-i" else None
    objective = MiraiObjective(config.model, config.foresight, width)
    initialise(objective, config.seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        objective.gpt.output.weight.normal_(0, 0.05, generator=generator)
        for p in objective.projectors.parameters():
            p.normal_(0, head_scale, generator=generator)
    return objective


def toy_engine(config: RunConfig, optimizer_factory: Any = None, head_scale: float = 0.02) -> TrainEngine:
    """An engine on this rank's CPU."""
    ds_config = resolve(config, dist.get_world_size())
    objective = toy_objective(config, head_scale)
    weights = {name.removeprefix("gpt."): p.detach().clone() for name, p in objective.named_parameters()}
    engine = TrainEngine(objective, config, ds_config, torch.device("cpu"), optimizer_factory)
    engine.load_weights(weights)  # fp32 masters, also where the model itself is bf16
    return engine


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
    if config.foresight.method == "mtp":
        return batch.tokens
    rows = config.model.slots + (1 if config.foresight.teacher_sees_last_token else 0)
    width = config.model.width if config.foresight.method == "mirai-e" else ENCODER_DIM
    table = torch.randn(20, width, generator=torch.Generator().manual_seed(9 + step))
    features = table[batch.tokens]
    return torch.cat([features, features], dim=1)[:, :rows] if config.foresight.method == "mirai-e" else features


def release(engine: TrainEngine) -> None:
    """Destroy an engine so that the next case starts clean."""
    engine.destroy()
    gc.collect()


def reference_gradients(config: RunConfig, steps: int, world: int, accumulation: int, active: bool) -> dict[str, Any]:
    """Autograd's mean over all micro-batches of the global batch, in one process, activations kept, summed in fp32."""
    objective = toy_objective(config, HEAD_SCALE)
    if config.train.precision == "bf16":
        # A chunked loss rounds the output matrix's gradient elsewhere: the same here, to see how gradients are summed.
        objective.chunked_loss = config.train.cross_entropy == "chunked"
        for p in objective.parameters():  # parameters only, as DeepSpeed does: buffers stay fp32
            p.data = p.data.bfloat16()
    total: dict[str, torch.Tensor] = {}
    for rank in range(world):
        for batch in toy_loader(config, rank, world, accumulation).micro_batches(steps):
            target = fixed_target(config, batch, steps) if active else None
            loss, _ = objective(batch.tokens, batch.labels, batch.keys, target, 1.0)
            objective.zero_grad()
            loss.backward()
            for name, p in objective.named_parameters():
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                total[name] = total.get(name, torch.zeros(p.shape)) + grad.float() / (world * accumulation)
    return {name: grad.numpy() for name, grad in total.items()}


def gradient_case(
    method: str,
    stage: int,
    accumulation: int,
    recompute: dict[str, Any],
    precision: str = "fp32",
    active: bool = True,
    compare_step: int = 0,
    par_tokens: int | None = None,
) -> float:
    """Largest error of any parameter's applied gradient, relative to that parameter's largest gradient."""
    config = toy_config(method, stage, precision, accumulation, recompute=recompute, par_tokens=par_tokens)
    world, rank = dist.get_world_size(), dist.get_rank()
    engine = toy_engine(config, lambda groups: torch.optim.SGD(groups, lr=SGD_LR, fused=True), HEAD_SCALE)
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
    expected = reference_gradients(config, compare_step, world, accumulation, active)
    worst = 0.0
    for name, want in expected.items():
        # w - lr * g rounds to an ulp of w + lr * g; lr is large, so g survives.
        got = ((before[name].double() - after[name].double()) / SGD_LR).numpy()
        scale = np.abs(want).max()
        error = np.abs(got - want).max()
        worst = max(worst, error / scale if scale > 0 else float(error > 0))
    return float(worst)


def losses_case(
    method: str,
    stage: int,
    accumulation: int = 1,
    recompute: dict[str, Any] | None = None,
    precision: str = "fp32",
    steps: int = 20,
    convention: str = "official",
    par_tokens: int | None = None,
    train: dict[str, Any] | None = None,
) -> list[float]:
    """Global-batch losses of `steps` AdamW steps with dropout, the real EMA teacher and clipping."""
    foresight = {"convention": convention} if method != "none" else {}
    config = toy_config(
        method, stage, precision, accumulation, recompute=recompute, foresight=foresight, par_tokens=par_tokens,
        optimizer={"lr": 3e-3, "grad_clip": 0.5, "eps": 1e-6}, train=train or {},
    )  # fmt: skip
    engine = toy_engine(config)
    teacher = EmaTeacher(config.model, config.foresight, torch.float32, torch.device("cpu"), False) \
        if method == "mirai-e" else None  # fmt: skip
    if teacher is not None and config.train.compile == "blocks":
        compile_blocks(teacher.trunk.layers)
    loader = toy_loader(config, dist.get_rank(), dist.get_world_size(), accumulation)
    losses = []
    for step in range(steps):
        engine.set_rates(config.optimizer.lr, heads_active=True)
        if teacher is not None:
            names = {f"gpt.{name}" for name in teacher.names}
            teacher.load((n.removeprefix("gpt."), t) for n, t in engine.gather_named("ema", torch.float32, names))
        total = torch.zeros((), dtype=torch.float64)
        for batch in loader.micro_batches(step):
            target = (
                teacher.features(batch.tokens, batch.labels, None) if teacher else fixed_target(config, batch, step)
            )
            loss, _ = engine.forward(batch.tokens, batch.labels, batch.keys, target, 1.0)
            engine.backward(loss)
            engine.step()
            total += loss.detach().double() / accumulation
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    release(engine)
    return losses


def plain_losses(method: str, steps: int = 20, par_tokens: int | None = None) -> list[float]:
    """The same run written out in plain PyTorch: one process, no engine, whole EMA, torch's clipping and AdamW."""
    config = toy_config(method, 0, par_tokens=par_tokens, optimizer={"lr": 3e-3, "grad_clip": 0.5, "eps": 1e-6})
    objective = toy_objective(config)
    o = config.optimizer
    groups = [
        {"params": [p for p in objective.parameters() if (p.dim() >= 2) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, o.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)
    ema = {name: p.detach().clone() for name, p in objective.gpt.named_parameters()}
    teacher = EmaTeacher(config.model, config.foresight, torch.float32, torch.device("cpu"), False) \
        if method == "mirai-e" else None  # fmt: skip
    losses = []
    for step in range(steps):
        (batch,) = toy_loader(config, 0, 1, 1).micro_batches(step)
        if teacher is not None:
            teacher.load((name, value) for name, value in ema.items() if name in teacher.names)
        target = teacher.features(batch.tokens, batch.labels, None) if teacher else fixed_target(config, batch, step)
        loss, _ = objective(batch.tokens, batch.labels, batch.keys, target, 1.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), o.grad_clip)
        optimizer.step()
        with torch.no_grad():
            for name, p in objective.gpt.named_parameters():
                ema[name].lerp_(p, 1.0 - config.ema.decay)
        losses.append(float(loss.detach()))
    return losses


def ema_case(stage: int, precision: str, steps: int = 6) -> dict[str, Any]:
    """Sharded EMA against an unsharded fp32 one that follows the gathered masters; and what a bf16 one would give."""
    config = toy_config("mirai-e", stage, precision, 2 if precision == "bf16" else 1)
    config.ema.decay = 0.9999
    accumulation = config.train.grad_accum_steps or 1
    engine = toy_engine(config)
    start = engine.gather_weights("raw", prefix="")
    whole = {name: value.clone() for name, value in start.items()}
    low = {name: value.bfloat16() for name, value in start.items()}
    at_start = engine.gather_weights("ema", prefix="")
    for step in range(steps):
        for batch in toy_loader(config, dist.get_rank(), dist.get_world_size(), accumulation).micro_batches(step):
            loss, _ = engine.forward(batch.tokens, batch.labels, batch.keys, fixed_target(config, batch, step), 1.0)
            engine.backward(loss)
            engine.step()
        masters = engine.gather_weights("raw", prefix="")
        for name, value in masters.items():
            whole[name] = torch.lerp(whole[name], value, 1.0 - config.ema.decay)
            low[name] = torch.lerp(low[name], value.bfloat16(), 1.0 - config.ema.decay)
    sharded = engine.gather_weights("ema", prefix="")
    wrong_at_start = [name for name, value in start.items() if not torch.equal(at_start[name], value)]
    differs = [name for name, value in whole.items() if not torch.equal(sharded[name], value)]
    bf16_differs = [name for name, value in whole.items() if not torch.equal(low[name].float(), value)]
    moved = sum(int((sharded[n] != start[n]).sum()) for n in start) / sum(v.numel() for v in start.values())
    checksum = float(sum(value.double().abs().sum() for value in sharded.values()))
    release(engine)
    return {
        "differs": differs, "wrong_at_start": wrong_at_start, "bf16_differs": len(bf16_differs), "tensors": len(whole),
        "moved": moved, "checksum": checksum,
    }  # fmt: skip


def initial_masters_case(stage: int, precision: str) -> list[str]:
    """Names whose fp32 master differs from the fp32 initial value (DeepSpeed alone would round it to bf16)."""
    config = toy_config("mirai-e", stage, precision)
    objective = MiraiObjective(config.model, config.foresight)
    initialise(objective, config.seed)
    wanted = {name: p.detach().clone() for name, p in objective.named_parameters()}
    engine = TrainEngine(objective, config, resolve(config, dist.get_world_size()), torch.device("cpu"))
    masters = engine.gather_weights("raw", prefix="")
    release(engine)
    return [name for name, value in wanted.items() if not torch.equal(masters[name], value)]


def warmup_case(
    stage: int, asleep: int = 3, awake: int = 3, wake: bool = True, decay: bool = False, precision: str = "fp32"
) -> dict[str, Any]:
    """Heads through `asleep` steps without alignment and `awake` with it, beside plain PyTorch that skips them; or
    (decay) that multiplies what they give by zero, as the authors' code does.

    A large eps keeps AdamW from blowing up the rounding of gradients near zero.
    """
    rates = {"lr": 1e-2, "grad_clip": 0.0, "weight_decay": 0.05, "eps": 1e-4}
    config = toy_config("mirai-e", stage, precision, optimizer=rates)
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = toy_engine(config, head_scale=HEAD_SCALE)
    before = engine.gather_weights("raw", prefix="projectors.")
    plain = toy_objective(config, HEAD_SCALE)
    groups = [
        {"params": [p for p in plain.parameters() if (p.dim() >= 2) == decayed], "weight_decay": wd}
        for decayed, wd in ((True, 0.05), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=config.optimizer.betas, eps=config.optimizer.eps)
    slept: list[str] = []
    for step in range(asleep + awake):
        aligned = step >= asleep
        engine.set_rates(1e-2, heads_active=aligned or decay)
        if step == asleep and wake and not decay:
            engine.wake_heads()
        (batch,) = toy_loader(config, rank, world, 1).micro_batches(step)
        target = fixed_target(config, batch, step) if aligned else None
        loss, _ = engine.forward(batch.tokens, batch.labels, batch.keys, target, 1.0)
        engine.backward(loss)
        engine.step()
        optimizer.zero_grad(set_to_none=True)
        for other in range(world):
            (share,) = toy_loader(config, other, world, 1).micro_batches(step)
            target = fixed_target(config, share, step) if aligned or decay else None
            (plain(share.tokens, share.labels, share.keys, target, float(aligned))[0] / world).backward()
        optimizer.step()
        if step == asleep - 1:
            after = engine.gather_weights("raw", prefix="projectors.")
            slept = [name for name, value in before.items() if not torch.equal(after[name], value)]
    final, worst = engine.gather_weights("raw", prefix="projectors."), 0.0
    for name, p in plain.projectors.named_parameters():
        moved = p.detach() - before[name]
        worst = max(worst, float((final[name] - p.detach()).norm() / moved.norm()))
    release(engine)
    return {"moved_while_asleep": slept, "error_against_plain": worst}


def nonfinite_case(stage: int, precision: str) -> dict[str, Any]:
    """One step with a NaN loss: nothing may change, on any rank."""
    config = toy_config("none", stage, precision)
    engine = toy_engine(config)
    (batch,) = toy_loader(config, dist.get_rank(), dist.get_world_size(), 1).micro_batches(0)
    engine.set_rates(1e-2, heads_active=False)
    before, ema = engine.gather_weights("raw", prefix=""), engine.gather_weights("ema", prefix="")
    loss, _ = engine.forward(batch.tokens, batch.labels, batch.keys)
    poison = float("nan") if dist.get_rank() == 0 else 1.0
    engine.backward(loss * poison)
    norm = engine.step()
    ahead, _ = engine.forward(batch.tokens, batch.labels, batch.keys)
    engine.backward(ahead)  # a finite one that was begun before anybody looked
    engine.step()
    missing = engine.confirm_updates()
    after, ema_after = engine.gather_weights("raw", prefix=""), engine.gather_weights("ema", prefix="")
    changed = [n for n in before if not torch.equal(before[n], after[n]) or not torch.equal(ema[n], ema_after[n])]
    loss, _ = engine.forward(batch.tokens, batch.labels, batch.keys)
    engine.backward(loss)
    engine.step()
    then_missing = engine.confirm_updates()
    then = engine.gather_weights("ema", prefix="")
    release(engine)
    return {
        "missing": missing,
        "norm_finite": bool(np.isfinite(norm)),
        "changed": changed,
        "then_missing": then_missing,
        "then_unchanged": [n for n in then if torch.equal(ema[n], then[n])],
    }


def faulty_memory_case() -> dict[str, Any]:
    """Stage 0: a gradient turns NaN on one rank after it was averaged; all ranks refuse."""
    engine = toy_engine(config := toy_config("none", 0, "fp32"))
    (batch,) = toy_loader(config, dist.get_rank(), dist.get_world_size(), 1).micro_batches(0)
    engine.set_rates(1e-2, heads_active=False)
    before = engine.gather_weights("raw", prefix="")
    loss, _ = engine.forward(batch.tokens, batch.labels, batch.keys)
    engine.backward(loss)
    if dist.get_rank() == 1:
        gradient = next(p.grad for p in engine.ds.module.parameters() if p.grad is not None)
        gradient.view(-1)[0] = float("nan")
    engine.step()
    missing, after = engine.confirm_updates(), engine.gather_weights("raw", prefix="")
    release(engine)
    return {"missing": missing, "changed": [n for n in before if not torch.equal(before[n], after[n])]}
