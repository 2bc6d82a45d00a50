"""True peak memory of a real training step, to check the plan against.

CPU: the bytes of all live tensor storages, counted from before the engine is built.  (The profiler's record of the CPU
allocator would miss what gloo's threads release.)  GPU: the caching allocator's own peak of allocated bytes.

    python -m mirai_ds.benchmarks.memory --ranks 2      compare with the plan, append to bench-memory.csv
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo import eval_frame
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mirai_ds.benchmarks.harness import append, command_line, new_parser, only_table
from mirai_ds.benchmarks.sessions import random_session
from mirai_ds.config import RunConfig, build
from mirai_ds.runtime import markdown
from mirai_ds.runtime.distributed import World, leave_process_group, local_device, read_world
from mirai_ds.runtime.launch import launch, visible_gpus
from mirai_ds.train.step import train_step

_COLLECTIVES = distributed_c10d.__file__
_WRAPPERS = (torch._compile.__file__, eval_frame.__file__)  # what waiting for a collective goes through
STEPS = 3  # AdamW's moments are there from the second on


@dataclass(frozen=True)
class MeasuredMemory:
    """Bytes on this rank: the peak within the last step, and what is there between steps."""

    peak: int
    resting: int


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all tensor storages that operators of this thread made while it is active, each until its
    last reference is gone, in whatever thread that happens.  Not seen: what an operator uses inside for itself, and the
    copies that gloo makes of what it is to send (NCCL makes none)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, note new storages."""
        out = func(*args, **(kwargs or {}))
        caller = sys._getframe(1)
        while caller.f_code.co_filename in _WRAPPERS and caller.f_back is not None:
            caller = caller.f_back
        if caller.f_code.co_filename == _COLLECTIVES:
            return out
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held or not size:
            return
        self._held[key] = (weakref.ref(storage, lambda _: self._forget(key)), size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._held.pop(key)[1]

    def restart(self) -> int:
        """Measures the peak from here on; returns the bytes in use now."""
        self.peak = self.live
        return self.live


def measure_step(config: RunConfig, world: World, device: torch.device) -> MeasuredMemory:
    """Collective: build the run on random codes, take `STEPS` steps.  The process group must exist.

    The configuration's data is replaced; a frozen teacher, and an encoder without a weights file, get random weights.
    One engine a call; it is destroyed.
    """
    if device.type == "cuda":
        return _work(config, world, device, _AllocatorOfGpu(device))
    with LiveStorages() as counter:
        return _work(config, world, device, counter)


class _AllocatorOfGpu:
    """The caching allocator's own counts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def peak(self) -> int:
        """The largest number of bytes since `restart`."""
        return torch.cuda.max_memory_allocated(self.device)

    def restart(self) -> int:
        """As `LiveStorages.restart`."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)


def worst(mine: MeasuredMemory) -> MeasuredMemory:
    """Collective: the rank with the highest peak.  On ZeRO-2 it is the one whose gradients come first."""
    everyone: list[MeasuredMemory] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return max(everyone, key=lambda one: one.peak)


def _work(
    config: RunConfig, world: World, device: torch.device, counter: LiveStorages | _AllocatorOfGpu
) -> MeasuredMemory:
    resting = 0
    with random_session(config, world, device, STEPS) as session:
        for step in range(STEPS):
            resting = counter.restart()
            train_step(session, step, plainly=True)  # a replay allocates nothing: what it needs is a plain step's
            session.count_step()
        peak = counter.peak
        del session
    gc.collect()
    return MeasuredMemory(peak, resting)


# --- against the plan -----------------------------------------------------------------------------------------------

MODULE = "mirai_ds.benchmarks.memory"
FIELDS = (
    "device", "ranks", "model", "method", "precision", "zero_stage", "recompute", "micro_batch", "accumulation",
    "measured_mb", "planned_mb", "error_percent", "at", "resting_measured_mb", "resting_planned_mb", "torch",
    "deepspeed", "command",
)  # fmt: skip
PRECISIONS, METHODS = ("fp32", "bf16", "bf16-autocast"), ("none", "mirai-e", "mirai-i")
WIDE = {"size": "custom", "dim": 128, "n_layer": 4, "n_head": 4, "num_classes": 10, "block_size": 64}  # 16,384 codes
RECOMPUTE = ({"policy": "none"}, {"policy": "every-n", "every": 2}, {"policy": "full"})


def case(
    method: str, precision: str, stage: int, recompute: dict[str, Any], micro: int, world: int, accumulation: int = 1,
    model: dict[str, Any] | None = None, head: str | None = None, par_tokens: int | None = None,
    teacher_weights: str | None = None, **zero: Any,
) -> RunConfig:  # fmt: skip
    """A run whose states and activations are both large; dropout on, heads from the first step."""
    foresight: dict[str, Any] = {"method": method}
    if method != "none":
        foresight |= {"warmup_epochs": 0, "projector_dim": 512, "head": head, "teacher_weights": teacher_weights}
    if method == "mirai-i":
        foresight["encoder"] = {"name": "test_vit"}
    small = {
        "size": "custom", "dim": 256, "n_layer": 6, "n_head": 4, "vocab_size": 2048, "num_classes": 10,
        "block_size": 64,
    }  # fmt: skip
    return build({
        "model": {**(model or small), "par_tokens": par_tokens}, "foresight": foresight,
        "train": {
            "global_batch_size": micro * accumulation * world, "micro_batch_size": micro, "precision": precision,
            "recompute": recompute,
        },
        "deepspeed": {"zero_optimization": {"stage": stage, **zero}},
    })  # fmt: skip


def covering(world: int) -> list[RunConfig]:
    """Every precision on every stage that takes it, each with two mixtures of the rest; accumulation; small buckets and
    overlap; a large vocabulary."""
    cases, number = [], 0
    for precision in PRECISIONS:
        for stage in range(4):
            if (precision, stage) == ("bf16", 0):
                continue
            for micro in (4, 16):
                cases.append(case(METHODS[number % 3], precision, stage, RECOMPUTE[(number // 2) % 3], micro, world))
                number += 1
    none = RECOMPUTE[0]
    cases += [case("none", precision, 2, none, 4, world, accumulation=2) for precision in PRECISIONS]
    cases += [case("mirai-e", "fp32", stage, none, 4, world, accumulation=2) for stage in (0, 1, 3)]
    cases.append(case("mirai-e", "bf16", 1, none, 4, world, accumulation=2))
    small: dict[str, Any] = {"reduce_bucket_size": 1_500_000}
    cases += [case("none", "bf16-autocast", s, none, 4, world, **small, overlap_comm=True) for s in (1, 2)]
    cases += [case("none", "bf16", s, none, 4, world, **small) for s in (2, 3)]
    return [*cases, case("mirai-e", "bf16-autocast", 2, none, 16, world, model=WIDE)]


def variants(world: int, micro: int = 8) -> list[RunConfig]:
    """What other objectives and PAR add: fp32 and bf16-autocast on stages 2 and 3, without and with recomputation; a
    frozen teacher; bf16; a large vocabulary."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("mtp", {}), ("mtp", {"head": "mlp"}), ("mirai-e", {"head": "transformer"}), ("mirai-e", {"par_tokens": 4}),
        ("mtp", {"par_tokens": 16}),
    ]  # fmt: skip
    none, _, full = RECOMPUTE
    cases = [
        case(method, precision, stage, recompute, micro, world, **kind)
        for method, kind in kinds for precision in ("fp32", "bf16-autocast") for stage in (2, 3)
        for recompute in (none, full)
    ]  # fmt: skip
    frozen: dict[str, Any] = {"teacher_weights": "random"}
    cases += [case("mirai-e", "fp32", stage, none, micro, world, **frozen) for stage in (2, 3)]
    cases += [case(method, "bf16", 2, none, micro, world, **kind) for method, kind in kinds]
    return cases + [case("mtp", "bf16-autocast", 2, recompute, 16, world, model=WIDE) for recompute in (none, full)]


def compare(config: RunConfig, world: World, device: torch.device) -> dict[str, Any]:
    """Collective: measured on the rank that needs most, and planned, as a row without its command."""
    from mirai_ds.kernels.foresight_cosine.op import choose
    from mirai_ds.planning.memory import predict
    from mirai_ds.runtime.environment import package_versions

    compiled = choose(config.foresight.kernel, device.type) != "reference"
    measured, memory = worst(measure_step(config, world, device)), predict(config, world.size, compiled, device.type)
    resting, versions, train = sum(memory.resting.values()), package_versions(), config.train
    micro = train.micro_batch_size or train.global_batch_size // world.size
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "ranks": world.size,
        "model": f"{config.model.width}x{config.model.depth}, {config.model.vocab_size} codes, "
        f"{config.model.block_size} tokens",
        "method": described(config), "precision": train.precision,
        "zero_stage": config.deepspeed["zero_optimization"]["stage"],  # type: ignore[index]
        "recompute": train.recompute.policy, "micro_batch": micro,
        "accumulation": train.global_batch_size // (micro * world.size),
        "measured_mb": round(measured.peak / 1e6, 2), "planned_mb": round(memory.peak.total / 1e6, 2),
        "error_percent": round(100 * (memory.peak.total / measured.peak - 1), 2), "at": memory.peak.name,
        "resting_measured_mb": round(measured.resting / 1e6, 2), "resting_planned_mb": round(resting / 1e6, 2),
        "torch": versions["torch"], "deepspeed": versions["deepspeed"],
    }  # fmt: skip


def described(config: RunConfig) -> str:
    """Describes the method and its settings that are not the default."""
    f, more = config.foresight, []
    if f.active and f.head != ("transformer" if f.predicts_tokens else "mlp"):
        more.append(f"{f.head} heads")
    more += ["frozen teacher"] if f.teacher_weights else []
    more += [f"PAR {config.model.par_tokens}"] if config.model.par_tokens else []
    return ", ".join([f.method, *more])


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table with one line per configuration."""
    header = "method | precision | stage | recompute | micro batch x accumulation, ranks | measured MB | plan MB"
    lines = (
        f"{r['method']} | {r['precision']} | {r['zero_stage']} | {r['recompute']} | {r['micro_batch']} x "
        f"{r['accumulation']}, {r['ranks']} | {r['measured_mb']} | {r['planned_mb']} | "
        f"{float(r['error_percent']):+.1f} %"
        for r in rows
    )
    return markdown.table(f"{header} | error", lines, "lllllrrr")


def main(argv: list[str] | None = None) -> int:
    """Launch ranks, measure every case, print and append the rows."""
    argv = sys.argv[1:] if argv is None else argv
    parser = new_parser("memory", __doc__)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--size", help="this LlamaGen size on 256 tokens instead of the small cases")
    parser.add_argument("--cases", default=":", metavar="FROM:TO", help="some of them, as in a Python slice")
    args = parser.parse_args(argv)
    if only_table(args, table, FIELDS):
        return 0
    world = read_world()
    if world is None:
        return launch(MODULE, argv, args.ranks or min(2, visible_gpus() or 2), visible_gpus())
    from mirai_ds.engine.start import start_process_group

    device = local_device(world)
    torch.set_num_threads(1)
    start_process_group(world, 10)
    shape = {"size": args.size} if args.size else None
    cases = [*covering(world.size), *variants(world.size)] if shape is None else [
        case(method, "bf16-autocast", 2, recompute, micro, world.size, model=shape)
        for method in ("none", "mirai-e") for recompute in (RECOMPUTE[0], RECOMPUTE[2]) for micro in (4, 16)
    ]  # fmt: skip
    for config in cases[slice(*(int(part) if part else None for part in args.cases.split(":")))]:
        row = compare(config, world, device) | {"command": command_line(f"python -m {MODULE}", argv, [args.out])}
        if world.rank == 0:
            print(json.dumps(row), flush=True)
            append(args.out, FIELDS, [row])
    leave_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
