"""The compiled fake as Python sees it: its trace, who makes the host wait, which device is which."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FrameType, TracebackType
from typing import Any

# In the order of `Kind` in fake_cuda/fake.h.
KINDS = (
    "kernel", "copy", "memset", "wait", "allocate", "free", "record", "wait for event", "graph", "collective", "stray",
)  # fmt: skip
# Frames below which whoever asked is looked for: torch, this folder, and DeepSpeed's thin layer over torch.cuda.
_THROUGH = ("/accelerator/", "/utils/nvtx", "/rehearsal/")


class _Event(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int), ("device", ctypes.c_int), ("name", ctypes.c_char_p), ("stream", ctypes.c_void_p),
        ("bytes", ctypes.c_ulonglong), ("to", ctypes.c_void_p), ("source", ctypes.c_void_p),
    )  # fmt: skip


@dataclass(frozen=True)
class Event:
    """One thing that was asked of a device: its kind (of `KINDS`), the physical device, the name of the kernel, copy or
    call, the stream's address, and bytes (of a kernel: its blocks)."""

    kind: str
    device: int
    name: str
    stream: int
    bytes: int


@cache
def library() -> ctypes.CDLL:
    """The fake that this process was started with."""
    found = ctypes.CDLL(os.environ["MIRAI_FAKE_LIBRARY"])
    found.fake_events.argtypes = [ctypes.POINTER(ctypes.POINTER(_Event))]
    found.fake_events.restype = found.fake_used.restype = ctypes.c_size_t
    found.fake_demangle.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    found.fake_is_captured.argtypes = [ctypes.c_void_p]
    found.fake_launches.restype = ctypes.c_long
    found.fake_capture_call.argtypes = [ctypes.c_void_p, ctypes.c_long]
    return found


def readable(name: str) -> str:
    """A kernel's name as a person writes it."""
    out = ctypes.create_string_buffer(4096)
    library().fake_demangle(name.encode(), out, len(out))
    return out.value.decode()


def asker() -> str:
    """`file:function` of the innermost frame of the project or of DeepSpeed; `torch` where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        project = "/mirai_ds/" in path or ("/kernels/" in path and "site-packages" not in path)
        if (project or "/deepspeed/" in path) and not any(part in path for part in _THROUGH):
            for root in ("/mirai_ds/", "/kernels/", "/deepspeed/"):
                if root in path:
                    return f"{root[1:]}{path.rsplit(root, 1)[1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


class Trace:
    """What was asked of the devices between entry and exit, and who made the host wait."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.waits: Counter[tuple[str, str]] = Counter()  # (call, asker)

    def __enter__(self) -> Trace:
        watch_waits(lambda call: self.waits.update([(call, asker())]))
        library().fake_trace_start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        library().fake_trace_stop()
        watch_waits(None)
        first = ctypes.POINTER(_Event)()
        count = library().fake_events(ctypes.byref(first))
        self.events = [
            Event(KINDS[e.kind], e.device, (e.name or b"").decode(), e.stream or 0, e.bytes) for e in first[:count]
        ]

    def count(self, kind: str, name: str = "") -> int:
        """How many events are of this kind and have `name` within their name."""
        return sum(event.kind == kind and name in event.name for event in self.events)

    def bytes(self, kind: str, name: str = "") -> int:
        """The bytes of those."""
        return sum(event.bytes for event in self.events if event.kind == kind and name in event.name)

    def launches(self) -> Counter[str]:
        """Kernels by readable name."""
        names = Counter(event.name for event in self.events if event.kind == "kernel")
        return Counter({readable(name): count for name, count in names.items()})

    def devices(self) -> set[int]:
        """The physical devices that kernels ran on."""
        return {event.device for event in self.events if event.kind == "kernel"}


_Watcher = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_Numbered = ctypes.CFUNCTYPE(None, ctypes.c_long)
_watcher: Any = None  # C has its address: it must stay


def watch_waits(watcher: Callable[[str], Any] | None) -> None:
    """Call `watcher` with the name of each CUDA call that makes the host wait, in the thread that waits."""
    global _watcher
    _watcher = None if watcher is None else _Watcher(lambda call: watcher(call.decode()) and None)
    library().fake_watch_waits(_watcher)


class Replayed:
    """Functions that each launch of a graph calls again, at the place where they were captured."""

    def __init__(self) -> None:
        self._functions: list[Callable[[], Any]] = []
        self._call = _Numbered(lambda number: self._functions[number]() and None)

    def capture(self, function: Callable[[], Any]) -> None:
        """Make `function` a part of the graph that is being captured now."""
        self._functions.append(function)
        library().fake_capture_call(ctypes.cast(self._call, ctypes.c_void_p), len(self._functions) - 1)
