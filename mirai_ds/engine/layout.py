"""Where DeepSpeed keeps the fp32 master weights.  Only this file, `update.py` and `gloo.py` touch its private parts.

Every layout is described the same way, as flat shards made of pieces of named parameters, so that EMA, checkpoints and
gathers know nothing of ZeRO stages.  `StateLayout.of` asserts that what it found really are the model's weights and
names the DeepSpeed version when they are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Piece(NamedTuple):
    """`length` elements of flattened parameter `name` from `start`, at `local` in a shard's flat tensor."""

    name: str
    shape: tuple[int, ...]
    start: int
    local: int
    length: int


class Parameter(NamedTuple):
    """A whole parameter inside a shard: its offset in the shard's global flat order, or per-rank cut."""

    name: str
    shape: tuple[int, ...]
    offset: int
    per_rank: int  # elements of each rank's cut (ZeRO-3), 0 where the shard is one flat buffer


@dataclass
class Shard:
    """One flat fp32 master tensor of this rank and what every rank of its group holds."""

    master: Tensor
    parameters: list[Parameter]
    world: int
    rank: int
    group: Any = None

    def pieces(self, rank: int | None = None) -> Iterator[Piece]:
        """What `rank` (default: this one) holds."""
        rank = self.rank if rank is None else rank
        size = self.master.numel()
        for name, shape, offset, per_rank in self.parameters:
            numel = math.prod(shape)
            if per_rank:  # ZeRO-3 cuts each parameter into equal parts; what pads the last ones is nobody's
                start = rank * per_rank
                length = min(per_rank, numel - start)
                local = offset
            else:  # one buffer of all parameters, cut without regard to where they begin and end
                low, high = max(rank * size, offset), min((rank + 1) * size, offset + numel)
                start, length, local = low - offset, high - low, low - rank * size
            if length > 0:
                yield Piece(name, shape, start, local, length)


class StateLayout:
    """All shards of an engine, and the optimizer that steps them."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.base_optimizer: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        self.kind = type(self.optimizer).__name__
        names = {parameter: name for name, parameter in engine.module.named_parameters()}
        try:
            self.shards = list(_find_shards(self.kind, self.optimizer, names))
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise unexpected(self.kind, f"{type(error).__name__}: {error}") from error
        self._assert_masters_are_the_weights()

    @property
    def masters(self) -> list[Tensor]:
        """This rank's flat fp32 master tensors (re-read each time: offloading may swap their storage)."""
        return [shard.master.detach() for shard in self.shards]

    def moments(self, key: str) -> list[Tensor]:
        """AdamW's `exp_avg` or `exp_avg_sq` (zeros before the first step), shard by shard."""
        moments = []
        for shard in self.shards:
            state = self.base_optimizer.state[shard.master]
            if key not in state:
                state[key] = torch.zeros_like(shard.master.data)
                state.setdefault("step", torch.zeros((), dtype=torch.float32, device=shard.master.device))
            moments.append(state[key])
        return moments

    def steps(self) -> list[Tensor]:
        """AdamW's step counters, one tensor a shard."""
        # AdamW makes its state only where there is none at all: with a step counter but no moments it would fail.
        self.moments("exp_avg"), self.moments("exp_avg_sq")
        return [self.base_optimizer.state[shard.master]["step"] for shard in self.shards]

    @torch.no_grad()
    def restart_adam(self, prefix: str) -> None:
        """Forget the AdamW state of shards whose parameters start with `prefix`, as if they were new.

        ZeRO gives parameters without gradient a zero one, so their step counter runs during warm-up.  Plain PyTorch
        skips them; after this call the first real gradient meets the same bias correction.
        """
        for shard, step, m, v in zip(
            self.shards, self.steps(), self.moments("exp_avg"), self.moments("exp_avg_sq"), strict=True
        ):
            if all(p.name.startswith(prefix) for p in shard.parameters):
                for tensor in (step, m, v):
                    tensor.zero_()

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        """Make the model's (low-precision, possibly partitioned) parameters follow changed masters."""
        z = self.optimizer
        if self.kind == "DeepSpeedZeroOptimizer_Stage3":
            for flat, master, cuts in zip(
                z.fp16_partitioned_groups_flat, z.fp32_partitioned_groups_flat, z.fp16_partitioned_groups, strict=True
            ):
                flat.data.copy_(master.data)
                for cut, new in zip(cuts, z.unflatten(flat, cuts), strict=True):
                    cut.data = new.data
            z.invalidate_secondary_tensor()  # hpZ: the backward pass would read each node's copy of the old weights
            # Small parameters stay whole on every rank and are not gathered in the forward pass, so these copies would
            # stay old; they are gathered only when they are partitioned, hence `partition` first.
            if len(z.persistent_parameters) > 0:
                z.persistent_parameters[0].partition(z.persistent_parameters)
                z.persistent_parameters[0].all_gather(z.persistent_parameters)
        elif hasattr(z, "update_lp_params"):
            z.update_lp_params()

    def _assert_masters_are_the_weights(self) -> None:
        """Each piece of each master must equal the model's own weight there, and all must be covered.

        Called before the first update: until then low-precision weights are their masters, rounded.
        """
        parameters = dict(self.engine.module.named_parameters())
        held: dict[str, int] = {}
        for shard in self.shards:
            for piece in shard.pieces():
                parameter = parameters[piece.name]
                if self.kind == "DeepSpeedZeroOptimizer_Stage3":
                    own = parameter.ds_tensor.data.flatten()[: piece.length]
                else:
                    own = parameter.data.flatten()[piece.start : piece.start + piece.length]
                master = shard.master.detach().flatten()[piece.local : piece.local + piece.length]
                if not torch.equal(master.to(own.device, own.dtype), own):
                    raise unexpected(self.kind, f"the master weights of {piece.name} are not where they should be")
            for rank in range(shard.world):  # what the others hold follows from the layout: nobody is asked
                for piece in shard.pieces(rank):
                    held[piece.name] = held.get(piece.name, 0) + piece.length
        for name, parameter in parameters.items():
            numel = math.prod(getattr(parameter, "ds_shape", parameter.shape))
            if held.get(name) != numel:
                raise unexpected(self.kind, f"{name} has {numel} elements, the shards hold {held.get(name)}")


def release_memory(engine: Any) -> None:
    """Drop what keeps a destroyed engine's device memory alive.

    Seen in DeepSpeed 0.19.8.  For as long as the process: stage 3's list of modules that each engine is entered into
    and never taken out of, nor is a module whose recomputation torch ends early; and the cache of a method, which holds
    the method's object.  Until Python has collected its garbage twice: in bf16 each parameter has methods bound
    to itself as attributes, a circle that the first collection cannot break, since autograd's nodes hold it too.
    """
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    stack: list[Any] = parameter_offload.FWD_MODULE_STACK
    own = set(engine.module.modules())
    stack[:] = [module for module in stack if module not in own]
    for parameter in engine.module.parameters():
        attributes = vars(parameter)
        for name in [name for name, value in attributes.items() if getattr(value, "__self__", None) is parameter]:
            del attributes[name]
    for method in vars(partitioned_param_coordinator.PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def join_instead_of_waiting(engine: Any) -> None:
    """On a GPU, stages 1 and 2 with `overlap_comm` end a backward pass with the host waiting for the whole device.
    What follows reads the gradients on the current stream: that one waits for the reduction's, and the host for none.

    With an optimizer on the host the wait stays: its gradients are read there.  Seen in DeepSpeed 0.19.8; raises
    RuntimeError where the optimizer has no such end of a backward pass.
    """
    from deepspeed.accelerator import get_accelerator

    z, accelerator = engine.optimizer, get_accelerator()
    stream = getattr(z, "reduction_stream", None)
    if type(z).__name__ != "DeepSpeedZeroOptimizer" or stream is None or not z.overlap_comm or z.cpu_offload:
        return
    epilogue = getattr(z, "independent_gradient_partition_epilogue", None)
    if epilogue is None:
        raise unexpected(type(z).__name__, "it has no independent_gradient_partition_epilogue")

    def joined() -> None:
        accelerator.synchronize = lambda *_: join(accelerator.current_stream(), stream)  # hides the class's
        try:
            epilogue()
        finally:
            del accelerator.synchronize

    z.independent_gradient_partition_epilogue = joined


def join(stream: Any, other: Any) -> None:
    """What is launched on `stream` from here on comes after all that `other` has been given so far."""
    stream.wait_stream(other)


def unexpected(kind: str, detail: str) -> RuntimeError:
    """That DeepSpeed's class `kind` is not what this package was written for."""
    import deepspeed

    return RuntimeError(
        f"DeepSpeed {deepspeed.__version__}: {kind} is not as expected ({detail}); this version is not supported"
    )


def _flat(
    master: Tensor, group: list[Tensor], offsets: list[int] | None, names: dict[Any, str], process_group: Any
) -> Shard:
    if offsets is None:
        offsets = [0]
        for parameter in group:
            offsets.append(offsets[-1] + parameter.numel())
    parts = [Parameter(names[p], tuple(p.shape), o, 0) for p, o in zip(group, offsets, strict=False)]
    return Shard(master, parts, dist.get_world_size(process_group), dist.get_rank(process_group), process_group)


def _find_shards(kind: str, z: Any, names: dict[Any, str]) -> Iterator[Shard]:
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        for i, group in enumerate(z.fp16_groups):
            local, parts = 0, []
            for p in group:
                parts.append(Parameter(names[p], tuple(p.ds_shape), local, p.partition_numel()))
                local += p.partition_numel()
            process_group = z.dp_process_group
            yield Shard(
                z.fp32_partitioned_groups_flat[i], parts, dist.get_world_size(process_group),
                dist.get_rank(process_group), process_group,
            )  # fmt: skip
    elif kind == "DeepSpeedZeroOptimizer":
        # The order in the flat buffer; `bit16_groups` is the user's, which `round_robin_gradients` departs from.
        for i, group in enumerate(z.round_robin_bit16_groups):
            yield _flat(
                z.single_partition_of_fp32_groups[i], group, z.round_robin_bit16_offsets[i], names,
                z.real_dp_process_group[i],
            )  # fmt: skip
    elif kind == "BF16_Optimizer":
        for i, group in enumerate(z.bf16_groups):
            yield _flat(z.fp32_groups_flat_partition[i], group, None, names, z.real_dp_process_group[i])
    elif isinstance(z, torch.optim.Optimizer):  # stage 0: plain data parallel, everything on every rank
        for group in z.param_groups:
            for p in group["params"]:
                yield Shard(p, [Parameter(names[p], tuple(p.shape), 0, 0)], 1, 0)
    else:
        raise AttributeError(f"no layout known for {kind}")
