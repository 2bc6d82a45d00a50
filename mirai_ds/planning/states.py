"""Bytes of weights, gradients, AdamW's moments, the average and DeepSpeed's buffers on one rank, by ZeRO stage.

Read from DeepSpeed 0.19's optimizers, as this engine sets them up (`engine/`, `config/deepspeed_file.py`):

stage 0         the parameters are the masters; gradients stay whole; the reduction flattens up to 5e8 of them
stages 1, 2     one flat copy of all parameters; masters, moments and average of this rank's part
stage 1, bf16   BF16_Optimizer: fp32 gradients of the *whole* model stay allocated for good
stage 3         parameters are cut too; whole ones are gathered as they are used; a gradient bucket is there for good
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mirai_ds.config.sizes import head_tensors
from mirai_ds.planning.activations import FP32, ActivationMemory

FLATTENED_AT_ONCE = 500_000_000  # elements: DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE, stage 0 and BF16_Optimizer
_DEFAULTS = {  # DeepSpeed's own, for what a file leaves out
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
}


@dataclass(frozen=True)
class StateMemory:
    """The states of `work` under a resolved DeepSpeed file on `world` ranks.  All methods give bytes a rank."""

    work: ActivationMemory
    zero: dict[str, Any]
    world: int
    accumulation: int

    @classmethod
    def of(cls, work: ActivationMemory, ds_config: dict[str, Any], world: int) -> StateMemory:
        """Builds it from `ds_config` as `config.deepspeed_file.resolve` returns it."""
        return cls(work, ds_config["zero_optimization"], world, ds_config["gradient_accumulation_steps"])

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.zero["stage"])

    @property
    def bf16(self) -> bool:
        """Whether the model itself is in bf16, with fp32 masters in the optimizer."""
        return self.work.precision == "bf16"

    @property
    def part(self) -> float:
        """Parameters whose optimizer state this rank holds."""
        return self.work.parameters / (self.world if self.stage else 1)

    @property
    def bucket(self) -> int:
        """Elements of a gradient bucket."""
        return int(self.zero["reduce_bucket_size"])

    @property
    def buffers(self) -> int:
        """Gradient buckets on stages 1 and 2: a second one where communication overlaps."""
        return 2 if self.zero.get("overlap_comm") else 1

    @property
    def whole_bf16_gradients(self) -> bool:
        """Whether BF16_Optimizer keeps whole bf16 gradients."""
        return self.stage == 1 and self.bf16

    @property
    def reduces_early(self) -> bool:
        """Whether gradients leave for their owners while the backward pass runs."""
        return self.stage >= 2 or (self.stage == 1 and not self.bf16 and self.buffers == 2 and self.accumulation == 1)

    def offloaded(self, what: str) -> bool:
        """Whether `offload_param` or `offload_optimizer` puts it into host memory."""
        return bool(self.zero.get(what, {}).get("device", "none") == "cpu")

    # --- there between steps ----------------------------------------------------------------------------------------

    def resting(self) -> dict[str, float]:
        """Bytes that stay between steps, by what they hold."""
        w = self.work
        on_device = not self.offloaded("offload_optimizer")
        shared = self.stage == 0  # the masters are the parameters
        out: dict[str, float] = {
            "parameters": w.parameter * self._own_parameters(),
            "masters": 0.0 if shared or not on_device else FP32 * self.part,
            "moments": 2 * FP32 * self.part * on_device,
            "average": FP32 * self.part * on_device,
            "gradients": 0.0,
            "buckets": 0.0,
        }
        if self.secondary:
            out["node's copy"] = w.parameter * (w.parameters - self.persistent) / self.secondary
        if self.whole_bf16_gradients:
            out["gradients"] = FP32 * w.parameters
        if self.stage == 3:
            out["gradients"] = FP32 * self.part * on_device
            out["buckets"] = FP32 * self.bucket
        return out

    def _own_parameters(self) -> float:
        if self.stage < 3:
            return self.work.parameters
        return (0.0 if self.offloaded("offload_param") else self.part) + self.persistent * (self.world > 1)

    def _tensors(self) -> list[int]:
        """The number of elements of each parameter."""
        m, f = self.work.model, self.work.foresight
        width = m.width
        in_block = [3 * width**2, width**2, *[width * m.ffn_hidden] * 3, width, width]
        in_head = head_tensors(f, width, self.work.feature_dim)
        tables = [m.vocab_size * width, (m.num_classes + 1) * width, m.vocab_size * width, width]
        tables += [m.learnable_tokens * width] if m.learnable_tokens else []
        return in_block * m.depth + in_head * f.heads + tables

    def _of(self, key: str) -> int:
        return int(self.zero.get(key, _DEFAULTS[key]))

    @property
    def persistent(self) -> int:
        """Elements of parameters too small to be cut on stage 3."""
        return sum(size for size in self._tensors() if size < self._of("stage3_param_persistence_threshold"))

    # --- who tells whom ---------------------------------------------------------------------------------------------

    @property
    def matrices(self) -> int:
        """Parameters that are cut on stage 3."""
        return sum(size >= self._of("stage3_param_persistence_threshold") for size in self._tensors())

    @property
    def groups(self) -> int:
        """Parameter groups, as the engine makes them: decayed and not, of heads, teacher's part and rest."""
        f = self.work.foresight
        owners = 1 + f.active + f.follows_average
        return 2 * owners

    @property
    def all_reduces(self) -> bool:
        """Whether stages 1 and 2 all-reduce gradients, as they do by default."""
        return bool(self.zero.get("use_multi_rank_bucket_allreduce", True))

    @property
    def overlaps(self) -> bool:
        """Whether gradients are sent while the backward pass goes on."""
        return self.reduces_early and bool(self.zero.get("overlap_comm", self.stage == 3))

    @property
    def secondary(self) -> int:
        """Ranks of a node that share a second copy of the parameters (hpZ); 0: there is none."""
        group = min(int(self.zero.get("zero_hpz_partition_size", 1)), self.world)
        return group if self.stage == 3 and group > 1 else 0

    @property
    def gpus_a_node(self) -> int:
        """Ranks of a node as hpZ is told, 8 if it is not."""
        return self.secondary or 8

    def quantized(self, what: str) -> bool:
        """Whether ZeRO++ sends `weights` in 8 bits, `gradients` in 4."""
        return self.stage == 3 and bool(self.zero.get(f"zero_quantized_{what}"))

    @property
    def _ahead(self) -> int:
        return min(self._of("stage3_prefetch_bucket_size"), self._of("stage3_max_live_parameters"))

    @property
    def gathered_again(self) -> float:
        """Stage 3: share of the cut parameters that is gathered a second time, in the backward pass.  What is used
        again within `stage3_max_reuse_distance` elements is kept (the way back passes each twice), and so is what the
        prefetch meets."""
        whole = self.work.parameters - self.persistent
        kept = self._of("stage3_max_reuse_distance") / 2 + self._ahead
        return max(0.0, 1 - kept / whole)

    # --- there within a step ----------------------------------------------------------------------------------------

    def gathered(self) -> float:
        """Stage 3: whole parameters at the end of the forward pass.  What is used again within
        `stage3_max_reuse_distance` elements is not released, and the way back passes each twice."""
        if self.stage < 3 or self.world == 1:  # one rank uses its part, which is the whole
            return 0.0
        reuse, ahead = self._of("stage3_max_reuse_distance"), self._of("stage3_prefetch_bucket_size")
        largest = self.work.model.vocab_size * self.work.model.width
        whole = self.work.parameters - self.persistent
        return float(self.work.parameter * min(whole, reuse / 2 + ahead + largest))

    def fetched(self) -> float:
        """Stage 3: the buffer of the last collective fetch, from which each parameter is copied when it is used; it
        stays until the last one was."""
        if self.stage < 3 or self.world == 1:
            return 0.0
        cut = self.work.parameters - self.persistent
        return float(self.work.parameter * min(cut, self._of("stage3_prefetch_bucket_size")))

    def carried(self) -> float:
        """Gradients of earlier micro-batches, there while a later one runs."""
        if self.accumulation == 1:
            return 0.0
        if self.stage == 2:
            return FP32 * self.part
        return float(self.work.parameter * self.work.parameters) if self.stage < 2 else 0.0

    def gradients(self, done: float) -> float:
        """During a backward pass that has made the gradients of `done` parameters, buckets included."""
        w = self.work
        if self.stage == 3 or done <= 0:
            return 0.0
        fresh = 0.0 if self.carried() else float(w.parameter * done)
        if self.stage == 0 or self.whole_bf16_gradients:
            return fresh
        held = self.buffers * w.parameter * self.bucket
        if not self.reduces_early:
            return held + fresh
        return held + (self._own_gradients() if done > self.bucket and not self.carried() else 0.0)

    def _own_gradients(self) -> float:
        """This rank's reduced gradients: fp32 in bf16 training, else as autograd makes them."""
        return FP32 * self.part

    def reduction(self, done: float) -> float:
        """Copies that one reduction makes, once a bucket's worth of gradients is there."""
        w = self.work
        if self.stage == 0 or self.whole_bf16_gradients:
            return 0.0  # at the end only
        if done < self.bucket or not self.reduces_early:
            return 0.0
        return self._flattened(min(self.bucket, w.parameters))

    def _flattened(self, elements: float) -> float:
        casts = 2 * elements + FP32 * elements if self.bf16 and self.stage == 2 else FP32 * elements
        return float(casts)

    def at_the_end(self) -> float:
        """Gradients, buckets and copies when the backward pass is over and the last reduction runs."""
        w = self.work
        whole = float(w.parameter * w.parameters)
        if self.stage == 0:
            return whole + w.parameter * min(w.parameters, FLATTENED_AT_ONCE)
        if self.whole_bf16_gradients:
            return whole + FP32 * min(w.parameters, FLATTENED_AT_ONCE)
        several = w.parameters > self.bucket
        copies = self._flattened(min(self.bucket, w.parameters))
        if self.stage == 3:
            return copies
        held = self.buffers * w.parameter * self.bucket
        own = self._own_gradients()
        if self.reduces_early and self.bf16:
            return held + own + copies  # one fp32 buffer takes all micro-batches
        if self.reduces_early:
            # With one bucket for all, its flat copy is gone before the own part is copied out.
            return held + self.carried() + (own + copies if several else max(own, copies))
        moved = w.parameter * min(self.bucket, w.parameters)
        return held + max(whole, whole - moved + (own + copies if several else max(own, copies)))

    def update(self) -> float:
        """AdamW's step: this rank's gradients and, in fp32, a flat copy of them (of one group at a time)."""
        if self.offloaded("offload_optimizer"):
            return 0.0
        if self.stage == 0:
            return float(self.work.parameter * self.work.parameters)
        if self.whole_bf16_gradients:
            return 0.0
        own = FP32 * self.part
        return {1: 2 * own, 2: own if self.bf16 else 2 * own, 3: own}[self.stage]
