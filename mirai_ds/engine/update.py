"""The norm of the gradients, their clipping and the refusal of those that are not finite, all on the device.

DeepSpeed asks the host, each step on stages 1 to 3, whether the gradients were finite, and a host that asks waits for
the device.  Here the answer stays on the device: fused AdamW divides gradients by `grad_scale` as it reads them and
leaves weights, moments and its step counter alone where `found_inf` is one.  A refusal sticks, so that until the host
looks, which it does when it wants to log or keep something, the state remains what it was before the refused update.

With the optimizer offloaded the update is on the host anyway: there DeepSpeed decides, and the host looks every step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mirai_ds.engine.layout import unexpected


class Update:
    """Decides about the updates of one DeepSpeed engine whose base optimizer is `base` (fused, torch's)."""

    def __init__(self, ds: Any, stage: int, base: torch.optim.Optimizer, device: torch.device) -> None:
        self.ds, self.zero, self.stage, self.base = ds, ds.optimizer, stage, base
        self.offloaded = bool(
            getattr(self.zero, "cpu_offload", False) or getattr(self.zero, "offload_optimizer", False)
        )
        self._clip = float(ds.gradient_clipping())  # read before `_take_over` sets DeepSpeed's own to zero
        self._since = 0  # updates since the host looked
        # The same number on the device, where a captured step counts it too: what follows is written in place, so that
        # a replay and a plain step read and write the same memory.
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._judged = -1  # the last of them whose norm was looked into
        self._told = False  # by DeepSpeed, offloaded, that the last one was refused
        self._first = torch.full((), -1, dtype=torch.int64, device=device)  # the first refused of them
        self.refusing = torch.zeros((), device=device)  # float32: 1 from a refused update on, until the host looks
        self.norm = torch.full((), float("nan"), device=device)
        if not self.offloaded:
            self._take_over()

    def _take_over(self) -> None:
        if not getattr(self.base, "_step_supports_amp_scaling", False):
            raise TypeError(f"{type(self.base).__name__}: needs found_inf and grad_scale; give fused=True")
        # Every branch turns DeepSpeed's clipping off: AdamW clips by `grad_scale` in its own pass over the gradients.
        if self.stage == 0:
            self.ds._config.gradient_clipping = 0.0
        elif self._keeps_whole_gradients:
            self._replace("clip_grad", 0.0)
        else:
            assert self.zero.loss_scale == 1.0  # what is replaced below would also have undone the scale
            # The check of every gradient ends with a read by the host; where it asks for the norm, we answer.
            self.zero.check_grad_overflow, self.zero.compute_grad_norm = False, True
            self._replace("unscale_and_clip_grads", lambda *_: None)
            if self.stage == 3:
                self._replace("_get_norm_groups", lambda: [self._judge_parts()])
            else:
                self._replace("scaled_global_norm", self._judge_parts)

    def _replace(self, name: str, value: Any) -> None:
        if not hasattr(self.zero, name):
            raise unexpected(type(self.zero).__name__, f"it has no {name}")
        setattr(self.zero, name, value)

    @property
    def _keeps_whole_gradients(self) -> bool:
        """DeepSpeed's stage 1 in bf16: every rank has all of them, in fp32."""
        return type(self.zero).__name__ == "BF16_Optimizer"

    @torch.no_grad()
    def step(self) -> None:
        """`ds.step` at an accumulation boundary; `norm` is then the gradients' norm before clipping."""
        if self.offloaded:
            # Here a refusal does not stick: DeepSpeed would apply this update although it left out the one before.
            if self._told:
                raise RuntimeError(
                    "the optimizer on the host skipped a step, and another came without `confirm_updates` between"
                )
            self.ds.step()
            self.norm = torch.as_tensor(self.ds.get_global_grad_norm() or 0.0)
            self._told = not self.ds.was_step_applied()
            self._refuse(torch.full_like(self._first, self._told, dtype=torch.bool))
        else:
            if self.stage == 0:  # no ZeRO step that would ask for the norm; AdamW needs the verdict before it runs
                self._judge_whole([p.grad for p in self.ds.module.parameters() if p.grad is not None])
            with self._without_questions():
                self.ds.step()
            # A DeepSpeed that took the norm elsewhere would have applied gradients that nobody judged or clipped.
            if self._judged != self._since:
                raise unexpected(type(self.zero).__name__, "its step did not ask for the gradients' norm")
        self._count += 1
        self._since += 1

    def count_replayed(self) -> None:
        """The device has made a captured step: the host counts what it did not see."""
        self._judged = self._since
        self._since += 1

    @property
    def pending_steps(self) -> int:
        """Updates since the host looked: whether they were made is not known."""
        return self._since

    def confirm_updates(self) -> int:
        """How many of the last updates were not made: the first that was refused and all after it.  Reads from the
        device, and lets updates be made again.  The same on every rank."""
        first, since = int(self._first), self._since
        self._since, self._judged, self._told = 0, -1, False
        self._count.zero_()
        if first < 0:
            return 0
        self._first.fill_(-1)
        self.refusing.zero_()
        return since - first

    def _judge_parts(self) -> Tensor:
        """Of what this rank holds of the averaged gradients, summed over ranks: one collective."""
        parts = [g for group in self.zero.averaged_gradients.values() if group is not None for g in group]
        total = self._norm_of(parts).square()
        # NaN or infinity on one rank makes the sum so on all: every rank refuses alike without asking again.
        dist.all_reduce(total, group=self.zero.dp_process_group)
        norm = total.sqrt()
        return self._judge(norm, ~torch.isfinite(norm))

    def _judge_whole(self, gradients: list[Tensor]) -> Tensor:
        """Of all averaged gradients, which every rank has.  A memory fault may make them differ on one: all refuse."""
        norm = self._norm_of(gradients)
        bad = (~torch.isfinite(norm)).float()
        if dist.get_world_size() > 1:
            dist.all_reduce(bad)
        return self._judge(norm, bad > 0)

    def _norm_of(self, tensors: list[Tensor]) -> Tensor:
        if not tensors:
            return torch.zeros_like(self.refusing)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)))

    def _judge(self, norm: Tensor, bad: Tensor) -> Tensor:
        self.norm, self._judged = norm, self._since
        self._refuse(bad)
        self.base.found_inf = self.refusing  # type: ignore[attr-defined]
        # AdamW divides by it: one over clip_grad_norm_'s coefficient, which is max_norm / (norm + 1e-6), at most 1.
        if self._clip > 0:
            self.base.grad_scale = ((norm + 1e-6) / self._clip).clamp(min=1.0)  # type: ignore[attr-defined]
        return norm

    def _refuse(self, bad: Tensor) -> None:
        # `torch.where` and not `if`, which would wait for the device to know `bad`.
        torch.where((self._first < 0) & bad, self._count, self._first, out=self._first)
        torch.ge(self._first, 0, out=self.refusing)

    @contextmanager
    def _without_questions(self) -> Iterator[None]:
        """ZeRO's step meanwhile takes the norm for a valid one without reading it."""
        # ZeRO's files import these functions by name, so they are replaced where they were imported to; for the step
        # only, since all engines of a process share the module.
        module = sys.modules[type(self.zero).__module__]
        answers: dict[str, Any] = {
            "is_invalid_grad_norm": lambda norm: False, "combine_grad_norm_groups": lambda norms: norms[0],
        }  # fmt: skip
        if self._keeps_whole_gradients:
            answers["get_global_norm_of_tensors"] = lambda input_tensors, **_: self._judge_whole(input_tensors)
        kept = {name: getattr(module, name) for name in answers if hasattr(module, name)}
        if self.stage > 0 and "is_invalid_grad_norm" not in kept:
            raise unexpected(type(self.zero).__name__, "it judges norms by another function")
        for name in kept:
            setattr(module, name, answers[name])
        try:
            yield
        finally:
            for name, original in kept.items():
                setattr(module, name, original)
