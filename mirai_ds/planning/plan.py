"""What a recipe will need on a cluster: memory, time, disk, traffic; `mirai-ds plan`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from mirai_ds.checkpoint.format import FP32_COPIES
from mirai_ds.config import RunConfig, UserError, load
from mirai_ds.config.data_config import SOURCES
from mirai_ds.config.deepspeed_file import resolve
from mirai_ds.config.schedule import total_steps
from mirai_ds.planning.activations import ActivationMemory
from mirai_ds.planning.cluster import ClusterShape, Compute, StepTime, step_time
from mirai_ds.planning.collectives import collectives
from mirai_ds.planning.costs import encoder_shape
from mirai_ds.planning.devices import GIB, MARGIN, Allowance, Device, find_device, fits, needed
from mirai_ds.planning.flops import recomputed_flops, training_parts
from mirai_ds.planning.memory import Memory, as_dict, predict, refreshed_bytes, variant
from mirai_ds.planning.outlook import assumptions, scaling_rows, sent_rows
from mirai_ds.planning.speed import Utilisation, utilisation
from mirai_ds.planning.states import StateMemory

IMAGENET = 1_281_167
DAY = 86400
MFU_SPREAD = 0.2  # the range of step times is at (1 - this) and (1 + this) times the MFU
POLICIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {"policy": "none"}), ("every-n 2", {"policy": "every-n", "every": 2}), ("mlp", {"policy": "mlp"}),
    ("full", {"policy": "full"}),
)  # fmt: skip


@dataclass(frozen=True)
class PlanRequest:
    """What the user asks for."""

    recipe: str
    nodes: int
    gpus: int
    device: str
    deepspeed: str | None = None
    micro_batch: int | None = None
    mfu: float | None = None  # None: what was measured there, else an assumption
    images: int | None = None
    overrides: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Choice:
    """The largest micro batch that fits a stage with a recompute policy; 0: none does."""

    stage: int
    policy: str
    micro: int
    needed: float


@dataclass(frozen=True)
class TrainingPlan:
    """What a plan says; sizes are in bytes, times in seconds."""

    request: PlanRequest
    config: RunConfig
    device: Device
    work: ActivationMemory
    states: StateMemory
    memory: Memory
    choices: list[Choice]
    suggestion: Choice | None
    flops: dict[str, float]  # a rank's, of an aligned step
    recomputed: float
    sent: list[dict[str, Any]]  # `scaling.outlook.sent_rows`
    utilisation: Utilisation
    time: tuple[StepTime, StepTime, StepTime] | None  # at the higher, at the lower, at the MFU itself
    plain_share: float  # of steps before alignment starts
    steps: int
    steps_per_epoch: int
    checkpoint: float
    kept: int
    scaling: list[dict[str, float]]  # the global batch grows with the ranks
    same_batch: list[dict[str, float]]  # it does not

    @property
    def allowance(self) -> Allowance:
        """Device memory that is set aside beside tensors."""
        return Allowance.of(self.device, self.request.world)

    @property
    def needed(self) -> float:
        """Bytes of device memory that the configuration needs."""
        return needed(self.memory.peak.total, self.allowance)

    @property
    def fits(self) -> bool:
        """Whether the configuration fits the device."""
        return fits(self.memory.peak.total, self.device, self.request.world)

    @property
    def cluster(self) -> ClusterShape:
        """The machines that it runs on."""
        return ClusterShape(self.device, self.request.nodes, self.request.gpus)

    def run_seconds(self) -> tuple[float, float] | None:
        """All steps: fastest with all communication hidden, slowest with none; saves and evaluation left out."""
        if self.time is None:
            return None
        aligned, plain = sum(self.flops.values()), self.flops["gpt forward"] + self.flops["gpt backward"]
        extra = self.recomputed
        factor = 1 - self.plain_share * (1 - (plain + extra) / (aligned + extra))
        fast, slow, _ = self.time
        return (
            self.steps * max(fast.compute * factor, fast.communication),
            self.steps * (slow.compute * factor + slow.communication),
        )


def make_plan(request: PlanRequest, other_choices: bool = True) -> TrainingPlan:
    """Raises UserError for an unknown device or recipe and whatever the configuration refuses.  other_choices: find
    what fits on every stage too."""
    device = find_device(request.device)
    if request.mfu is not None and not 0 < request.mfu <= 1:
        raise UserError(f"--mfu {request.mfu:g}: must be in (0, 1], e.g. 0.45")
    config = configured(request)
    world = request.world
    ds_config = resolve(config, world)
    memory = predict(config, world, device=device.kind)
    vit = encoder_shape(config.foresight, config.model)
    work = ActivationMemory(
        config.model, config.foresight, vit.width if vit else config.model.width, config.train.precision,
        ds_config["train_micro_batch_size_per_gpu"], config.train.recompute,
        chunked=config.train.cross_entropy == "chunked", device=device.kind,
    )  # fmt: skip
    states = StateMemory.of(work, ds_config, world)
    batch = config.train.global_batch_size
    images = batch // world
    parts = training_parts(config.model, config.foresight, work.feature_dim, config.foresight.active, vit)
    flops = {name: images * value for name, value in parts.items()}
    recomputed = images * recomputed_flops(config.model, work.recomputed_blocks())
    recomputed += flops["heads forward"] if work.heads_again else 0.0
    cluster, teacher = ClusterShape(device, request.nodes, request.gpus), refreshed_bytes(config)
    seconds = _seconds(device, work, flops, recomputed)
    sent = collectives(states, teacher)
    offloads = any(states.offloaded(what) for what in ("offload_param", "offload_optimizer"))
    captured = config.train.cuda_graph == "auto" and states.stage < 3 and not offloads
    used = utilisation(device, config, work.micro, request.mfu, captured)
    times = scaling = same = None
    if device.peak(work.precision):
        fast, slow, likely = (
            step_time(cluster, sent, seconds(used.mfu * factor, 1.0, states.accumulation))
            for factor in (1 + MFU_SPREAD, 1 - MFU_SPREAD, 1.0)
        )
        times = fast, slow, likely
        scaling, same = (
            scaling_rows(cluster, states, teacher, partial(seconds, used.mfu), batch, grows) for grows in (True, False)
        )
    per_epoch = max(1, _training_images(request, config) // config.train.global_batch_size)
    steps = total_steps(config.train, per_epoch)
    foresight = config.foresight  # heads that learn alone at the end of warm-up cost what aligned steps do
    asleep = (foresight.warmup_epochs or 0.0) - foresight.head_warmup_epochs
    warmup = asleep * per_epoch if foresight.active else 0.0
    choices = _choices(request, config, device) if other_choices else []
    return TrainingPlan(
        request, config, device, work, states, memory, choices, suggest(choices), flops, recomputed,
        sent_rows(cluster, sent), used, times, min(1.0, warmup / steps), steps, per_epoch,
        4.0 * FP32_COPIES * work.parameters, _kept(config, steps), scaling or [], same or [],
    )  # fmt: skip


def configured(request: PlanRequest) -> RunConfig:
    """The recipe with the request's DeepSpeed file, overrides and micro batch; raises UserError."""
    overrides = list(request.overrides)
    if request.micro_batch is not None:
        overrides += [f"train.micro_batch_size={request.micro_batch}", "train.grad_accum_steps=null"]
    return load(request.recipe, overrides, request.deepspeed)


def _seconds(
    device: Device, work: ActivationMemory, flops: dict[str, float], recomputed: float
) -> Callable[[float, float, int], Compute]:
    """Of (MFU, share of the images of a step, micro-batches): the step's matrix products."""
    before = sum(value for name, value in flops.items() if name in ("teacher forward", "encoder forward"))
    back = sum(value for name, value in flops.items() if name.endswith("backward")) + recomputed
    forth = sum(flops.values()) + recomputed - before - back

    def at(mfu: float, share: float, rounds: int) -> Compute:
        each = share / (min(1.0, mfu) * device.peak(work.precision))
        return Compute(before * each, forth * each, back * each, work.model.depth + 2, rounds)

    return at


def _training_images(request: PlanRequest, config: RunConfig) -> int:
    if request.images is not None:
        return request.images
    traits = SOURCES.get(config.data.source)
    whole = (traits.images if traits else None) or IMAGENET
    return round(whole * (1 - (config.data.held_out_fraction or 0.0)))


def _kept(config: RunConfig, steps: int) -> int:
    """Checkpoints on disk at once, the one being written included."""
    c = config.checkpoint
    kept = {step for step in c.keep_steps if step <= steps}
    if c.keep_every_steps and c.every_steps:
        kept |= {step for step in range(c.every_steps, steps + 1, c.every_steps) if step % c.keep_every_steps == 0}
    return c.keep_last + c.keep_best + len(kept) + 1 if c.every_steps or c.keep_steps or c.at_end else 0


# --- what fits ------------------------------------------------------------------------------------------------------


def _choices(request: PlanRequest, config: RunConfig, device: Device) -> list[Choice]:
    """Every stage (with the recipe's own DeepSpeed file otherwise) and recompute policy."""
    per_rank = config.train.global_batch_size // request.world
    divisors = [d for d in range(per_rank, 0, -1) if per_rank % d == 0]
    choices = []
    for stage in range(4):
        if stage == 0 and config.train.precision == "bf16":
            continue  # refused: DeepSpeed steps once before training
        for name, policy in POLICIES:
            best = Choice(stage, name, 0, 0.0)
            for micro in divisors:
                peak = predict(variant(config, stage, policy, micro), request.world, device=device.kind).peak.total
                if fits(peak, device, request.world):
                    best = Choice(stage, name, micro, needed(peak, Allowance.of(device, request.world)))
                    break
            choices.append(best)
    return choices


def suggest(choices: list[Choice]) -> Choice | None:
    """Least recomputation first, then the largest micro batch, then the lowest stage, which communicates least."""
    order = {name: i for i, (name, _) in enumerate(POLICIES)}
    fitting = [choice for choice in choices if choice.micro]
    return min(fitting, key=lambda c: (order[c.policy], -c.micro, c.stage)) if fitting else None


def device_hours(plan: TrainingPlan) -> tuple[float, float]:
    """Hours of all ranks together, fastest and slowest; only where the plan has times."""
    fast, slow = plan.run_seconds() or (0.0, 0.0)
    return fast * plan.request.world / 3600, slow * plan.request.world / 3600


def day_jobs(plan: TrainingPlan) -> tuple[int, int]:
    """Jobs of 24 hours, one after the other, that the run takes, fastest and slowest."""
    fast, slow = plan.run_seconds() or (0.0, 0.0)
    return math.ceil(fast / DAY), math.ceil(slow / DAY)


# --- for programs -----------------------------------------------------------------------------------------------------


def plan_json(plan: TrainingPlan) -> dict[str, Any]:
    """Stable keys, JSON values."""
    r, seconds = plan.request, plan.run_seconds()
    return {
        "recipe": r.recipe, "nodes": r.nodes, "gpus": r.gpus, "device": plan.device.name, "world": r.world,
        "precision": plan.work.precision, "zero_stage": plan.states.stage, "micro_batch": plan.work.micro,
        "accumulation": plan.states.accumulation, "parameters": plan.work.parameters,
        "head_parameters": plan.work.head_parameters,
        "memory": as_dict(plan.memory) | {
            "needed_bytes": round(plan.needed), "device_bytes": round(plan.device.memory * GIB), "fits": plan.fits,
            "allowance_fixed_bytes": round(plan.allowance.fixed * GIB), "allowance_share": plan.allowance.share,
            "margin": MARGIN,
        },
        "choices": [vars(choice) for choice in plan.choices],
        "suggestion": vars(plan.suggestion) if plan.suggestion else None,
        "flops_a_rank": plan.flops | {"recomputed": plan.recomputed},
        "sent_bytes": {row["name"]: row["sent_bytes"] for row in plan.sent}, "communication": plan.sent,
        "bus_bytes_per_s": _finite(plan.cluster.bandwidth()),
        "mfu": plan.utilisation.mfu, "mfu_source": plan.utilisation.source, "mfu_spread": MFU_SPREAD,
        "step_seconds": [plan.time[0].overlapped, plan.time[1].exposed] if plan.time else None,
        "expected_step_seconds": plan.time[2].expected if plan.time else None,
        "steps": plan.steps, "steps_per_epoch": plan.steps_per_epoch,
        "days": [s / DAY for s in seconds] if seconds else None,
        "device_hours": list(device_hours(plan)) if seconds else None,
        "jobs_of_24_h": list(day_jobs(plan)) if seconds else None,
        "checkpoint_bytes": plan.checkpoint, "checkpoints_kept": plan.kept, "scaling": plan.scaling,
        "scaling_same_batch": plan.same_batch,
        "assumptions": assumptions(plan.cluster, plan.utilisation.mfu) if plan.time else [],
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if 0 < value < float("inf") else None
