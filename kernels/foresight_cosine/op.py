"""`mirai::foresight_cosine`: one name for the alignment loss, whatever computes it.

The compiled versions (cpu.cpp, cuda.cu) read `projected` once and write its gradient in the same pass, because the loss
is a scalar: what the backward pass will receive is one number, usually known beforehand (`upstream`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mirai_ds.config import ConfigError
from mirai_ds.kernels import build, toolchain
from mirai_ds.kernels.foresight_cosine import reference

KERNELS = ("auto", "cuda", "cpu", "reference")

# upstream: the gradient the loss is expected to receive; with_gradient: fill `gradients`, shaped like `projected`;
# overwrite: the caller drops `gradients`, so that the backward pass may hand them out, rescaled in place.
torch.library.define(
    "mirai::foresight_cosine",
    "(Tensor[] projected, Tensor target, Tensor index, Tensor weights, Tensor counts, bool mean, float upstream, "
    "bool with_gradient, bool overwrite) -> (Tensor loss, Tensor cosine, Tensor[] gradients)",
)
torch.library.define(
    "mirai::foresight_cosine_rescale_", "(Tensor(a!)[] gradients, Tensor received, float expected) -> ()"
)
torch.library.define(
    "mirai::foresight_cosine_rescale",
    "(Tensor[] gradients, Tensor received, float expected, ScalarType dtype) -> Tensor[]",
)


def foresight_cosine(
    projected: Tensor | Sequence[Tensor],
    target: Tensor,
    index: Tensor,
    weights: Tensor,
    counts: Tensor,
    reduction: str = "sum",
    *,
    kernel: str = "auto",
    upstream: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Weighted negative cosine between projected states and gathered targets (Mirai, Eq. 10).

    projected: K tensors (B, S, C), or one (B, S, K, C); float32, bfloat16 or float16, rows of any stride.
    target: (B, M, C), float32, bfloat16 or float16, no gradient.
    index: (S, K) int32 (others are converted); the row of `target` that slot s's head k looks at, -1 for none.
    weights: (K,) float32, lambda of each head; counts: (K,) float32, what each head's sum is divided by.  Constants.
    reduction: `sum` over heads, or `mean` (1/K).
    kernel: `auto` (the compiled one of the device, the reference where none can be built), `cuda`, `cpu`, `reference`.
    upstream: the gradient that the loss is expected to receive.  Any is right; the expected one costs no second pass.

    Returns (loss, cosine): scalar float32 = reduction_k weights_k * -cosine_k, and cosine (K,) float32, detached:
    the sum of the head's cosines over its valid slots and the batch, divided by counts_k * B.
    Arithmetic is float32 whatever the inputs, inside autocast too; norms are clamped to 1e-12 from below as in
    F.normalize, so a zero vector has cosine 0.  Slots without a target add nothing and get a zero gradient, even when
    their projection is not finite; NaN or infinity in a slot that has a target makes loss and that row's gradient NaN.
    Bitwise repeatable; on the CPU also for any number of threads.  The compiled versions have no second derivative.
    Raises ValueError on shapes, TypeError on dtypes, IndexError on an index outside -1..M-1 (a compiled graph on CUDA:
    a device-side assertion), ConfigError on a kernel that cannot run here.
    """
    first = projected if isinstance(projected, Tensor) else projected[0]
    if choose(kernel, first.device.type, first.dtype) == "reference":
        return reference.foresight_cosine(projected, target, index, weights, counts, reduction)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction = {reduction!r}: use 'sum' or 'mean'")
    heads = [projected] if isinstance(projected, Tensor) else list(projected)
    index = index.int()
    if index.is_cuda and not torch.compiler.is_compiling():
        _check_index_once(index, target.shape[1])
    with_gradient = torch.is_grad_enabled() and any(states.requires_grad for states in heads)
    loss, cosine, _ = torch.ops.mirai.foresight_cosine(
        heads, target.detach(), index, weights, counts, reduction == "mean", upstream or 1.0, with_gradient, True
    )  # overwrite: nobody but the backward pass sees the third output
    return loss, cosine


def choose(
    kernel: str, device: str, dtype: torch.dtype = torch.float32, say: Callable[[str], None] = build.say_on_stderr
) -> str:
    """What will run for `kernel` on a `device` type: `cpu`, `cuda` or `reference`; compiled and loaded if need be.

    Raises ConfigError when an explicit choice cannot be had: it never falls back.
    """
    if kernel not in KERNELS:
        raise ConfigError("foresight.kernel", kernel, f"use one of {', '.join(KERNELS)}")
    if kernel == "reference" or (kernel == "auto" and (dtype == torch.float64 or device not in build.TARGETS)):
        return "reference"
    if kernel not in ("auto", device):
        raise ConfigError("foresight.kernel", kernel, f"the tensors are on {device}; use auto, {device} or reference")
    if dtype == torch.float64:
        raise TypeError(f"kernel: {kernel} computes in float32; float64 needs kernel: reference")
    problem = _load(device, say)
    if problem is None:
        return device
    if kernel == "auto":
        _say_once(f"the alignment loss runs in plain PyTorch (kernel: auto), because {problem}", say)
        return "reference"
    raise ConfigError("foresight.kernel", kernel, problem)


# What torch.compiler.assume_constant_result does, but for importing the compiler: more than a second of every start.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]

_PROBLEMS: dict[str, str | None] = {}  # of each target that this process tried to load
_SAID: set[str] = set()


def _load(target: str, say: Callable[[str], None]) -> str | None:
    """Build and load a library, once a process; what went wrong if something did."""
    if target not in _PROBLEMS:
        try:
            torch.ops.load_library(str(build.library(target, say)))
            _PROBLEMS[target] = _unfit_device() if target == "cuda" else None
        except build.BuildError as error:
            _PROBLEMS[target] = str(error)
        except OSError as error:  # built, but this torch or CUDA cannot load it
            _PROBLEMS[target] = f"the compiled library cannot be loaded: {error.__cause__ or error}"
    return _PROBLEMS[target]


def _unfit_device() -> str | None:
    """What is wrong where some GPU cannot run the library: else the first launch fails, with no word of why."""
    compiled = toolchain.architectures()
    for major, minor in sorted(toolchain.device_capabilities()):
        if not compiled.run_on((major, minor)):
            return (
                f"the CUDA library is compiled for {compiled} ({toolchain.ARCH_LIST}) and a GPU here is "
                f"sm_{major}{minor}; add {major}.{minor} to the list or unset it"
            )
    return None


def _say_once(message: str, say: Callable[[str], None]) -> None:
    if message not in _SAID:
        _SAID.add(message)
        say(message)


_CHECKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _check_index_once(index: Tensor, rows: int) -> None:
    """Compare an index on a GPU with the target's rows, once for each content: the comparison waits for the device."""
    state = (index._version, rows)
    if _CHECKED.get(index) == state or torch.cuda.is_current_stream_capturing():
        return
    reference.check_index(index, rows)
    _CHECKED[index] = state


@torch.library.register_fake("mirai::foresight_cosine")
def _fake(
    projected: list[Tensor],
    target: Tensor,
    index: Tensor,
    weights: Tensor,
    counts: Tensor,
    mean: bool,
    upstream: float,
    with_gradient: bool,
    overwrite: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    first = projected[0]
    dtype = torch.float32 if first.dtype == torch.float16 else first.dtype  # fp16: see `arguments.h`
    gradients = [states.new_empty(states.shape, dtype=dtype) for states in projected] if with_gradient else []
    return first.new_empty((), dtype=torch.float32), first.new_empty((index.shape[1],), dtype=torch.float32), gradients


@torch.library.register_fake("mirai::foresight_cosine_rescale_")
def _fake_rescale_(gradients: list[Tensor], received: Tensor, expected: float) -> None:
    return None


@torch.library.register_fake("mirai::foresight_cosine_rescale")
def _fake_rescale(gradients: list[Tensor], received: Tensor, expected: float, dtype: torch.dtype) -> list[Tensor]:
    return [gradient.new_empty(gradient.shape, dtype=dtype) for gradient in gradients]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    ctx.upstream, ctx.overwrite, ctx.dtype = inputs[6], inputs[8], inputs[0][0].dtype
    ctx.mark_non_differentiable(output[1], *output[2])
    ctx.set_materialize_grads(False)  # or autograd would fill as many zeros as `gradients` has numbers
    ctx.save_for_backward(*output[2])


def _backward(ctx: Any, loss: Tensor | None, cosine: None, gradients: None) -> tuple[Any, ...]:
    kept = list(ctx.saved_tensors)
    rest = (None,) * 8
    if loss is None:
        return None, *rest
    if not kept:
        raise RuntimeError("mirai::foresight_cosine was called with with_gradient=False: there is no gradient")
    if torch.is_grad_enabled():
        raise RuntimeError("mirai::foresight_cosine has no second derivative: use kernel='reference'")
    in_place = ctx.overwrite and kept[0].dtype == ctx.dtype and type(kept[0]) is Tensor and not _graph_is_kept()
    if not in_place:
        return torch.ops.mirai.foresight_cosine_rescale(kept, loss, ctx.upstream, ctx.dtype), *rest
    # Nobody will ask again: what was written in the forward pass is handed out, corrected on the spot if need be.
    torch.ops.mirai.foresight_cosine_rescale_(kept, loss, ctx.upstream)
    return kept, *rest


def _graph_is_kept() -> bool:
    """Whether this backward pass runs with retain_graph, so that saved tensors must not change."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


torch.library.register_autograd("mirai::foresight_cosine", _backward, setup_context=_keep)
