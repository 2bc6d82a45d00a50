"""What only a GPU can show of the alignment kernel; its values are in tests/kernels, which run there too."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mirai_ds.kernels.foresight_cosine import choose, foresight_cosine
from tests.kernels.cases import BF16, F32, assert_close_to_exact, evaluate, random_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]


def test_auto_takes_the_compiled_kernel() -> None:
    assert choose("auto", "cuda") == choose("cuda", "cuda") == "cuda"


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_equals_the_cpu_kernel(dtype: torch.dtype) -> None:
    """The sizes of GPT-B at batch 8, so that the grid walks more than once."""
    case = random_case(8, 256, 257, 3, 768, dtype)
    on_cpu, on_gpu = evaluate(case, "cpu"), evaluate(case.to("cuda"), "cuda")
    assert float((on_gpu[0].cpu() - on_cpu[0]).abs()) < 2e-7
    assert float((on_gpu[1].cpu() - on_cpu[1]).abs().max()) < 2e-7
    scale = float(on_cpu[2].float().abs().max())
    assert float((on_gpu[2].cpu().float() - on_cpu[2].float()).abs().max()) < 2 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_no_host_sync(upstream: float) -> None:
    """Forward and backward are queued without once waiting for the device."""
    case = random_case(4, 64, 65, 3, 256, BF16).to("cuda")
    leaves = [p.requires_grad_() for p in case.projected]
    received = torch.tensor(upstream, device="cuda")
    foresight_cosine(leaves, *case.rest, kernel="cuda")[0].backward(received)  # compiles, checks the index
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = foresight_cosine(leaves, *case.rest, kernel="cuda")
        loss.backward(received)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inside_a_cuda_graph() -> None:
    case = random_case(4, 64, 65, 3, 256, BF16).to("cuda")
    leaves = [p.requires_grad_() for p in case.projected]

    def step() -> tuple[torch.Tensor, ...]:
        loss, cosine = foresight_cosine(leaves, *case.rest, kernel="cuda", upstream=0.25)
        return loss.detach(), cosine, *torch.autograd.grad(loss * 0.25, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        fresh = random_case(4, 64, 65, 3, 256, BF16, seed=seed)
        with torch.no_grad():
            for leaf, values in zip(leaves, fresh.projected, strict=True):
                leaf.copy_(values)
            case.target.copy_(fresh.target)
        graph.replay()
        torch.cuda.synchronize()
        for mine, theirs in zip(captured, step(), strict=True):
            assert torch.equal(mine, theirs)


def test_on_the_current_stream() -> None:
    """Work queued before on the same stream is seen, with the default stream busy elsewhere."""
    case = random_case(4, 64, 65, 2, 256).to("cuda")
    wanted = evaluate(case, "cuda")
    late = [torch.zeros_like(p) for p in case.projected]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for empty, values in zip(late, case.projected, strict=True):
            empty.copy_(values)
        loss, cosine = foresight_cosine(late, *case.rest, kernel="cuda")
    stream.synchronize()
    assert torch.equal(loss, wanted[0])
    assert torch.equal(cosine, wanted[1])


def test_more_than_2_to_the_31_elements() -> None:
    slots, width = 2**20 + 3, 2056
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    states = torch.empty(1, slots, width, dtype=BF16, device="cuda")
    states.normal_(generator=generator).requires_grad_()
    assert states.numel() > 2**31
    target = torch.randn(1, 5, width, generator=generator, device="cuda")
    index = (torch.arange(slots, device="cuda", dtype=torch.int32) % 5)[:, None]
    one = torch.ones(1, device="cuda")
    loss, _ = foresight_cosine([states], target, index, one, one * slots, kernel="cuda")
    (gradient,) = torch.autograd.grad(loss, [states])
    last = states.detach()[:, -8:].clone().requires_grad_()  # a few rows, with the same divisor
    few, _ = foresight_cosine([last], target, index[-8:].contiguous(), one, one * slots, kernel="cuda")
    (wanted,) = torch.autograd.grad(few, [last])
    assert torch.equal(gradient[:, -8:], wanted)
    total = 0.0
    for part in torch.arange(slots, device="cuda").split(2**17):
        rows = states.detach()[0, part].float()
        total += float(torch.cosine_similarity(rows, target[0, index[part, 0].long()], dim=-1).double().sum())
    assert float(loss.detach()) == pytest.approx(-total / slots, rel=1e-4, abs=1e-6)


def test_a_wrong_index_that_nobody_checked_stops_the_kernel() -> None:
    """Called past the wrapper's check (as a compiled graph does): an assertion on the device, no read out of bounds."""
    code = (
        "import torch\n"
        "from mirai_ds.kernels.foresight_cosine import choose\n"
        "choose('cuda', 'cuda')\n"
        "one = torch.ones(1, device='cuda')\n"
        "index = torch.tensor([[3]], dtype=torch.int32, device='cuda')\n"
        "torch.ops.mirai.foresight_cosine([torch.ones(1, 1, 8, device='cuda')], torch.ones(1, 3, 8, device='cuda'), "
        "index, one, one, False, 1.0, True, True)\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "assert" in done.stderr


def test_the_index_is_checked_again_when_it_changes() -> None:
    case = random_case(2, 9, 11, 2, 16).to("cuda")
    foresight_cosine(case.projected, *case.rest, kernel="cuda")
    case.index[3, 1] = 11
    with pytest.raises(IndexError, match="index reaches 11, target has 11 rows"):
        foresight_cosine(case.projected, *case.rest, kernel="cuda")


def test_the_sizes_of_training_against_float64() -> None:
    for width, heads in ((768, 3), (1024, 1), (1280, 3)):
        case = random_case(4, 256, 257, heads, width, BF16).to("cuda")
        assert_close_to_exact(case, evaluate(case, "cuda"))
