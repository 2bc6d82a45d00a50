"""What the GPU did in some steps, by PyTorch's profiler: how long it worked, on how many kernels of what kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

# The first kind whose word is in a kernel's name counts.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("copies and memsets", ("memcpy", "memset")),
    ("matrix products", ("gemm", "cutlass", "nvjet", "xmma", "splitk", "cublas")),
    ("attention", ("flash", "fmha", "sdpa", "attention")),
    ("AdamW", ("adam",)),
    ("alignment kernel", ("mirai",)),
    ("Triton's kernels", ("triton",)),
    ("NCCL", ("nccl",)),
)
OTHER = "eager elementwise"


def kind_of(name: str) -> str:
    """Tells the kind of a kernel from its name."""
    low = name.lower()
    return next((kind for kind, words in KINDS if any(word in low for word in words)), OTHER)


def busy(spans: Iterable[tuple[int, int]]) -> int:
    """Length of the union of (begin, end): kernels on several streams overlap."""
    total = reached = 0
    for begin, end in sorted(spans):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def device_time(launch: Callable[[], Any], steps: int) -> dict[str, Any]:
    """A step's device time in ms, launches and copies, and ms of each kind; zeros where the profiler sees no GPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            launch()
        torch.cuda.synchronize()
    spans, kinds = [], Counter[str]()
    assert profiler.profiler is not None
    for event in profiler.profiler.kineto_results.events():
        if str(event.device_type()).endswith("CUDA"):
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
            kinds[kind_of(event.name())] += event.duration_ns()
    return {
        "busy_ms": busy(spans) / 1e6 / steps, "launches": len(spans) / steps,
        "kinds": {kind: nanoseconds / 1e6 / steps for kind, nanoseconds in kinds.most_common()},
    }  # fmt: skip
