"""What a start that failed says of the next one: `failed` where that would fail again, `requeue` where it may help."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from mirai_ds.cli.errors import mistakes_in_one_line
from mirai_ds.config.errors import UserError
from mirai_ds.runtime.failures import gist, lacking_memory, lost_a_peer, mistake_behind
from tests.fault.faulty_ranks import around_steps, run_ranks

GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.2 GiB of which 1 GiB is free."
ADVICE = " If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True"
NO_MEMORY: list[tuple[BaseException, str]] = [
    (torch.OutOfMemoryError(GPU + ADVICE), "GPU memory"),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere"), "GPU memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU memory"),
    (MemoryError(), "memory of this machine"),
    (OSError(errno.ENOMEM, "Cannot allocate memory", "tokens.bin"), "memory of this machine"),
]
STAYS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENAMETOOLONG]
OTHERS: list[BaseException] = [
    RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError("the driver says no"),
    OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle"), AssertionError("a bug"),
    RuntimeError("[gloo/pair.cc] Connection reset by peer"), KeyboardInterrupt(),
    RuntimeError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "which"), NO_MEMORY)
def test_memory_that_was_never_enough_is_a_mistake_to_mend(error: BaseException, which: str) -> None:
    assert lacking_memory(error) == which
    mistake = mistake_behind(error, steps_done=0)
    assert isinstance(mistake, UserError)
    assert str(mistake).startswith(f"out of {which} before the first step of this start was done (")
    assert "lower train.micro_batch_size" in str(mistake)
    assert "\n" not in str(mistake)
    assert mistake_behind(error, steps_done=1) is None  # another start may find more


def test_torch_itself_is_understood() -> None:
    """Its allocator's own words, not ours: 2**60 bytes no machine has."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert lacking_memory(caught.value) == "memory of this machine"
    assert gist(torch.OutOfMemoryError(GPU + ADVICE)) == GPU


@pytest.mark.parametrize("number", STAYS)
def test_what_the_next_start_would_meet_again(number: int) -> None:
    for steps in (0, 7):
        mistake = mistake_behind(OSError(number, "so it is", "runs/a/x"), steps)
        assert str(mistake) == "runs/a/x: so it is; the earlier checkpoints are intact"


@pytest.mark.parametrize("error", OTHERS)
def test_what_another_start_may_mend(error: BaseException) -> None:
    assert mistake_behind(error, 0) is None
    assert lacking_memory(error) == ""
    assert lost_a_peer(error) == ("peer" in str(error) or "remote server" in str(error))


def no_memory_at(step: int) -> None:
    """In a rank: a step that does not fit."""

    def hungry(inner: Any, session: Any, number: int) -> Any:
        if number == step and session.world.rank == 1:
            raise torch.OutOfMemoryError(GPU + ADVICE)
        return inner(session, number)

    around_steps(hungry)


def test_a_run_that_does_not_fit(tmp_path: Path) -> None:
    """Rank 1 alone has met it, and is heard; later in the run the same may be somebody else's doing."""
    run = tmp_path / "run"
    ended = run_ranks(run, prepare=no_memory_at, arguments=(0,))
    assert (ended.codes[1], ended.codes[0] in (1, 2)) == (2, True), ended.out[-3000:]
    assert ended.outcome.startswith("failed out of GPU memory before the first step of this start was done (CUDA out")
    assert ended.out.count("lower train.micro_batch_size") == 1
    assert "Traceback" not in ended.out
    ended = run_ranks(run, "--fresh", prepare=no_memory_at, arguments=(6,))
    assert ended.outcome.startswith("requeue crashed: rank 1: OutOfMemoryError: CUDA out of memory"), ended.outcome


@pytest.mark.parametrize(("error", "which"), NO_MEMORY)
def test_other_verbs_say_it_in_a_line(error: BaseException, which: str) -> None:
    @click.command()
    @click.option("--batch-size", type=int)
    @mistakes_in_one_line
    def verb(batch_size: int | None) -> None:
        raise error

    done = CliRunner().invoke(verb)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"mirai-ds: error: out of {which} (")
    assert done.stderr.endswith("); smaller batches need less (--batch-size)\n")
    assert len(done.stderr.splitlines()) == 1


def test_other_errors_keep_their_stack() -> None:
    @click.command()
    @mistakes_in_one_line
    def verb() -> None:
        raise RuntimeError("the driver says no")

    assert isinstance(CliRunner().invoke(verb).exception, RuntimeError)
