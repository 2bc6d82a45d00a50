"""Plain training steps on a fake GPU: the CPU's numbers, one device, no waits, no pageable copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.gpu.rehearsal.conftest import FakeGpu
from tests.gpu.rehearsal.environment import ROOT

pytestmark = pytest.mark.rehearsal
Case = dict[str, Any]

MODEL = {"size": "custom", "dim": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128, "num_classes": 10, "block_size": 64}
# Between logging points the host waits nowhere on stages 0 to 2.  Elsewhere, each step, in DeepSpeed's own code:
PARTITIONING = "cudaStreamSynchronize in deepspeed/runtime/zero/stage3.py:independent_gradient_partition_epilogue"
GATHERING = "cudaStreamSynchronize in deepspeed/runtime/zero/partition_parameters.py:wait"
WAITS_OF_STAGE_3 = {PARTITIONING: 1.0, GATHERING: 1.0}
# Of fp32 there is no flash attention.  The backward passes of both add in a fixed order where torch is told to be
# deterministic and not merely to warn.  cuDNN's, which has no such order, is none of the fake's libraries.
ATTENTION = {"fp32": {"efficient"}, "bf16": {"flash"}, "bf16-autocast": {"flash"}}


def case(
    method: str = "mirai-e",
    stage: int = 2,
    precision: str = "fp32",
    model: Case | None = None,
    train: Case | None = None,
    zero: Case | None = None,
    foresight: Case | None = None,
) -> Case:
    """A configuration of the small model, for `config.build`."""
    mirai = {"projector_dim": 64} if method.startswith("mirai") else {}
    warm = {"warmup_epochs": 0} if method != "none" else {}
    overlap = {"overlap_comm": False} if stage else {}
    return {
        "model": MODEL | (model or {}),
        "foresight": {"method": method, **warm, **mirai, **(foresight or {})},
        "deepspeed": {"zero_optimization": {"stage": stage, **overlap, **(zero or {})}},
        "train": {"global_batch_size": 8, "precision": precision, "cuda_graph": "off", **(train or {})},
    }


CASES: dict[str, Case] = {
    f"{method}, stage {stage}, {precision}": case(method, stage, precision)
    for stage in range(4)
    for method, precision in (
        ("none", "bf16-autocast"), ("mirai-e", "bf16-autocast"), ("mirai-e", "fp32"), ("mirai-e", "bf16"),
    )
    if (stage, precision) != (0, "bf16")
} | {
    "mtp": case("mtp"),
    "par": case(model={"par_tokens": 4}),
    "mirai-i": case("mirai-i", foresight={"encoder": {"name": "vit_tiny_patch16_224"}}),
    "reference kernel": case(foresight={"kernel": "reference"}),
    "recompute full": case(train={"recompute": {"policy": "full"}}),
    "recompute by deepspeed": case(train={"recompute": {"policy": "full", "implementation": "deepspeed"}}),
    "recompute mlp": case(train={"recompute": {"policy": "mlp"}}),
    "recompute every-n": case(train={"recompute": {"policy": "every-n", "every": 2}}),
    "accumulation": case(train={"micro_batch_size": 4}),
    "whole cross-entropy": case(train={"cross_entropy": "whole"}),
    "not deterministic": case(train={"deterministic": False}),
    "overlap": case(zero={"overlap_comm": True}),
    "optimizer offloaded": case(zero={"offload_optimizer": {"device": "cpu"}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(fake_gpu: FakeGpu, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, Case]]:
    """Of each case what the fake GPU did, and the CPU."""
    folder = tmp_path_factory.mktemp("steps")
    (folder / "cases.json").write_text(json.dumps(CASES), encoding="utf-8")
    script = ["-m", "tests.gpu.rehearsal.steps", str(folder / "cases.json")]
    fake_gpu(*script, str(folder / "gpu.json"))
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *script, str(folder / "cpu.json"), "cpu"], env=env, cwd=ROOT, check=True)
    gpu, cpu = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("gpu", "cpu"))
    return {name: (gpu[name], cpu[name]) for name in CASES}


@pytest.fixture(params=CASES)
def done(request: pytest.FixtureRequest, results: dict[str, tuple[Case, Case]]) -> tuple[str, Case, Case]:
    """A case's name, and what the two devices did."""
    gpu, cpu = results[request.param]
    assert "error" not in gpu, gpu["error"]
    assert "error" not in cpu, cpu["error"]
    return request.param, gpu, cpu


def test_the_numbers_are_the_cpus(done: tuple[str, Case, Case]) -> None:
    """The same operators in the same order over the same numbers.  Only attention is computed by another formula, in
    fp32, where a CPU rounds to bf16 in between: a few roundings of the states that differ."""
    name, gpu, cpu = done
    assert gpu["missing"] == {}
    precision = CASES[name]["train"]["precision"]
    bound = 1e-5 if precision == "fp32" else 4 * 2.0**-8
    for quantity in ("losses", "norms"):
        assert gpu[quantity] == pytest.approx(cpu[quantity], rel=bound), quantity
    assert len(gpu["losses"]) == 4
    assert len(set(gpu["norms"])) == 4


def test_a_step_stays_on_the_device(done: tuple[str, Case, Case]) -> None:
    name, gpu, _ = done
    assert gpu["mixed"] == {}
    if "offloaded" in name:
        return  # DeepSpeed moves gradients and weights as it likes
    assert gpu["pageable"] == 0
    zero = CASES[name]["deepspeed"]["zero_optimization"]
    assert gpu["waits"] == (WAITS_OF_STAGE_3 if zero["stage"] == 3 else {})


def test_attention_is_the_kernel_that_is_expected(done: tuple[str, Case, Case]) -> None:
    name, gpu, _ = done
    kinds = {kernel.removeprefix("_scaled_dot_product_").split("_")[0] for kernel in gpu["attention"]}
    assert kinds == ATTENTION[CASES[name]["train"]["precision"]], gpu["attention"]
