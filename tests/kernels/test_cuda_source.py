"""cuda.cu and cuda_op.cpp compiled as C++ and run thread by thread on the CPU: the CUDA kernels' arithmetic, indexing,
tails and reductions are tested where there is no GPU.  What only a GPU can show is in the tests marked `gpu`."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mirai_ds.kernels import build, toolchain
from tests.kernels.cases import BF16, F16, F32, Case, assert_close_to_exact, evaluate, random_case
from tests.once import once

SOURCES = build.HERE / "foresight_cosine"
SHIM = Path(__file__).parent / "cuda_on_cpu"


def as_cpp(text: str) -> str:
    """CUDA's launches as calls of the emulator, and the op under a name of its own, for CPU tensors."""
    text, launches = re.subn(
        r"([\w:]+(?:<[^<>]*>)?(?:\([^()]*\))?)<<<((?:[^<>]|<[^<>]*>)*?), (\w+), 0, stream>>>\(\s*([^;]*)\);",
        r"emulator::launch(\2, \3, [=] { \1(\4); });",
        text,
    )
    assert launches == text.count("emulator::launch")
    text = text.replace("TORCH_LIBRARY_IMPL(mirai, CUDA, m)", "TORCH_LIBRARY(mirai_emulated, m)")
    return text.replace("m.impl(", "m.def(")


def compile_into(folder: Path) -> None:
    """emulated.so."""
    compiler = toolchain.host_compiler()
    assert compiler is not None
    code = (SOURCES / "cuda.cu").read_text(encoding="utf-8")
    assert code.count("<<<") == 3
    (folder / "cuda.cpp").write_text(as_cpp(code), encoding="utf-8")
    (folder / "cuda_op.cpp").write_text(as_cpp((SOURCES / "cuda_op.cpp").read_text(encoding="utf-8")), encoding="utf-8")
    headers = toolchain.torch_folder() / "include"
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", f"-I{SHIM}", f"-I{SOURCES}", f"-isystem{headers}"]
    flags += [f"-isystem{headers}/torch/csrc/api/include", f"-L{toolchain.torch_folder() / 'lib'}"]
    flags += [flag for flag in toolchain.host_flags("cuda") if flag.startswith("-D")]
    jobs = [
        subprocess.Popen([compiler, *flags, "-c", str(folder / name), "-o", str(folder / name) + ".o"])
        for name in ("cuda.cpp", "cuda_op.cpp")
    ]
    assert [job.wait() for job in jobs] == [0, 0]
    objects = [str(path) for path in folder.glob("*.o")]
    library = str(folder / "emulated.so")
    subprocess.run([compiler, *flags, "-shared", *objects, "-o", library, "-lc10", "-ltorch_cpu"], check=True)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """torch.ops.mirai_emulated."""
    torch.ops.load_library(str(once(tmp_path_factory, "cuda_on_cpu", compile_into) / "emulated.so"))
    return torch.ops.mirai_emulated


def run(ops: Any, case: Case, with_gradient: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, cosine, gradient) as `evaluate` gives them."""
    loss, cosine, gradients = ops.foresight_cosine(
        case.projected, case.target, case.index, case.weights, case.counts, case.reduction == "mean", 1.0,
        with_gradient, True,
    )  # fmt: skip
    if not with_gradient:
        assert gradients == []
        return loss, cosine, torch.empty(0)
    dtype = case.projected[0].dtype
    assert all(g.dtype == (F32 if dtype == F16 else dtype) for g in gradients)
    stacked = gradients[0] if case.projected[0].dim() == 4 else torch.stack(gradients, 2)
    return loss, cosine, stacked.to(dtype)


@pytest.mark.parametrize("width", [1, 7, 8, 12, 65, 256, 264, 768, 1024, 1032, 1280, 1536, 2050])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16)], ids=str)
def test_every_width(emulated: Any, width: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    case = random_case(2, 9, 11, 3, width, *dtypes)
    assert_close_to_exact(case, run(emulated, case))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("heads", [1, 2, 4, 9, 17])
def test_every_layout(emulated: Any, stacked: bool, reduction: str, heads: int) -> None:
    """More and fewer rows than warps (16 on the emulated device), heads that do not divide them."""
    for batch, slots in ((1, 1), (3, 10)):
        case = random_case(batch, slots, 12, heads, 72, BF16, reduction=reduction, seed=heads)
        case = case.stacked() if stacked else case
        found = run(emulated, case)
        assert_close_to_exact(case, found)
        assert torch.equal(found[0], run(emulated, case, with_gradient=False)[0])


def test_rows_off_the_16_byte_grid_take_the_scalar_path(emulated: Any) -> None:
    case = random_case(2, 9, 11, 2, 64, BF16)
    wanted = run(emulated, case)
    shifted = [torch.cat([p[..., :1], p], -1)[..., 1:] for p in case.projected]
    assert shifted[0].data_ptr() % 16 == 2
    moved = Case(shifted, case.target, case.index, case.weights, case.counts)
    found = run(emulated, moved)
    assert_close_to_exact(moved, found)
    assert float((found[0] - wanted[0]).abs()) < 1e-6


def test_corners_equal_the_cpu_kernel(emulated: Any) -> None:
    """Zeros, norms below the clamp, NaN and infinity: the same finite and the same NaN elements."""
    case = random_case(2, 8, 8, 2, 16)
    case.index[:] = torch.arange(8)[:, None]
    case.index[7] = -1
    states, target = case.projected[0], case.target
    states[0, 0], states[0, 1], states[0, 2], states[0, 3] = 0.0, 1e-14, 1e-11, float("nan")
    states[1, 4, 5], target[1, 5, 2], target[0, 4], target[0, 5] = float("inf"), float("nan"), 0.0, 1e-14
    states[:, 7] = float("nan")
    for mine, theirs in zip(run(emulated, case), evaluate(case, "cpu"), strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9, equal_nan=True)


def test_rescaling(emulated: Any) -> None:
    gradient = torch.randn(777, generator=torch.Generator().manual_seed(0))
    for dtype in (F32, BF16):
        given = [gradient.to(dtype), gradient[:5].to(dtype)]
        same = [g.clone() for g in given]
        emulated.foresight_cosine_rescale_(same, torch.tensor(0.5), 0.5)
        assert all(torch.equal(a, b) for a, b in zip(same, given, strict=True))
        emulated.foresight_cosine_rescale_(same, torch.tensor(3.0), 0.5)
        assert all(torch.equal(a, (b.float() * 6).to(dtype)) for a, b in zip(same, given, strict=True))
        for out in (F32, BF16, F16):
            found = emulated.foresight_cosine_rescale(given, torch.tensor(3.0), 0.5, out)
            assert all(torch.equal(a, (b.float() * 6).to(out)) for a, b in zip(found, given, strict=True))


def test_too_many_heads_is_an_error_not_an_overrun(emulated: Any) -> None:
    with pytest.raises(ValueError, match="at most 64 heads on CUDA, got 65"):
        run(emulated, random_case(1, 2, 2, 65, 8))


def test_an_index_outside_the_target_asserts_before_it_reads(emulated: Any) -> None:
    library = next(path for path in torch.ops.loaded_libraries if path.endswith("emulated.so"))
    code = (
        "import torch\n"
        f"torch.ops.load_library({library!r})\n"
        "one = torch.ones(1)\n"
        "torch.ops.mirai_emulated.foresight_cosine([torch.ones(1, 1, 8)], torch.ones(1, 3, 8), "
        "torch.tensor([[3]], dtype=torch.int32), one, one, False, 1.0, True, True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGABRT
    assert "index out of range" in done.stderr
