"""What is checked before the first step, and that it names rank, host, value and fix."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mirai_ds.config import UserError, load
from mirai_ds.config.deepspeed_file import read, resolve
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
        mine = {**preflight.package_versions(), "torch": "1.13.0"}
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
        ("packages", "has torch 1.13.0, rank 0 on "),
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


STARTS = {
    "override": ("optimizer.lr", "0.5, not 0.0"),
    "file": ("deepspeed.zero_optimization.stage", "1, not 2"),
    "edited file": ("deepspeed.gradient_predivide_factor", "8.0, not none"),
    "run folder": ("--run-dir", "other"),
    "fresh": ("--fresh", "true, not false"),
    "environment": ("environment variable NVIDIA_TF32_OVERRIDE", "'1', not none"),
}


@pytest.mark.parametrize("what", STARTS)
def test_ranks_that_were_started_differently(tmp_path: Path, what: str) -> None:
    """They would train together, and what comes out would belong to neither configuration."""
    run = tmp_path / "run"
    ended = run_ranks(run, prepare=started_differently, arguments=(what,))
    field, values = STARTS[what]
    assert ended.codes == [2, 2], ended.out[-3000:]
    assert f"was started with another {field} than rank 0 on " in ended.out
    assert values in ended.out
    assert "start all ranks with the same recipe, files and options" in ended.out
    assert ended.out.count("mirai-ds: error:") == 1
    assert "Traceback" not in ended.out
    assert not run.exists()


def started_differently(what: str) -> None:
    """Rank 1 gets another command, file or environment."""
    if os.environ["RANK"] != "1":
        return
    from dataclasses import replace

    from mirai_ds.config import deepspeed_file
    from mirai_ds.train import __main__ as entry
    from mirai_ds.train import agree

    begin, load = entry.run_rank, entry.load
    if what == "override":
        entry.load = lambda recipe, overrides, file: load(recipe, [*overrides, "optimizer.lr=0.5"], file)
    elif what == "file":
        entry.load = lambda recipe, overrides, file: load(recipe, overrides, "zero1")
    elif what == "edited file":  # the same name on both; what is in it differs from node to node
        agree.read = lambda source: {**deepspeed_file.read(source), "gradient_predivide_factor": 8.0}
    elif what == "run folder":
        entry.run_rank = lambda options: begin(replace(options, run_dir=options.run_dir.with_name("other")))
    elif what == "fresh":
        entry.run_rank = lambda options: begin(replace(options, fresh=True))
    else:
        os.environ["NVIDIA_TF32_OVERRIDE"] = "1"


def test_a_node_that_lacks_the_file(tmp_path: Path) -> None:
    """The other ranks hear of it, and do not wait for half an hour."""
    ended = run_ranks(tmp_path / "run", prepare=without_the_file)
    assert ended.codes == [2, 2], ended.out[-3000:]
    assert "mirai-ds: error: deepspeed = 'mine.json': no such file" in ended.out
    assert ended.out.count("mirai-ds: error:") == 1


def without_the_file() -> None:
    """Rank 1 is on a node without it."""
    from mirai_ds.config import deepspeed_file
    from mirai_ds.train import __main__ as entry
    from mirai_ds.train import agree

    load = entry.load
    entry.load = lambda recipe, overrides, file: load(recipe, overrides, "mine.json")
    if os.environ["RANK"] == "0":
        agree.read = lambda source: deepspeed_file.read("zero1")


def test_a_file_that_changes_after_the_start_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 1}}')
    config = load("digits-mirai-e", (), str(file))
    config.use_deepspeed_file(read(str(file)))
    file.write_text('{"zero_optimization": {"stage": 3}}')
    assert resolve(config, 2)["zero_optimization"]["stage"] == 1
    file.unlink()
    assert resolve(config, 2)["zero_optimization"]["stage"] == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file where the folder should be: nobody may write there, root included."""
    (tmp_path / "run").write_text("")
    ended = run_ranks(tmp_path / "run", "--resume", "if-present")
    assert ended.codes == [2, 2]
    assert "cannot be written" in ended.out
    assert "Traceback" not in ended.out
