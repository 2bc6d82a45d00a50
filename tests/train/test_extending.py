"""The examples of docs/extending.md, as they stand there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mirai_ds.checkpoint.store import read_info
from mirai_ds.config import load
from mirai_ds.config.run_config import HOOK_NAMES
from mirai_ds.foresight import MiraiObjective
from mirai_ds.foresight.methods import METHODS
from mirai_ds.model import initialise
from mirai_ds.train.hooks.registry import HOOKS, build_hooks
from tests.one_line import one_line

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (mirai-ds .*)$", PAGE, re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of the page, each named by its first line."""
    for block in re.findall(r"```(?:yaml|python)\n(.*?)```", PAGE, re.DOTALL):
        name = block.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(block, encoding="utf-8")
    return tmp_path


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mirai_ds", *shlex.split(command)[1:], "--ranks", "1"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=180, env=env)


def test_a_recipe(folder: Path) -> None:
    done = run(folder, COMMANDS[0])
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / "runs/mine/metrics.jsonl").read_text().splitlines()]
    heads = {name for line in lines for name in line if name.startswith("cosine/")}
    assert heads == {"cosine/head1_down0_right0", "cosine/head2_down0_right2", "cosine/head3_down2_right0"}


def test_a_hook(folder: Path) -> None:
    done = run(folder, COMMANDS[1])
    assert done.returncode == 0, done.stdout + done.stderr
    run_folder = folder / "runs/mine"
    assert (run_folder / "outcome").read_text() == "stopped gradients above 0.0 for 3 steps\n"
    assert "WARNING rank 0: gradient norm" in (run_folder / "log.txt").read_text()
    assert read_info(run_folder / "checkpoints/step-00000003").hooks == {"alarm:GradientAlarm": {"above": 3}}
    again = run(folder, f"{COMMANDS[1]} --resume auto")  # it remembers: one more step is one too many
    assert again.returncode == 0, again.stdout + again.stderr
    assert read_info(run_folder / "checkpoints/step-00000004").hooks == {"alarm:GradientAlarm": {"above": 4}}


def test_a_method(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "mirai-e", METHODS["mirai-e"])  # put back afterwards
    exec((folder / "distances.py").read_text(), {})
    config = load(str(folder / "mine.yaml"))
    objective = MiraiObjective(config.model, config.foresight)
    initialise(objective, 0)
    tokens, labels = torch.arange(2 * 64).view(2, 64) % 17, torch.tensor([1, 2])
    teacher = METHODS["mirai-e"].teacher(config, torch.device("cpu"))
    target = torch.ones(2, 65, 16)
    loss, metrics = objective(tokens, labels, None, target, 0.5)
    assert teacher.feature_dim == 16
    states = objective.gpt(tokens[:, :-1], labels, None, (2,)).hidden[2]
    for k, head in enumerate(objective.projectors):
        seen = objective.index[:, k] >= 0
        error = (head(states) - 1).square().mean(-1)[:, seen].mean()
        assert float(metrics["distance"][k]) == pytest.approx(float(error.detach()), rel=1e-5)
    expected = metrics["ntp"] + 0.5 * (objective.head_weights * metrics["distance"]).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)


def test_data(folder: Path) -> None:
    subprocess.run([sys.executable, "codes.py"], cwd=folder, check=True)
    done = run(folder, COMMANDS[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "runs/mine/outcome").read_text() == "finished at step 2\n"


def test_hooks_are_named_in_the_configuration(folder: Path) -> None:
    assert list(HOOKS) == list(HOOK_NAMES) == load("digits-mirai-e").hooks
    for hooks, said in (
        ("[log, spik, stop]", "hooks = 'spik': did you mean 'spike'?; your own is package.module:Class"),
        ("[log, stop, log]", "names a hook twice; keep one"),
        ("[stop, log]", "must begin with log, which opens the files, and hold stop"),
        ("[log, spike]", "must begin with log, which opens the files, and hold stop"),
    ):
        one_line(lambda hooks=hooks: load("digits-mirai-e", [f"hooks={hooks}"]), said)
    one_line(lambda: build_hooks(["nowhere.at_all:Hook"], None), "hooks = 'nowhere.at_all:Hook': cannot be imported")  # type: ignore[arg-type]
    one_line(lambda: build_hooks(["pathlib:Path"], None), "is no subclass of mirai_ds.train.loop.Hook")  # type: ignore[arg-type]
