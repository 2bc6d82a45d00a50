"""What the ranks run for `test_wire.py`: steps whose collectives are counted as torch.distributed dispatches them, and
steps under the shipped DeepSpeed files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mirai_ds.config import RunConfig, build
from mirai_ds.engine import sharded_ema
from mirai_ds.planning.activations import ActivationMemory
from mirai_ds.planning.collectives import collectives
from mirai_ds.planning.memory import refreshed_bytes
from mirai_ds.planning.states import StateMemory
from tests.engine.cases import fixed_target, release, resolve, toy_config, toy_engine, toy_loader

NAMES = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter",
         "reduce_": "reduce"}  # fmt: skip
SMALL = 8  # elements: norms, flags and counters of the run's agreement


def tensors_in(value: Any) -> list[Tensor]:
    """Those of an operator's arguments."""
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (list, tuple)) else []


class Wire(TorchDispatchMode):
    """Adds up the bytes of every collective: whole buffers, by (kind, ranks of the group)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[tuple[str, int], float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [t.numel() * t.element_size() for t in tensors_in(args)]
            if max(t.numel() for t in tensors_in(args)) > SMALL:
                kind = NAMES.get(func._schema.name.split("::")[1], func._schema.name)
                ranks = round(max(sizes) / min(sizes)) if len(sizes) == 2 else dist.get_world_size()
                self.bytes[kind, ranks] = self.bytes.get((kind, ranks), 0.0) + max(sizes)
        return func(*args, **(kwargs or {}))


@contextmanager
def gathers_as_on_gpus() -> Iterator[None]:
    """Meanwhile DeepSpeed's own gather of weights, and that of the average with it: on CPUs both are broadcasts."""
    from deepspeed.runtime import bf16_optimizer, utils
    from deepspeed.runtime.zero import stage_1_and_2

    def gather(parts: list[Tensor], group: Any) -> None:
        rank = dist.get_rank(group)
        dist.all_gather_into_tensor(torch.empty(len(parts) * parts[rank].numel(), dtype=parts[rank].dtype), parts[rank])

    places: list[tuple[Any, str, Any]] = [
        (bf16_optimizer, "all_gather_dp_groups", utils.all_gather_dp_groups),
        (stage_1_and_2, "all_gather_dp_groups", utils.all_gather_dp_groups), (sharded_ema, "gather_parts", gather),
    ]  # fmt: skip
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(mock.patch.object(*place))
        yield


def counted_case(
    stage: int, precision: str, accumulation: int, zero: dict[str, Any], batch: int = 12
) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], float]]:
    """(bytes counted, bytes predicted) of the third step of a run, its teacher's refresh included, as (kind, ranks):
    bytes of the whole buffers."""
    config = toy_config("mirai-e", stage, precision, accumulation, optimizer={"grad_clip": 1.0})
    config.train.global_batch_size = batch
    config.deepspeed["zero_optimization"] |= zero  # type: ignore[index]
    engine = toy_engine(config)
    world = dist.get_world_size()
    names = {p.name for s in engine.layout.shards for p in s.parameters if p.name.startswith(teacher_prefixes(config))}
    for step in range(3):
        engine.set_rates(1e-3, heads_active=True)
        with gathers_as_on_gpus(), Wire() as wire:
            list(engine.gather_named("ema", torch.float32, names))
            for micro in toy_loader(config, dist.get_rank(), world, accumulation).micro_batches(step):
                loss, _ = engine.forward(micro.tokens, micro.labels, micro.keys, fixed_target(config, micro, step), 1.0)
                engine.backward(loss)
                engine.step()
    release(engine)
    work = ActivationMemory(
        config.model, config.foresight, config.model.width, precision, batch // world // accumulation
    )
    predicted: dict[tuple[str, int], float] = {}
    teacher = refreshed_bytes(config) * (2 if precision == "bf16" else 1)  # gathered in fp32 above
    for c in collectives(StateMemory.of(work, resolve(config, world), world), teacher):
        predicted[c.kind, c.ranks] = predicted.get((c.kind, c.ranks), 0.0) + c.size
    return wire.bytes, predicted


def teacher_prefixes(config: RunConfig) -> tuple[str, ...]:
    """Of the parameters that the teacher reads."""
    tables = ("gpt.cls_embedding.", "gpt.tok_embeddings.")
    return (*tables, *(f"gpt.layers.{i}." for i in range(config.foresight.teacher_layer or 0)))


def file_case(name: str) -> list[float]:
    """Losses of this rank over two steps under a shipped file, dropout and a stand-in for the teacher included."""
    data = toy_config("mirai-e", 2, "fp32").model_dump(mode="json")
    config = build({**data, "deepspeed": name})
    engine = toy_engine(config)
    losses = []
    for step in range(2):
        engine.set_rates(1e-2, heads_active=True)
        for micro in toy_loader(config, dist.get_rank(), dist.get_world_size(), 1).micro_batches(step):
            loss, _ = engine.forward(micro.tokens, micro.labels, micro.keys, fixed_target(config, micro, step), 1.0)
            engine.backward(loss)
            engine.step()
        losses.append(float(loss.detach()))
    final = engine.gather_weights("raw", prefix="")
    release(engine)
    return [*losses, float(sum(w.double().abs().sum() for w in final.values()))]
