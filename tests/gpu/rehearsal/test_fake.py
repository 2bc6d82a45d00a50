"""The fake itself: it must refuse what CUDA refuses, see what a profiler sees, and never pass for a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.rehearsal

# Of each way to break a capture: what is done inside of it.
BREAKING = {
    "a host wait": "x.sum().item()",
    "a device-wide wait": "torch.cuda.synchronize()",
    "a pageable copy back": "x.cpu()",
    "an unjoined stream": "with torch.cuda.stream(side): side.wait_stream(main); y.add_(1)",
    "work of before": "main.wait_event(before)",
    "an event's query": "inside.record(); inside.query()",
}
CAPTURE = """
import torch
x, y = torch.zeros(8, device="cuda"), torch.zeros(8, device="cuda")
side, main, before, inside = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.Event()
before.record()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph, stream=main):
        x.add_(1)
        {inside}
except RuntimeError as error:
    print("REFUSED", str(error).splitlines()[0])
else:
    for _ in range(3):
        graph.replay()
    print("REPLAYED", x.tolist()[0], y.tolist()[0])
"""


@pytest.mark.parametrize("inside", BREAKING.values(), ids=BREAKING)
def test_a_capture_refuses_what_cuda_refuses(run_code: Callable[..., str], inside: str) -> None:
    assert "REFUSED" in run_code(CAPTURE.format(inside=inside))


def test_a_graph_computes_at_each_replay(run_code: Callable[..., str]) -> None:
    """Captured work is done when the graph is launched, not while it is captured; streams that join are part of it."""
    assert run_code(CAPTURE.format(inside="pass")).strip() == "REPLAYED 3.0 0.0"
    joined = "side.wait_stream(main)\n        with torch.cuda.stream(side): y.add_(2)\n        main.wait_stream(side)"
    assert run_code(CAPTURE.format(inside=joined)).strip() == "REPLAYED 3.0 6.0"


COUNTED = """
import json, torch
from tests.gpu.rehearsal.library import Trace
x, pageable = torch.ones(1 << 18, device="cuda"), torch.ones(1 << 18)
pinned = pageable.pin_memory()
with Trace() as trace:
    x.copy_(pageable, non_blocking=True)
    x.copy_(pinned, non_blocking=True)
    x.mul_(2)
    x[0].item()
    torch.cuda.synchronize()
print(json.dumps({
    "pageable": trace.bytes("copy", "to device, pageable"), "pinned": trace.bytes("copy", "to device, pinned"),
    "kernels": trace.count("kernel"), "waits": sorted(call for call, _ in trace.waits),
    "name": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
}))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_what_is_counted(run_code: Callable[..., str], capability: int) -> None:
    found = json.loads(run_code(COUNTED, capability=capability))
    assert found["pageable"] == found["pinned"] == 4 << 18
    assert found["kernels"] == 1
    assert {"cudaDeviceSynchronize", "cudaStreamSynchronize"} <= set(found["waits"])
    assert found["name"].endswith("(fake)")
    assert found["capability"] == [capability // 10, 0]


def test_memory_is_finite_and_devices_are_chosen(run_code: Callable[..., str]) -> None:
    code = """
import torch
print(torch.cuda.device_count(), torch.cuda.mem_get_info()[1] >> 30)
try:
    torch.empty(3 << 30, dtype=torch.uint8, device="cuda")
except torch.cuda.OutOfMemoryError:
    print("OUT OF MEMORY")
"""
    found = run_code(code, gpus=3, memory_gb=2, env={"CUDA_VISIBLE_DEVICES": "1,2"})
    assert found.split("\n")[:2] == ["2 2", "OUT OF MEMORY"]
