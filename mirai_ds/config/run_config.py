"""The whole of a run as one strict schema; a resolved run is stored with every default written out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from mirai_ds.config.data_config import SOURCES, DataConfig
from mirai_ds.config.errors import OLD_HOOKS, ConfigError, nearest
from mirai_ds.config.eval_config import EvalConfig, Weights
from mirai_ds.config.foresight_config import ForesightConfig
from mirai_ds.config.model_config import ModelConfig, Section
from mirai_ds.config.own import check_name
from mirai_ds.config.yaml_text import number_in


class OptimizerConfig(Section):
    """AdamW; weight decay on tensors of two or more dimensions only (LlamaGen's groups)."""

    lr: float = Field(1e-4, gt=0, description="learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), strict=False, description="AdamW's")  # YAML has lists, not tuples
    eps: float = Field(1e-8, gt=0, description="AdamW's")
    weight_decay: float = Field(0.05, ge=0, description="of tensors with two or more dimensions")
    grad_clip: float = Field(1.0, ge=0, description="global norm; 0 turns clipping off")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="of the learning rate over all steps, after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises linearly from 0")
    final_lr: float = Field(0.0, ge=0, description="cosine: learning rate at the last step")

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("optimizer.betas", list(self.betas), "each must be at least 0 and less than 1")
        if self.final_lr > self.lr:
            raise ConfigError("optimizer.final_lr", self.final_lr, f"must be at most optimizer.lr = {self.lr}")
        if self.schedule == "constant" and self.final_lr:
            raise ConfigError("optimizer.final_lr", self.final_lr, "set optimizer.schedule: cosine, or remove it")
        return self


class RecomputeConfig(Section):
    """Activation checkpointing.  Dropout is a function of the sample, so every policy replays it exactly."""

    policy: Literal["none", "full", "every-n", "mlp", "budget"] = Field(
        "none", description="mlp: keep attention, recompute each feed-forward half; budget: see `budget`"
    )
    every: int = Field(2, ge=1, description="every-n: recompute blocks 0, n, 2n and so on")
    budget: float = Field(
        0.5,
        ge=0,
        le=1,
        description="budget: share of a compiled block's activations to keep, by what is dearest",
    )
    implementation: Literal["torch", "deepspeed"] = Field(
        "torch", description="whose activation checkpointing; deepspeed: its, for the two options below"
    )
    partition_activations: bool = Field(
        False, description="deepspeed: share checkpoints among the ranks of a model-parallel group"
    )
    cpu_checkpointing: bool = Field(False, description="deepspeed: keep checkpoints in host memory")

    @model_validator(mode="after")
    def _check(self) -> RecomputeConfig:
        for name in ("partition_activations", "cpu_checkpointing"):
            if getattr(self, name) and (self.implementation != "deepspeed" or self.policy == "none"):
                raise ConfigError(
                    f"train.recompute.{name}", True, "needs implementation: deepspeed and a policy other than none"
                )
        if self.policy in ("mlp", "budget") and self.implementation == "deepspeed":
            problem = f"recomputes whole blocks; with policy: {self.policy} leave it at torch"
            raise ConfigError("train.recompute.implementation", "deepspeed", problem)
        return self


class TrainConfig(Section):
    """Length, batch and numerics of the run."""

    epochs: float = Field(300, gt=0, description="length of the run, and of the schedules")
    max_steps: int | None = Field(None, ge=1, description="stop here even if the epochs are not done")
    global_batch_size: int = Field(256, ge=1, description="images a step, over all ranks and micro-batches")
    micro_batch_size: int | None = Field(None, ge=1, description="per rank; default global / world / accumulation")
    grad_accum_steps: int | None = Field(
        None, ge=1, description="micro-batches a step on each rank; default as many as the batch needs"
    )
    precision: Literal["fp32", "bf16", "bf16-autocast"] = Field(
        "bf16-autocast",
        description="bf16-autocast: fp32 weights, products in bf16, as LlamaGen; bf16: bf16 weights, fp32 masters",
    )
    recompute: RecomputeConfig = RecomputeConfig()
    compile: Literal["auto", "none", "blocks"] = Field(
        "auto", description="blocks: torch.compile of one block for all of them; auto: blocks on GPUs"
    )
    cuda_graph: Literal["auto", "off"] = Field(
        "auto", description="auto: on GPUs a whole step is captured as one CUDA graph, where that is possible"
    )
    cross_entropy: Literal["chunked", "whole"] = Field(
        "chunked", description="whole: all logits in memory, and in fp32"
    )
    init_from: str | None = Field(None, description="weights to start from: a LlamaGen file, an export or a run")
    deterministic: bool = Field(True, description="deterministic kernels where torch has them")

    def compiles_on(self, device: str) -> bool:
        """Whether blocks are compiled on a `cuda` or `cpu` device."""
        return self.compile == "blocks" or (self.compile == "auto" and device == "cuda")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.recompute.policy == "budget" and self.compile != "blocks":
            raise ConfigError("train.recompute.policy", "budget", "is the compiler's; set train.compile: blocks")
        for name in ("micro_batch_size", "grad_accum_steps"):
            value = getattr(self, name)
            if value is not None and self.global_batch_size % value:
                whole = self.global_batch_size
                good = max(d for d in range(1, min(value, whole) + 1) if whole % d == 0)
                problem = f"does not divide train.global_batch_size = {whole}; use e.g. {good}"
                raise ConfigError(f"train.{name}", value, problem)
        if self.micro_batch_size and self.grad_accum_steps:
            per_rank = self.micro_batch_size * self.grad_accum_steps
            if self.global_batch_size % per_rank:
                raise ConfigError(
                    "train.grad_accum_steps",
                    self.grad_accum_steps,
                    f"micro_batch_size * grad_accum_steps = {per_rank} does not divide global_batch_size = "
                    f"{self.global_batch_size}; leave one of them out",
                )
        return self


class EmaConfig(Section):
    """fp32 average of the fp32 master weights, sharded like the optimizer state; mirai-e's teacher."""

    decay: float = Field(0.9999, ge=0, lt=1, description="of the weights' average, a step")


FID = "eval.fid"  # as best_metric
FID_NAMES = ("quality/fid", "quality/frechet_distance")  # the latter with another network than Inception


class CheckpointConfig(Section):
    """When to save, how, and what to keep.  A checkpoint stays when any of the `keep_` rules wants it."""

    every_steps: int | None = Field(None, ge=1, description="save at every multiple; default at the end only")
    at_end: bool = Field(True, description="save after the last step")
    background: bool = Field(False, description="copy the state, write it while training goes on")
    on_failure: Literal["stop", "continue"] = Field("stop", description="when a checkpoint cannot be written")
    keep_last: int = Field(2, ge=1, description="newest checkpoints that stay")
    keep_every_steps: int | None = Field(None, ge=1, description="keep those of every so many steps for good")
    keep_steps: list[int] = Field([], description="save at these steps too, and keep those for good")
    keep_best: int = Field(0, ge=0, description="keep the ones with the lowest best_metric")
    best_metric: str = Field(
        "held_out/ntp_ema",
        description="held_out/ntp_ema or held_out/ntp_raw; eval.fid: its distance, then measured at every checkpoint",
    )

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after this step, the last one apart."""
        return step in self.keep_steps or (self.every_steps is not None and step % self.every_steps == 0)

    @property
    def judged_by_fid(self) -> bool:
        """Whether every checkpoint is judged by `eval.fid`."""
        return self.keep_best > 0 and self.best_metric == FID

    def score(self, measured: Mapping[str, float]) -> float | None:
        """What `best_metric` is at a checkpoint, given all that was measured at its step; None: not there, or not
        finite."""
        names = FID_NAMES if self.best_metric == FID else (self.best_metric,)
        value = next((measured[name] for name in names if name in measured), None)
        return value if value is not None and math.isfinite(value) else None

    @field_validator("keep_steps")
    @classmethod
    def _positive(cls, value: list[int]) -> list[int]:
        if any(step < 1 for step in value):
            raise ConfigError("checkpoint.keep_steps", value, "each must be at least 1")
        return value


class SpikeConfig(Section):
    """A step whose next-token loss lies far above the last ones: median + sigmas * 1.4826 * median deviation."""

    action: Literal["off", "warn", "stop", "rollback"] = Field(
        "off", description="rollback: to the last checkpoint, and on with the batches after the spike"
    )
    sigmas: float = Field(8.0, gt=0, description="how far above the median of the last steps a loss is a spike")
    window: int = Field(100, ge=10, description="steps that the loss is compared with; none is judged before")
    max_rollbacks: int = Field(3, ge=1, description="in the whole run; then it stops")


class GuardConfig(Section):
    """What ends a run, or saves it."""

    nonfinite_skips: int = Field(3, ge=0, description="steps in a row with NaN or infinity before the run stops")
    nonfinite_states: int = Field(1, ge=0, description="of such steps keep the whole state, of the others the report")
    spike: SpikeConfig = SpikeConfig()
    hang_seconds: float = Field(600, gt=0, description="without a step: stacks of all ranks, then an end")
    first_step_seconds: float = Field(
        3600, gt=0, description="as hang_seconds, for the first step of a process, which compiles and may be slow"
    )
    stop_deadline_seconds: float | None = Field(None, gt=0, description="after a signal, for the step and the save")
    max_restarts: int = Field(3, ge=1, description="--resume if-present: starts in a row that died without progress")
    preflight: bool = Field(True, description="check disk, data, ranks, devices and clocks before the first step")
    max_clock_skew_seconds: float = Field(60, gt=0, description="between nodes, beyond which the start is refused")


class LoggingConfig(Section):
    """Metrics leave the device only every `every_steps` steps."""

    every_steps: int = Field(100, ge=1, description="steps between two logged ones")
    progress: bool = Field(True, description="show a progress line on the terminal")
    diagnostics: bool = Field(
        False,
        description="beyond the paper: also log the gradients of both losses where they meet, the clipping factor and "
        "cosines less what all features share; changes no number of the training",
    )


class SamplingConfig(Section):
    """Sampling of image grids: LlamaGen's rules."""

    cfg_scale: float = Field(2.0, ge=0, description="classifier-free guidance; 1 and below: none")
    cfg_interval: int = Field(-1, ge=-1, description="guide decode steps 0..interval only; -1 = all")
    temperature: float = Field(1.0, ge=0, description="logits are divided by it; 0: the most likely token")
    top_k: int = Field(0, ge=0, description="draw among the k most likely tokens; 0 = off")
    top_p: float = Field(
        1.0, gt=0, le=1, description="draw among the likeliest tokens of this much probability; 1 = off"
    )
    weights: Weights = Field("ema", description="which weights draw")
    per_class: int = Field(8, ge=1, description="images of each class in a grid")
    classes: int = Field(10, ge=1, description="classes shown in a grid")
    every_steps: int | None = Field(None, ge=1, description="draw a grid at every multiple; default never")
    at_end: bool = Field(False, description="draw a grid after the last step")


class LaunchConfig(Section):
    """How `mirai-ds train` starts ranks on this machine: one a GPU, or `cpu_ranks` without any."""

    cpu_ranks: int = Field(1, ge=1, description="ranks that `mirai-ds train` starts where there is no GPU")
    timeout_minutes: float = Field(30, gt=0, description="of a collective; a dead rank is noticed after this")


HOOK_NAMES = ("log", "spike", "eval-loss", "sample", "eval-fid", "checkpoint", "stop", "report")
TRACKERS = ("tensorboard", "wandb", "csv")


class RunConfig(Section):
    """Everything a run needs to be repeated."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's name, and its folder's below output_dir"
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="of everything random: weights, order and views of the data, dropout"
    )
    output_dir: str = Field("runs", description="folder of run folders")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    foresight: ForesightConfig = ForesightConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    logging: LoggingConfig = LoggingConfig()
    eval: EvalConfig = EvalConfig()
    sampling: SamplingConfig = SamplingConfig()
    launch: LaunchConfig = LaunchConfig()
    hooks: list[str] = Field(
        list(HOOK_NAMES), description="what runs around a step, in this order; `package.module:Class` is your own"
    )
    tracking: list[str] = Field(
        ["tensorboard"],
        description="where values go beside metrics.jsonl: tensorboard, wandb, csv; `package.module:Class` is your own",
    )
    deepspeed: str | dict[str, Any] = Field(
        "zero2", description="a DeepSpeed file, the name of a shipped one, or its content as a section"
    )
    _deepspeed_file: dict[str, Any] | None = PrivateAttr(None)

    @property
    def deepspeed_file(self) -> dict[str, Any] | None:
        """The DeepSpeed file's content, once that is agreed upon; None: `deepspeed` is still to be read."""
        return self._deepspeed_file

    def use_deepspeed_file(self, content: dict[str, Any]) -> None:
        """From now on this is the content of the DeepSpeed file, whatever becomes of the file itself."""
        self._deepspeed_file = content

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _name_or_section(cls, value: Any) -> Any:
        if not isinstance(value, (str, dict)):
            raise ConfigError("deepspeed", value, "must be a file, the name of a shipped one (zero2), or a section")
        return _numbers(value) if isinstance(value, dict) else value

    @field_validator("hooks")
    @classmethod
    def _known_hooks(cls, value: list[str]) -> list[str]:
        for name in value:
            check_name(name, HOOK_NAMES, "hooks", OLD_HOOKS)
        if len(set(value)) < len(value):
            raise ConfigError("hooks", value, "names a hook twice; keep one")
        if value[:1] != ["log"] or "stop" not in value:
            raise ConfigError("hooks", value, "must begin with log, which opens the files, and hold stop")
        return value

    @field_validator("tracking")
    @classmethod
    def _known_trackers(cls, value: list[str]) -> list[str]:
        for name in value:
            check_name(name, TRACKERS, "tracking")
        if len(set(value)) < len(value):
            raise ConfigError("tracking", value, "names a tracker twice; keep one")
        return value

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        self.foresight.fill_from_model(self.model)
        f = self.foresight
        if f.active and f.warmup_epochs is not None and f.warmup_epochs >= self.train.epochs:
            raise ConfigError(
                "foresight.warmup_epochs",
                f.warmup_epochs,
                f"alignment would never start within train.epochs = {self.train.epochs}; lower it",
            )
        if f.schedule.kind == "cosine" and f.schedule.start_epoch >= self.train.epochs:
            problem = f"must be less than train.epochs = {self.train.epochs}"
            raise ConfigError("foresight.schedule.start_epoch", f.schedule.start_epoch, problem)
        traits = SOURCES.get(self.data.source)
        if f.teacher == "encoder" and traits is not None and traits.parts and self.data.images is None:
            problem = f"foresight.method = {f.method!r} watches images; give an image store or the original folder"
            raise ConfigError("data.images", None, problem)
        if f.encoder is not None and f.encoder.dtype == "auto":
            f.encoder.__dict__["dtype"] = "fp32" if self.train.precision == "fp32" else "tf32"
        self._check_guards()
        if self.sampling.classes > self.model.num_classes:
            self._give_up_classes()
        if self.sampling.top_k > self.model.vocab_size:
            problem = f"must be at most model.vocab_size = {self.model.vocab_size}"
            raise ConfigError("sampling.top_k", self.sampling.top_k, problem)
        return self

    def _check_guards(self) -> None:
        c, e = self.checkpoint, self.eval.loss
        if self.guard.spike.action == "rollback" and c.every_steps is None:
            problem = "'rollback' goes back to a checkpoint; give checkpoint.every_steps"
            raise ConfigError("guard.spike.action", "rollback", problem)
        if c.judged_by_fid:
            self._check_judged_by_fid()
        elif c.keep_best:
            if c.every_steps is None or not e.every_steps or c.every_steps % e.every_steps:
                problem = (
                    f"needs a measurement at each checkpoint: checkpoint.every_steps = {c.every_steps} must be a "
                    f"multiple of eval.loss.every_steps = {e.every_steps}"
                )
                raise ConfigError("checkpoint.keep_best", c.keep_best, problem)
            measured = [f"held_out/ntp_{kind}" for kind in e.weights]
            if c.best_metric not in measured:
                raise ConfigError("checkpoint.best_metric", c.best_metric, nearest(c.best_metric, [*measured, FID]))

    def _check_judged_by_fid(self) -> None:
        fid, place = self.eval.fid, {name: at for at, name in enumerate(self.hooks)}
        fid.check_network()
        if fid.metrics is not None and "fid" not in fid.metrics:
            raise ConfigError("eval.fid.metrics", fid.metrics, "checkpoint.best_metric = 'eval.fid' needs fid in it")
        if place.get("checkpoint", -1) < place.get("eval-fid", len(place)):
            problem = "checkpoint.best_metric = 'eval.fid' needs eval-fid, and checkpoint after it"
            raise ConfigError("hooks", self.hooks, problem)

    def _give_up_classes(self) -> None:
        if "classes" in self.sampling.model_fields_set:
            problem = f"must be at most model.num_classes = {self.model.num_classes}"
            raise ConfigError("sampling.classes", self.sampling.classes, problem)
        self.sampling.__dict__["classes"] = self.model.num_classes


def _numbers(value: Any) -> Any:
    """A DeepSpeed section from YAML, where 5e8 is text: numbers made of it."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    number = number_in(value) if isinstance(value, str) and "e" in value.lower() else None
    return value if number is None else number
