"""The doctor's self-test: what it says where all is well, and what each fault becomes in words."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mirai_ds.kernels.toolchain import Architectures, read_arch_names
from mirai_ds.selfcheck import doctor, self_test
from mirai_ds.selfcheck.self_test import CHECKS, in_words, report, run_self_test


def log_of(rank: int, passed: int, error: str = "", noise: str = "") -> str:
    """What a rank writes: `passed` checks are ok, the next one ends with `error`, or with none at all."""
    rows = [{"rank": rank, "check": name, "ok": True, "seconds": 0.5, "detail": ""} for name in CHECKS[:passed]]
    if error:
        rows.append({"rank": rank, "check": CHECKS[passed], "ok": False, "seconds": 0.5, "detail": error})
    return "\n".join([noise, *(json.dumps(row) for row in rows)])


def test_this_machine_passes_it() -> None:
    lines, healthy = run_self_test()
    assert healthy, lines
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(CHECKS)
    assert "kernel: cpu" in lines[2]
    assert "2 ranks, gloo" in lines[3]


def test_a_failed_check_is_told_once_with_its_meaning() -> None:
    error = "CUDA error: no kernel image is available for execution on the device"
    lines, healthy = report([log_of(0, 4), log_of(1, 1, error)], [0, 1], 180)
    assert not healthy
    problems = [line for line in lines if "PROBLEM" in line]
    assert len(problems) == 1
    assert "alignment kernel on rank 1: something is compiled for other GPUs than this one" in problems[0]
    assert error in problems[0]


def test_ranks_that_do_not_answer_are_named() -> None:
    """A collective that hangs: both have passed two checks and say nothing more; one left a word."""
    logs = [log_of(0, 2), log_of(1, 2, noise="terminate called: NCCL error 2"), log_of(2, 0)]
    lines, healthy = report(logs, [None, -6, -11], 180)
    assert not healthy
    assert lines[1:] == [
        "  PROBLEM   collective on rank 0: no answer within 180 s",
        "  PROBLEM   collective on rank 1: its process ended with -6; it said last: NCCL cannot connect the GPUs: "
        "NCCL_DEBUG=WARN says why; in a container give --ipc=host or --shm-size 8g (terminate called: NCCL error 2)",
        "  PROBLEM   matrix product on rank 2: its process ended with -11",
    ]


@pytest.mark.parametrize(("error", "meaning"), [
    ("The NVIDIA driver on your system is too old (found version 11040)", "update it"),
    ("CUDA driver version is insufficient for CUDA runtime version", "update it"),
    ("Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000", "start one rank a GPU"),
    ("ncclUnhandledCudaError: Call to CUDA function failed.", "NCCL_DEBUG=WARN"),
    ("CUDA out of memory. Tried to allocate 20 MiB", "nvidia-smi lists it"),
])  # fmt: skip
def test_errors_in_words(error: str, meaning: str) -> None:
    assert meaning in in_words(error)
    assert error in in_words(error)
    assert in_words("something else\nand more") == "something else"


def test_a_kernel_that_computes_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from mirai_ds.kernels import foresight_cosine as room

    right = room.foresight_cosine

    def wrong(*arguments: Any, kernel: str, **named: Any) -> Any:
        loss, cosine = right(*arguments, kernel=kernel, **named)
        return loss * (1.0 if kernel == "reference" else 1.0001), cosine

    assert self_test.compare_kernel(torch.device("cpu")) == "kernel: cpu"
    monkeypatch.setattr(room, "foresight_cosine", wrong)
    with pytest.raises(RuntimeError, match=r"kernel cpu is .* off the plain computation"):
        self_test.compare_kernel(torch.device("cpu"))


def machine(monkeypatch: pytest.MonkeyPatch, usable: bool, names: list[str], capability: tuple[int, int]) -> Any:
    """A torch that sees one GPU, and a driver that sees `names`."""
    monkeypatch.setattr(doctor, "use_cuda", lambda: usable)
    monkeypatch.setattr(doctor, "gpu_names", lambda: names)
    monkeypatch.setattr(doctor, "unusable_because", lambda: "the driver is too old")
    gpu = SimpleNamespace(name="GPU X", total_memory=80 * 2**30, major=capability[0], minor=capability[1])
    cuda = SimpleNamespace(
        device_count=lambda: 1, get_device_properties=lambda _: gpu, get_arch_list=lambda: ["sm_80", "sm_90"]
    )
    return SimpleNamespace(cuda=cuda, __version__="9.9")


def test_gpus_that_cannot_be_used_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    look = lambda *what: doctor._gpu_lines(machine(monkeypatch, *what))  # noqa: E731
    assert look(True, ["0"], (8, 6)) == (["gpu         GPU X, 80 GiB, sm_86, NCCL"], True)
    assert look(False, [], (8, 0)) == (["gpu         none: ranks run on the CPU with gloo"], True)
    lines, usable = look(False, ["0", "1"], (8, 0))
    assert (lines[-1], usable) == ("  PROBLEM   the driver is too old", False)
    lines, usable = look(True, ["0"], (7, 5))
    assert (lines[-1], usable) == ("  PROBLEM   torch 9.9 is compiled for sm_80, sm_90, not for this sm_75", False)
    lines, usable = look(True, [], (9, 0))
    assert "torch sees GPUs and `mirai-ds train` does not" in lines[-1]
    assert not usable
    lines, usable = look(True, ["MIG-1"], (9, 0))
    assert "a MIG slice: one rank" in lines[-1]
    assert usable


def test_names_of_architectures() -> None:
    assert read_arch_names(["sm_75", "sm_90a", "compute_120"]) == Architectures(("75", "90"), ("120",))
