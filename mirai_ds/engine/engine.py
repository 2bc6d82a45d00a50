"""The training engine: an objective under DeepSpeed, with its fp32 masters, EMA and parameter groups in our hands."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mirai_ds.config import RunConfig, UserError, Weights
from mirai_ds.engine.compiled import compile_blocks, wanted
from mirai_ds.engine.layout import StateLayout, join_instead_of_waiting, release_memory
from mirai_ds.engine.recompute import block_runner, recompute_halves
from mirai_ds.engine.sharded_ema import ShardedEma, gather
from mirai_ds.engine.start import forget_earlier_engines, quiet
from mirai_ds.engine.update import Update
from mirai_ds.foresight import MiraiObjective
from mirai_ds.model import initial_value

HEADS = "projectors."


def parameter_groups(objective: MiraiObjective, config: RunConfig) -> list[dict[str, Any]]:
    """Groups by who reads them (teacher's blocks, rest of the GPT, heads) and by weight decay (dim >= 2 only).

    The teacher's blocks are apart so that only their shards travel when the teacher is refreshed; the heads are apart
    because neither gradient nor decay may touch them during warm-up.  A frozen teacher is never refreshed.
    """
    f = config.foresight
    last = f.teacher_layer or 0 if f.teacher_weights is None else 0
    tables = ("gpt.cls_embedding.", "gpt.tok_embeddings.", "gpt.spe_tok_embeddings.")
    prefixes = (*tables, *(f"gpt.layers.{i}." for i in range(last)))
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        owner = "heads" if name.startswith(HEADS) else "teacher" if last and name.startswith(prefixes) else "gpt"
        groups.setdefault((owner, parameter.dim() >= 2), []).append(parameter)
    decay = config.optimizer.weight_decay
    return [
        {"params": parameters, "owner": owner, "weight_decay": wd, "decay": wd}
        for (owner, decayed), parameters in groups.items()
        for wd in [decay if decayed else 0.0]
    ]


class TrainEngine:
    """Gradients, steps, masters and averages of one objective.  `backward` once a micro-batch, then `step`."""

    def __init__(
        self,
        objective: MiraiObjective,
        config: RunConfig,
        ds_config: dict[str, Any],
        device: torch.device,
        optimizer_factory: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    ) -> None:
        import deepspeed

        self.config, self.device = config, device
        self.stage: int = ds_config["zero_optimization"]["stage"]
        objective.gpt.run_block = block_runner(config.train.recompute)
        objective.recompute_heads = config.train.recompute.policy != "none"
        objective.chunked_loss = config.train.cross_entropy == "chunked"
        measured = config.logging.diagnostics and config.foresight.active
        self.tap_gradients = objective.measure() if measured else None
        recompute_halves(objective.gpt.layers, config.train.recompute)
        self.compiled = wanted(config.train, device)
        if self.compiled:
            compile_blocks(objective.gpt.layers, config.train.recompute)
        forget_earlier_engines()
        groups = parameter_groups(objective, config)
        make = optimizer_factory or self._adamw
        self.ds = _initialize(deepspeed, objective, make(groups), ds_config)
        self.layout = StateLayout(self.ds)
        join_instead_of_waiting(self.ds)
        self._write_initial_masters()
        self.ema = ShardedEma(self.layout, config.ema.decay)
        self.update = Update(self.ds, self.stage, self.layout.base_optimizer, device)
        self._rates = self._rates_on_the_device()
        self._rates_there = (0.0, 0.0)  # what they are, so that a constant rate is not copied in every step

    def _rates_on_the_device(self) -> Tensor | None:
        """(2,) float32: the learning rates of all groups but the heads', and the heads'; None where AdamW keeps them on
        the host.  A captured step reads them at each replay, and a plain one computes the same bits."""
        if self.device.type != "cuda" or self.stage == 3 or self.update.offloaded:
            return None
        self.layout.steps()  # moments before any activation, lest they lie scattered among what a capture gives back
        rates = torch.zeros(2, device=self.device)
        for group in self.layout.base_optimizer.param_groups:
            group["lr"], group["capturable"] = rates[int(group["owner"] == "heads")], True
        return rates

    def _adamw(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        o = self.config.optimizer
        return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)

    def _write_initial_masters(self) -> None:
        """Give the masters the fp32 initial weights: DeepSpeed made them from the model's, already rounded to bf16."""
        model, seed = self.config.model, self.config.seed
        if self.config.train.precision == "bf16":
            self._write_masters(
                lambda name, shape: initial_value(name.removeprefix("gpt."), shape, seed, model.init_std)
            )

    @torch.no_grad()
    def _write_masters(self, value_of: Callable[[str, tuple[int, ...]], Tensor | None]) -> None:
        for shard in self.layout.shards:
            for piece in shard.pieces():
                value = value_of(piece.name, piece.shape)
                if value is not None:
                    part = shard.master.data.flatten()[piece.local : piece.local + piece.length]
                    part.copy_(value.flatten()[piece.start : piece.start + piece.length])
        self.layout.refresh_parameters()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Start from foreign weights (GPT keys, and `projectors.*` where there are any): fp32 masters, EMA a copy."""
        self._write_masters(lambda name, shape: weights.get(name.removeprefix("gpt.")))
        self.ema.reset()

    def forward(self, *arguments: Any, **named: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """`MiraiObjective.forward` under the engine's hooks and precision."""
        out: tuple[Tensor, dict[str, Tensor]] = self.ds(*arguments, **named)
        return out

    def backward(self, loss: Tensor) -> None:
        """Once a micro-batch, of the total loss (two calls are wrong on ZeRO-1 and 2)."""
        self.ds.backward(loss)

    def step(self) -> Tensor | None:
        """After every `backward`.  At the accumulation boundary: the gradients' norm before clipping, () on the device;
        None between boundaries.  Non-finite gradients are never applied, nor is any update after them until
        `confirm_updates`."""
        if not self.ds.is_gradient_accumulation_boundary():
            self.ds.step()
            return None
        self.update.step()
        self.ema.update(self.update.refusing)
        return self.update.norm

    def confirm_updates(self) -> int:
        """How many of the last updates were not made, from the first whose gradients were not finite on; 0: all were.
        Reads from the device; the next updates are made again.  The same on every rank."""
        return self.update.confirm_updates()

    def set_rates(self, lr: float, heads_active: bool) -> None:
        """Learning rate of the coming step.  Inactive heads get neither rate nor decay."""
        for group in self.layout.base_optimizer.param_groups:
            asleep = group["owner"] == "heads" and not heads_active
            if self._rates is None:
                group["lr"] = 0.0 if asleep else lr
            group["weight_decay"] = 0.0 if asleep else group["decay"]
        rates = (lr, lr if heads_active else 0.0)
        if self._rates is not None and rates != self._rates_there:
            self._rates.copy_(torch.tensor(rates).pin_memory(), non_blocking=True)
            self._rates_there = rates

    def wake_heads(self) -> None:
        """Before the first aligned step after a warm-up: AdamW starts anew for the heads, as in plain PyTorch for
        parameters that never had a gradient."""
        self.layout.restart_adam(HEADS)

    def gather_named(self, kind: Weights, dtype: torch.dtype, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) of `raw` masters or the `ema`, for these full names, on every rank."""
        values = self.ema.values if kind == "ema" else self.layout.masters
        return gather(self.layout.shards, values, dtype, self.device, names)

    def gather_weights(self, kind: Weights, prefix: str = "gpt.") -> dict[str, Tensor]:
        """fp32 copies of all tensors whose names start with `prefix`, without it, on every rank."""
        names = {p.name for s in self.layout.shards for p in s.parameters if p.name.startswith(prefix)}
        return {n.removeprefix(prefix): t.clone() for n, t in self.gather_named(kind, torch.float32, names)}

    def count_replayed(self, step: int) -> None:
        """The device has made 0-based step `step` by a replay; DeepSpeed, the average and the refusals count it."""
        self.resume_counters(step + 1)
        self.update.count_replayed()
        self.ema.version += 1

    def resume_counters(self, step: int) -> None:
        """Tell DeepSpeed how many steps are behind it."""
        self.ds.global_steps, self.ds.micro_steps = step, step * self.ds.gradient_accumulation_steps()
        self.ds.global_samples = step * self.config.train.global_batch_size

    def destroy(self) -> None:
        """Release hooks and buffers, so that another engine can live in this process."""
        self.ds.destroy()
        release_memory(self.ds)


class AverageOf:
    """An engine's average of the GPT, as teachers take it (`foresight.teachers.Average`)."""

    def __init__(self, engine: TrainEngine) -> None:
        self._engine = engine

    @property
    def version(self) -> int:
        """Changes with every update."""
        return self._engine.ema.version

    def gather(self, names: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Collective: (name, whole tensor) of these GPT keys."""
        whole = self._engine.gather_named("ema", dtype, {f"gpt.{name}" for name in names})
        return ((name.removeprefix("gpt."), tensor) for name, tensor in whole)


def _initialize(
    deepspeed: Any, objective: MiraiObjective, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any]
) -> Any:
    from pydantic import ValidationError

    talk = contextlib.redirect_stdout(io.StringIO()) if quiet() else contextlib.nullcontext()
    try:
        with talk:  # some of DeepSpeed's memory reports cannot be switched off
            engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=ds_config)
    except ValidationError as error:  # a value of a wrong type in the user's file
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"deepspeed file: {field} = {first.get('input')!r}: {first['msg']}") from None
    if dist.get_world_size() != engine.dp_world_size:
        raise UserError(f"{dist.get_world_size()} ranks but DeepSpeed sees {engine.dp_world_size} data-parallel ones")
    return engine
