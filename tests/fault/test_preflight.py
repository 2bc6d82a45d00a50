"""What is checked before the first step, and that it names rank, host, value and fix."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mirai_ds.config import UserError
from mirai_ds.train.preflight import check_device
from tests.fault.faulty_ranks import run_ranks


def pretend(what: str) -> None:
    """Something is wrong on rank 1."""
    if os.environ["RANK"] != "1":
        return
    from mirai_ds.train import preflight

    if what == "code":
        preflight.code_version = lambda: "0badc0de"
    elif what == "packages":
        mine = {**preflight.package_versions(), "torch": "2.8.0"}
        preflight.package_versions = lambda: mine
    elif what == "clock":
        real = preflight.time.time
        preflight.time = type("Clock", (), {"time": staticmethod(lambda: real() + 300)})  # type: ignore[assignment]
    elif what == "folder":
        preflight.path_of = lambda run, number: Path("/nowhere")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("code", "runs code 0badc0de, rank 0 on "),
        ("packages", "has torch 2.8.0, rank 0 on "),
        ("clock", "s apart (guard.max_clock_skew_seconds = 60)"),
        ("folder", "put it on a file system all nodes share"),
    ],
)
def test_a_rank_that_is_not_like_the_others(tmp_path: Path, what: str, said: str) -> None:
    run = tmp_path / "run"
    ended = run_ranks(run, prepare=pretend, arguments=(what,))
    assert ended.codes == [2, 2], ended.out[-3000:]
    assert ended.outcome.startswith("failed preflight: ")
    assert said in ended.outcome
    assert ended.out.count("mirai-ds: error:") == 1
    assert not (run / "checkpoints").exists()


def test_a_device_that_computes_wrongly() -> None:
    cpu = torch.device("cpu")
    check_device(cpu)
    with pytest.raises(UserError, match=r"device cpu multiplies matrices wrongly; take the node out of service"):
        check_device(cpu, lambda a, b: a @ b + (torch.arange(64) == 7))


def test_another_configuration_on_one_rank(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = run_ranks(run, prepare=other_settings, arguments=())
    assert ended.codes == [2, 2], ended.out[-3000:]
    assert "rank 1 on " in ended.outcome
    assert "has another configuration than rank 0 on" in ended.outcome


def other_settings() -> None:
    if os.environ["RANK"] == "1":
        from mirai_ds.train import __main__ as entry

        load = entry.load
        entry.load = lambda recipe, overrides, file: load(recipe, [*overrides, "optimizer.lr=0.5"], file)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file where the folder should be: nobody may write there, root included."""
    (tmp_path / "run").write_text("")
    ended = run_ranks(tmp_path / "run", "--resume", "if-present")
    assert ended.codes == [2, 2]
    assert "cannot be written" in ended.out
    assert "Traceback" not in ended.out
