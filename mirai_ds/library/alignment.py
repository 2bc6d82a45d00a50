"""Foresight alignment for any decoder of image tokens, in anybody's training loop (Mirai, Sec. 3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mirai_ds.config import ConfigError, ForesightConfig
from mirai_ds.foresight import alignment_active, alignment_multiplier, index_table, method_of, slot_counts
from mirai_ds.foresight.heads import heads
from mirai_ds.kernels.foresight_cosine import foresight_cosine
from mirai_ds.model import initialise

# Fields of the configuration that only the trainer's own loop can follow, and what says the same here.
TRAINER_ONLY = {
    "layer": "name the module: tap='blocks.7'",
    "teacher_layer": "name the module: teacher_tap='blocks.7'",
    "teacher_weights": "load them: alignment.teacher.load_state_dict(...)",
    "desynchronised_ranks": "it is an experiment of the trainer's",
}


class Aligned(NamedTuple):
    """output: the model's own.  loss: () float32, the weighted alignment loss before the epoch's multiplier; add
    `multiplier(epoch)` times it to your own.  cosine: (K,) float32, each head's mean cosine, detached."""

    output: Any
    loss: Tensor
    cosine: Tensor


class _Tap:
    """A hook on a module that keeps what it returns, the first of a tuple, while somebody listens."""

    def __init__(self, model: nn.Module, name: str, stop: bool) -> None:
        self.name, self.stop, self.listening = name, stop, False
        self.states: Tensor | None = None
        model.get_submodule(name).register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self.listening:
            return
        self.states = output[0] if isinstance(output, (tuple, list)) else output
        self.listening = False  # a recomputation in the backward pass comes here again
        if self.stop:
            raise _ReachedError

    def states_of(self, call: Callable[[], Any]) -> tuple[Any, Tensor]:
        """(what `call` returns, None where it was cut short; the states).  Raises RuntimeError when it does not pass
        the module."""
        self.states, self.listening, output = None, True, None
        try:
            output = call()
        except _ReachedError:
            pass
        finally:
            self.listening = False
        states, self.states = self.states, None
        if not isinstance(states, Tensor) or states.ndim != 3:
            got = "nothing" if states is None else f"a {type(states).__name__}"
            raise RuntimeError(f"{self.name!r} gave {got} in the forward pass, expected hidden states (B, S, D)")
        return output, states


class _ReachedError(Exception):
    """Ends a teacher's forward pass at its tap."""


class ForesightAlignment(nn.Module):
    """A model with alignment heads: what an optimizer, DDP, FSDP or DeepSpeed is given in the model's place.

    Its parameters are the model's and the heads'.  The teacher, of a configuration whose targets come from an average
    (Mirai-E), is no part of them: `teacher` is a float32 copy of the model that `update` moves.  Of Mirai-I there is
    none, and the targets are the caller's: features (B, N, feature_dim) of the images, in raster order.

        mirai = ForesightAlignment(model, "blocks.7", grid=16, width=768)
        target = mirai.target(tokens, labels) if mirai.begun(epoch) else None
        output, alignment, cosine = mirai(target, tokens[:, :-1], labels)
        loss = next_token_loss(output, tokens) + mirai.multiplier(epoch) * alignment
        ...
        optimizer.step()
        mirai.update()
    """

    def __init__(
        self,
        model: nn.Module,
        tap: str,
        grid: int,
        width: int,
        config: ForesightConfig | None = None,
        *,
        feature_dim: int | None = None,
        teacher_tap: str | None = None,
        prefix: int = 1,
        decay: float = 0.9999,
        total_epochs: float | None = None,
        seed: int = 0,
    ) -> None:
        """model: takes an image's tokens in raster order behind `prefix` slots (a class, a text), on its device, with
        its first weights loaded.  tap: name of the submodule whose output (B, S, width) is aligned, the block at two
        thirds of the depth in the paper; it returns the states, or a tuple that begins with them.
        grid: side of the token grid, N = grid^2.  config: default Mirai-E of the authors' code with K = 3.
        feature_dim: width of the targets; default the model's.  teacher_tap: default `tap`.  decay: of the average.
        total_epochs: what a `cosine` schedule ends at.  seed: of the heads' first weights.

        Raises ConfigError on a configuration that has no meaning here or not on this grid, AttributeError when the
        model has no such submodule.
        """
        super().__init__()
        self.config = config or ForesightConfig(method="mirai-e")
        self._check(total_epochs)
        self.grid, self.prefix, self.decay, self.total_epochs = grid, prefix, decay, total_epochs
        table = index_table(self.config, grid)
        self.rows = int(table.max()) + 1  # of the target, at least
        # No buffers: a model that is cast to bfloat16 must not round how many slots a mean is over.
        weights = torch.tensor(self.config.weights, dtype=torch.float32)
        self._tables = table.int(), weights, slot_counts(self.config, table, grid * grid)
        self._outside: list[nn.Module] = []  # in a list, so that the teacher is no submodule
        self._agreed = False  # whether all ranks have rank 0's teacher
        self._teacher_tap: _Tap | None = None
        if self.config.teacher == "gpt":
            self._add_teacher(model, teacher_tap or tap)
        self.model = model
        self._tap = _Tap(model, tap, stop=False)
        self.projectors = heads(self.config, width, feature_dim or width)
        initialise(self.projectors, seed)
        self.projectors.to(next(model.parameters()).device)

    def _check(self, total_epochs: float | None) -> None:
        config = self.config
        method = method_of(config)
        if method is None or not method.cosine:
            problem = "has no cosine with a teacher's features; use mirai-e or mirai-i"
            raise ConfigError("foresight.method", config.method, problem)
        for name, instead in TRAINER_ONLY.items():
            if getattr(config, name) is not None:
                raise ConfigError(f"foresight.{name}", getattr(config, name), f"is the trainer's; {instead}")
        if config.head_warmup_epochs:
            problem = "is the trainer's; train the heads on detached states of your own"
            raise ConfigError("foresight.head_warmup_epochs", config.head_warmup_epochs, problem)
        if config.schedule.kind == "cosine" and total_epochs is None:
            raise ConfigError("foresight.schedule.kind", "cosine", "needs total_epochs, where it ends")

    def _add_teacher(self, model: nn.Module, tap: str) -> None:
        # fp32: at decay 0.9999 an update is 1e-4 of the difference, below half an ulp of bfloat16.
        teacher = copy.deepcopy(model).float().eval().requires_grad_(False)
        self._teacher_tap = _Tap(teacher, tap, stop=True)
        self._outside.append(teacher)

    @property
    def teacher(self) -> nn.Module | None:
        """The averaged copy of the model, for checkpoints (`teacher.state_dict()`), sampling and `fully_shard`; None of
        Mirai-I."""
        return self._outside[0] if self._outside else None

    def begun(self, epoch: float) -> bool:
        """Whether warm-up is over at `epoch` (0-based, fractional): from here on targets are needed."""
        return alignment_active(self.config, epoch)

    def multiplier(self, epoch: float) -> float:
        """What the alignment loss is multiplied by at `epoch` (0-based, fractional); 0 during warm-up."""
        return alignment_multiplier(self.config, epoch, self.total_epochs or 0.0)

    @torch.no_grad()
    def target(self, *args: Any, **kwargs: Any) -> Tensor:
        """Features (B, 1 + T, D), no gradient, of the averaged model called with these arguments: all N tokens behind
        their prefix, or all but the last where the configuration's teacher does not see it.

        Collective at its first call, as `update` is: all ranks take rank 0's average.  Raises RuntimeError without a
        teacher or when the call does not pass the tap, ValueError on too few tokens.
        """
        if self._teacher_tap is None or self.teacher is None:
            raise RuntimeError(f"{self.config.method} has no average as teacher; give its encoder's features (B, N, C)")
        self._agree()
        # FSDP counts on a pass that ends; any other is spared what lies behind the tap.
        self._teacher_tap.stop = not self._sharded()
        _, states = self._teacher_tap.states_of(lambda: self.teacher(*args, **kwargs))  # type: ignore[misc]
        states = states[:, self.prefix - 1 :]
        if states.shape[1] < self.rows:
            raise ValueError(
                f"the teacher saw {states.shape[1] - 1} tokens behind {self.prefix} slots and its targets reach token "
                f"{self.rows - 1}: call target() with all {self.grid**2} tokens of an image"
            )
        return states.detach()

    def forward(self, target: Tensor | None, *args: Any, **kwargs: Any) -> Aligned:
        """The model's output for these arguments, and its alignment with `target`: (B, M, C) from `target()`, or of
        Mirai-I (B, N, C); None, in warm-up: a loss of 0, whose gradient of the heads is 0 too, so that every parameter
        has one, as DDP wants.

        Raises RuntimeError where the tapped states carry no gradient, ValueError on shapes.
        """
        output, states = self._tap.states_of(lambda: self.model(*args, **kwargs))
        if target is None:
            one = states[:, :1].detach()
            nothing = torch.stack([head(one).float().sum() for head in self.projectors]).sum() * 0.0
            return Aligned(output, nothing, torch.zeros(self.config.heads, device=states.device))
        if torch.is_grad_enabled() and not states.requires_grad:
            raise RuntimeError(
                f"the states of {self._tap.name!r} carry no gradient, so nothing would be aligned: use "
                "checkpoint(..., use_reentrant=False), and do not freeze the blocks before it"
            )
        slots = self.grid**2
        states = states[:, self.prefix - 1 :][:, :slots]
        if states.shape[1] < slots:
            raise ValueError(
                f"{self._tap.name!r} gave {states.shape[1]} slots behind the prefix, a {self.grid}x{self.grid} grid "
                f"needs {slots}: the last of {self.prefix} slots of the prefix, and all tokens but the last"
            )
        index, weights, counts = self._tables_on(states.device)
        loss, cosine = foresight_cosine(
            [head(states) for head in self.projectors], target, index, weights, counts,
            self.config.heads_reduction or "sum", kernel=self.config.kernel,
        )  # fmt: skip
        return Aligned(output, loss, cosine)

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if self._tables[0].device != device:
            self._tables = tuple(table.to(device) for table in self._tables)  # type: ignore[assignment]
        return self._tables

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]] | None = None) -> None:
        """Move the average, once after each optimizer step: teacher <- decay * teacher + (1 - decay) * model.

        weights: (name, tensor) of all parameters; default the model's own.  Give the float32 masters where the model
        is kept in less (of DeepSpeed `safe_get_full_fp32_param`): a bfloat16 weight does not move at small learning
        rates.  Collective where the model is sharded and the teacher is not.  Nothing to do of Mirai-I.

        Raises KeyError when a parameter is missing.
        """
        if self.teacher is None:
            return
        self._agree()
        own = dict(self.teacher.named_parameters())
        for name, value in weights if weights is not None else self.model.named_parameters():
            average = own.pop(name)
            if isinstance(value, DTensor) and not isinstance(average, DTensor):
                value = value.full_tensor()
            average.lerp_(value.detach().to(average.device, average.dtype), 1.0 - self.decay)
        if own:
            raise KeyError(f"the average was not given {sorted(own)[:3]} ({len(own)} tensors)")
        for mine, theirs in zip(self.teacher.buffers(), self.model.buffers(), strict=True):
            mine.copy_(theirs)

    def _sharded(self) -> bool:
        return self.teacher is not None and any(isinstance(p, DTensor) for p in self.teacher.parameters())

    def _agree(self) -> None:
        """Once, collective: rank 0's teacher on every rank.  DDP and DeepSpeed send the model's weights round when they
        wrap it, after the teacher was copied from what each rank had begun with."""
        if self._agreed or self.teacher is None:
            return
        self._agreed = True
        if dist.is_initialized() and dist.get_world_size() > 1 and not self._sharded():
            for tensor in (*self.teacher.parameters(), *self.teacher.buffers()):
                dist.broadcast(tensor.data, 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ForesightAlignment:
        """Moves the teacher along to another device, in float32 whatever the model becomes."""
        super()._apply(fn, recurse)
        for teacher in self._outside:
            teacher.to(next(self.projectors.parameters()).device)
        return self
