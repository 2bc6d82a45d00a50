"""The tests that need a GPU run on a fake one, so that none of them meets its first bug on a rented machine.

What is left out here, and why: of tests/gpu/test_foresight_cosine.py what looks into our own CUDA kernel, which does
not run on a fake (tests/kernels runs its source on the CPU instead); `zero_trains_gpt_b` and `vq16` would take an hour
at full size (test_steps.py has the same at a small one); test_memory.py is test_real_sizes.py; of the samplers' tests
one for each way to draw.
"""

from __future__ import annotations

import re

import pytest

from mirai_ds.kernels import build
from mirai_ds.kernels.toolchain import BuildError
from tests.gpu.rehearsal.conftest import FakeGpu

pytestmark = pytest.mark.rehearsal


def skip_without_kernel() -> None:
    """E.g. where nvcc is of another release than torch's CUDA."""
    try:
        build.steps("cuda")
    except BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("file", "chosen", "count"), [
    ("test_gpu", "not zero_trains and not vq16", 6),
    ("test_no_waiting", "", 15),
    ("test_captured", "", 6),
    ("test_sampling", "graphs and (all or change or cached) or cached or many_images", 4),
    ("test_resilience", "zero2", 1),
    ("test_foresight_cosine", "not 2_to_the_31 and not stops_the_kernel", 9),
])  # fmt: skip
def test_they_pass_on_a_fake_one(fake_gpu: FakeGpu, file: str, chosen: str, count: int) -> None:
    if file == "test_foresight_cosine":
        skip_without_kernel()
    done = fake_gpu("-m", "pytest", "-q", "-m", "gpu", f"tests/gpu/{file}.py", "-k", chosen)
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None
    assert "skipped" not in done.stdout
    assert int(found[1]) == count, done.stdout
