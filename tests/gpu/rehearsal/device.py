"""A fake GPU with real values: every operator also runs on the CPU, over the same memory.

An operator on fake CUDA tensors runs as on a GPU, for shapes, checks, allocations, streams and launches; its kernels
compute nothing.  Then the same operator runs on CPU tensors that are views of the same "device" memory.  Where the CPU
has no such operator, or a GPU's is only a name for a formula, the formula is computed.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu.rehearsal.attention import FORMULAS
from tests.gpu.rehearsal.library import Replayed, library

# Their outputs are not computed from values, or the fake CUDA itself does all of the work.
_NO_VALUES = {
    "record_stream", "set_", "resize_", "_local_scalar_dense", "is_pinned", "_pin_memory", "empty", "empty_strided",
    "empty_like", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh",
}  # fmt: skip
# How large their outputs are depends on values: the real ones wait for the device.
_SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
Watcher = Callable[[Any, list[Tensor], list[Tensor]], None]  # of an operator, its inputs and its outputs
_NAMESPACES = ("aten", "prims", "mirai")
_LOW = (torch.bfloat16, torch.float16)
_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.restype, _memory.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_WRITABLE = 0x200  # PyBUF_WRITE


def _leaves(values: Any) -> list[Any]:
    """What an operator is given, however it is nested.  torch's own `tree_leaves` knows more kinds of containers than
    operators take, and looking them up was most of a fake step's time."""
    if not isinstance(values, dict | list | tuple):
        return [values]
    inner = values.values() if isinstance(values, dict) else values
    return [leaf for value in inner for leaf in _leaves(value)]


def _mapped(function: Callable[[Any], Any], values: Any) -> Any:
    """The same containers with `function` of each leaf."""
    if isinstance(values, dict):
        return {key: _mapped(function, value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)([_mapped(function, value) for value in values])
    return function(values)


def host_view(tensor: Any) -> Any:
    """A CPU tensor over the memory of a fake CUDA tensor; anything else as it is."""
    if not isinstance(tensor, Tensor) or tensor.device.type != "cuda":
        return tensor
    storage = tensor.untyped_storage()
    if tensor.numel() == 0 or storage.nbytes() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    raw = _memory(storage.data_ptr(), storage.nbytes(), _WRITABLE)
    flat = torch.frombuffer(raw, dtype=tensor.dtype, count=storage.nbytes() // tensor.element_size())
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _on_host(argument: Any) -> Any:
    if isinstance(argument, torch.device):
        return torch.device("cpu") if argument.type == "cuda" else argument
    if isinstance(argument, str) and argument.startswith("cuda"):
        return "cpu"
    if isinstance(argument, torch.Generator):
        return None
    return host_view(argument)


def _names_gpu(argument: Any) -> bool:
    if isinstance(argument, Tensor | torch.device):
        return (argument.device if isinstance(argument, Tensor) else argument).type == "cuda"
    return isinstance(argument, str) and argument.startswith("cuda")


def _summed_in_float(product: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    """Matrix products of 16-bit numbers as a GPU makes them: summed in float32, rounded once."""

    def run(*arguments: Any) -> tuple[Tensor]:
        if arguments[0].dtype not in _LOW:
            return (product(*arguments),)
        wide = [a.float() if isinstance(a, Tensor) else a for a in arguments]
        return (product(*wide).to(arguments[0].dtype),)

    return run


_INSTEAD: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    **FORMULAS,
    "mm": _summed_in_float(torch.mm), "addmm": _summed_in_float(torch.addmm), "bmm": _summed_in_float(torch.bmm),
}  # fmt: skip


class FakeDevice(TorchDispatchMode):
    """While it is active, operators on fake CUDA tensors have values.  What it could not compute is in `missing`.

    limit: operators with more elements than this are not computed, only launched.
    watcher: told of each operator (name, inputs, outputs), for counting.
    """

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__()
        self.limit = limit
        self.missing: Counter[str] = Counter()
        self.watcher: Watcher | None = None
        self._replayed = Replayed()
        self._cpu_library_tried = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator on the fake device and, where it has values, on the CPU."""
        kwargs = kwargs or {}
        leaves = _leaves((args, kwargs))
        space, name = func._schema.name.split("::")
        if space not in _NAMESPACES or not any(_names_gpu(leaf) for leaf in leaves):
            return func(*args, **kwargs)
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        out = self._run(func, name, args, kwargs, inputs)
        if self.watcher is not None:
            self.watcher(func, inputs, _tensors(out))
        return out

    def _run(self, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        small = sum(t.numel() for t in inputs) <= self.limit
        if name == "equal":
            torch.cuda.current_stream().synchronize()
            return func(*_mapped(_on_host, args)) if small else True
        if name in _SIZED_BY_VALUES:
            return self._sized_by_values(func, args, kwargs, inputs[0].device)
        # Views are made before: an operator may change the shape of its own argument.
        host = _mapped(_on_host, (args, {k: v for k, v in kwargs.items() if k != "out"})) if small else None
        seed = _seed(func, leaves=(args, kwargs), device=_device_of(args, kwargs)) if small else None
        out = func(*args, **kwargs)
        outputs = _tensors(out)
        if host is None or sum(t.numel() for t in outputs) > self.limit or gives_views(func, name, inputs, outputs):
            return out
        self._compute(func, name, host[0], host[1] | _host_out(kwargs), outputs, seed)
        return out

    def _sized_by_values(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        found = func(*_mapped(_on_host, args), **_mapped(_on_host, kwargs))
        torch.cuda.current_stream().synchronize()

        def moved(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor):
                return tensor
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            host_view(made).copy_(tensor)
            return made

        return _mapped(moved, found)

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any, outputs: list[Tensor], seed: int | None) -> None:
        """Now, or at each launch of the graph that is being captured."""
        if name.startswith("foresight_cosine"):
            self._load_cpu_library()
        results = [] if func._schema.is_mutable else [host_view(t) for t in outputs]

        def work() -> None:
            try:
                with torch.no_grad(), _seeded(seed):
                    found = self._found(func, name, args, kwargs)
                for mine, theirs in zip(results, _tensors(found), strict=False):
                    mine.copy_(theirs)
            except Exception as error:
                self.missing[f"{name}: {type(error).__name__}: {str(error)[:200]}"] += 1

        stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
        if library().fake_is_captured(stream):
            self._replayed.capture(work)
        else:
            work()

    def _found(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name not in _INSTEAD:
            return func(*args, **kwargs)
        given = dict(kwargs)
        out = given.pop("out", None)
        if name in FORMULAS or not given:
            found = _INSTEAD[name](*args, **given)
        else:
            found = (func(*args, **given),)
        if out is not None:
            out.copy_(found[0])
        return found

    def _load_cpu_library(self) -> None:
        from mirai_ds.kernels.foresight_cosine import choose

        if not self._cpu_library_tried:
            self._cpu_library_tried = True
            choose("cpu", "cpu")


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(values) if isinstance(leaf, Tensor)]


def _host_out(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"out": _mapped(_on_host, kwargs["out"])} if "out" in kwargs else {}


def gives_views(func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether the operator computed nothing: its outputs are empty, or views of its inputs."""
    if name in _NO_VALUES:
        return True
    if func._schema.is_mutable:
        return False
    places = {t.untyped_storage().data_ptr() for t in inputs if t.device.type == "cuda"} - {0}
    return bool(outputs) and all(t.untyped_storage().data_ptr() in places for t in outputs)


def _device_of(args: Any, kwargs: Any) -> torch.device:
    leaves = [leaf for leaf in _leaves((args, kwargs)) if _names_gpu(leaf)]
    first = leaves[0].device if isinstance(leaves[0], Tensor) else torch.device(leaves[0])
    return first if first.index is not None else torch.device("cuda", torch.cuda.current_device())


def _seed(func: Any, leaves: Any, device: torch.device) -> int | None:
    """For an operator that draws: a number made of the CUDA generator's state, so that the CPU's own is left alone."""
    if torch.Tag.nondeterministic_seeded not in func.tags or torch.cuda.is_current_stream_capturing():
        return None
    given = next((g for g in _leaves(leaves) if isinstance(g, torch.Generator)), None)
    generator = given if given is not None else torch.cuda.default_generators[device.index]
    if generator.device.type != "cuda":
        return None
    state = bytes(generator.get_state().tolist())
    return int.from_bytes(state[:8], "little") * 1_000_003 + int.from_bytes(state[8:16], "little") & (2**63 - 1)


class _seeded:  # noqa: N801
    """The CPU's generator at `seed` within, as it was afterwards; None: leave it alone."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        if self.seed is not None:
            self.kept = torch.get_rng_state()
            torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        if self.seed is not None:
            torch.set_rng_state(self.kept)


_INSTALLED: list[FakeDevice] = []


@contextmanager
def watched(watcher: Watcher) -> Iterator[Counter[str]]:
    """Tell `watcher` of each operator, if any are computed; yields what could not be."""
    missing: Counter[str] = Counter()
    for fake in _INSTALLED:
        fake.missing.clear()
        fake.watcher = watcher
    try:
        yield missing
    finally:
        for fake in _INSTALLED:
            fake.watcher = None
            missing.update(fake.missing)


def not_computed() -> Counter[str]:
    """What could not be computed in this process so far, and why."""
    return sum((fake.missing for fake in _INSTALLED), Counter())


def install() -> None:
    """Give values to every operator of this process, in all its threads, as MIRAI_FAKE_VALUES says: `all`, a number of
    elements from which on nothing is computed, or `none`: then nothing is, and torch.compile compiles."""
    torch.backends.cudnn.enabled = False  # cuDNN is none of the fake's libraries
    torch.backends.cuda.enable_cudnn_sdp(False)
    chosen = os.environ.get("MIRAI_FAKE_VALUES", "all")
    _print_from_host()
    if chosen == "none":
        torch.equal = lambda *_: True  # type: ignore[assignment]  # nothing is known of what no kernel computed
    if chosen == "none" or _INSTALLED:
        return
    _INSTALLED.append(FakeDevice(float("inf") if chosen == "all" else float(chosen)))
    _INSTALLED[0].__enter__()
    # A mode belongs to a thread; those that are started later need it too (autograd's own inherit it).
    begin = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def with_values(thread: threading.Thread) -> None:
        with _INSTALLED[0]:
            begin(thread)

    threading.Thread._bootstrap_inner = with_values  # type: ignore[attr-defined]


def _print_from_host() -> None:
    """torch switches all modes off while it prints a tensor."""
    from torch import _tensor_str

    print_values = _tensor_str._tensor_str
    _tensor_str._tensor_str = lambda tensor, indent: print_values(host_view(tensor), indent)
