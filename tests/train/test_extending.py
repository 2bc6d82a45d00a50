"""The examples of docs/extending.md, as they stand there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mirai_ds.checkpoint.store import read_info
from mirai_ds.config import RunConfig, load
from mirai_ds.config.data_config import SOURCES as TRAITS
from mirai_ds.config.foresight_config import TEACHERS
from mirai_ds.config.run_config import HOOK_NAMES
from mirai_ds.data import load_dataset
from mirai_ds.data.sources import SOURCES
from mirai_ds.foresight import MiraiObjective, index_table
from mirai_ds.foresight.methods import METHODS
from mirai_ds.model import initialise
from mirai_ds.train.hooks.registry import HOOKS, build_hooks
from tests.one_line import one_line
from tests.warm_start import Done, warm_mirai_ds

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (mirai-ds .*)$", PAGE, re.MULTILINE)


def command(part: str) -> str:
    """The page's only command with `part` in it."""
    (found,) = [line for line in COMMANDS if part in line]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of the page, each named by its first line."""
    for block in re.findall(r"```(?:yaml|python)\n(.*?)```", PAGE, re.DOTALL):
        name = block.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(block, encoding="utf-8")
    return tmp_path


def lines_of(run_folder: Path) -> list[dict[str, float]]:
    """Of metrics.jsonl, those with the step's own values."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/total" in line]


# To a command of the page: the same on a model of mine.yaml's size.
SMALLER = "--set model.dim=16 --set model.n_layer=3 --set model.n_head=2 --set foresight.projector_dim=16"


def run(folder: Path, command: str) -> Done:
    env = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    return warm_mirai_ds(*shlex.split(command)[1:], "--ranks", "1", env=env, cwd=folder)


def test_a_recipe(folder: Path) -> None:
    done = run(folder, COMMANDS[0])
    assert done.code == 0, done.out + done.err
    lines = [json.loads(line) for line in (folder / "runs/mine/metrics.jsonl").read_text().splitlines()]
    heads = {name for line in lines for name in line if name.startswith("cosine/")}
    assert heads == {"cosine/head1_down0_right0", "cosine/head2_down0_right2", "cosine/head3_down2_right0"}


def test_a_hook(folder: Path) -> None:
    done = run(folder, COMMANDS[1])
    assert done.code == 0, done.out + done.err
    run_folder = folder / "runs/mine"
    assert (run_folder / "outcome").read_text() == "stopped gradients above 0.0 for 3 steps\n"
    assert "WARNING rank 0: gradient norm" in (run_folder / "log.txt").read_text()
    assert read_info(run_folder / "checkpoints/step-00000003").hooks == {"alarm:GradientAlarm": {"above": 3}}
    again = run(folder, f"{COMMANDS[1]} --resume auto")  # it remembers: one more step is one too many
    assert again.code == 0, again.out + again.err
    assert read_info(run_folder / "checkpoints/step-00000004").hooks == {"alarm:GradientAlarm": {"above": 4}}


def test_a_neighbour_layout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    config = load("digits-mirai-e", ["foresight.layout=mirrored:LAYOUT"]).foresight
    table = index_table(config, 8)
    # Mirai-E's rows are the teacher's slots: cell n is held by slot 1 + n.  Cell 0 is in row 0, column 0.
    assert table[1].tolist() == [1 + 7, 1 + 15, 1 + 23]
    assert table[1 + 63 - 8].tolist() == [1 + 6 * 8 + 0, 1 + 7 * 8 + 0, -1]
    assert run(folder, f"{command('mirrored:LAYOUT')} {SMALLER}").code == 0
    assert "cosine/head3_down0_right2" in lines_of(folder / "runs/mirrored")[-1]


def test_a_method(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    config = load(str(folder / "mine.yaml"), ["foresight.method=distances:METHOD"])
    assert (config.foresight.teacher, config.foresight.num_heads) == ("gpt", 3)
    objective = MiraiObjective(config.model, config.foresight)
    initialise(objective, 0)
    tokens, labels = torch.arange(2 * 64).view(2, 64) % 17, torch.tensor([1, 2])
    target = torch.ones(2, 65, 16)
    loss, metrics = objective(tokens, labels, None, target, 0.5)
    states = objective.gpt(tokens[:, :-1], labels, None, (2,)).hidden[2]
    for k, head in enumerate(objective.projectors):
        seen = objective.index[:, k] >= 0
        error = (head(states) - 1).square().mean(-1)[:, seen].mean()
        assert float(metrics["distance"][k]) == pytest.approx(float(error.detach()), rel=1e-5)
    expected = metrics["ntp"] + 0.5 * (objective.head_weights * metrics["distance"]).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    done = run(folder, command("distances:METHOD"))
    assert done.code == 0, done.out + done.err
    last = lines_of(folder / "runs/distances")[-1]
    weighted = 2 * sum(value for name, value in last.items() if name.startswith("distance/"))
    assert last["loss/alignment"] == pytest.approx(weighted, rel=1e-6)
    assert load(str(folder / "runs/distances/config.yaml")).foresight.method == "distances:METHOD"


def test_an_encoder(folder: Path) -> None:
    done = run(folder, f"{command('edges:Edges')} {SMALLER}")
    assert done.code == 0, done.out + done.err
    assert (folder / "runs/edges/outcome").read_text() == "finished at step 2\n"
    assert "cosine/head1_down0_right0" in lines_of(folder / "runs/edges")[-1]
    sys.path.insert(0, str(folder))
    try:
        from edges import Edges  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(folder))
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    images[:, :, :, 2:] = 255
    out = Edges(None, 2, torch.device("cpu")).features(None, None, images)
    assert out[0].tolist() == [[0.0, 0.0, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 0.5], [1.0, 0.0, 0.0]]


def test_a_tracker(folder: Path) -> None:
    done = run(folder, f"{command('latest:Latest')} --set logging.every_steps=1")
    assert done.code == 0, done.out + done.err
    told = [line.split() for line in (folder / "runs/latest/latest.txt").read_text().splitlines()]
    newest: dict[str, tuple[int, float]] = {}
    for line in [json.loads(line) for line in (folder / "runs/latest/metrics.jsonl").read_text().splitlines()]:
        newest |= {tag: (line["step"], value) for tag, value in line.items() if tag not in ("step", "epoch")}
    assert {tag: (int(step), float(value)) for tag, step, value in told} == newest
    assert newest["loss/ntp"][0] == 2
    assert (folder / "runs/latest/tensorboard").is_dir()


def test_a_source(folder: Path) -> None:
    done = run(folder, command("stripes:stripes"))
    assert done.code == 0, done.out + done.err
    assert (folder / "runs/stripes/outcome").read_text() == "finished at step 2\n"


def test_a_fused_operation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    import scaled_norm  # type: ignore[import-not-found]

    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(scaled_norm.scaled_norm, (x,))
    assert torch.autograd.gradcheck(scaled_norm.scaled_norm, (x,))
    assert torch.equal(scaled_norm.scaled_norm(x), scaled_norm.reference(x))


def test_own_objects_that_are_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)

    def refused(setting: str, said: str, start: Callable[[RunConfig], object] = lambda config: None) -> None:
        one_line(lambda: start(load("digits-mirai-e", [setting, "data.path=null"])), said)

    refused("foresight.method=miraie", "foresight.method = 'miraie': did you mean 'mirai-e'?; your own is package")
    refused("foresight.method=distances:nothing", "cannot be imported (module 'distances' has no attribute 'nothing')")
    refused("foresight.method=pathlib:Path", "is no mirai_ds.foresight.methods.ForesightMethod")
    refused("foresight.layout=3d", "foresight.layout = '3d': use one of: 1d, 2d; your own")
    refused(
        "foresight.layout=pathlib:Path", "is no instance of a NeighbourLayout", lambda c: index_table(c.foresight, 8)
    )
    refused("data.source=digit", "data.source = 'digit': did you mean 'digits'?; your own is package.module:name")
    refused(
        "data.source=builtins:repr",
        "must return a mirai_ds.data.TokenSource, not str",
        lambda c: load_dataset(c.data, c.model),
    )


def test_every_method_is_known_to_the_configuration() -> None:
    assert {name: method.targets for name, method in METHODS.items()} == TEACHERS
    assert set(SOURCES) == set(TRAITS)


def test_data(folder: Path) -> None:
    subprocess.run([sys.executable, "codes.py"], cwd=folder, check=True)
    done = run(folder, command("codes.npz"))
    assert done.code == 0, done.out + done.err
    assert (folder / "runs/mine/outcome").read_text() == "finished at step 2\n"


def test_hooks_are_named_in_the_configuration(folder: Path) -> None:
    assert list(HOOKS) == list(HOOK_NAMES) == load("digits-mirai-e").hooks
    for hooks, said in (
        ("[log, spik, stop]", "hooks = 'spik': did you mean 'spike'?; your own is package.module:name"),
        ("[log, stop, log]", "names a hook twice; keep one"),
        ("[stop, log]", "must begin with log, which opens the files, and hold stop"),
        ("[log, spike]", "must begin with log, which opens the files, and hold stop"),
    ):
        one_line(lambda hooks=hooks: load("digits-mirai-e", [f"hooks={hooks}"]), said)
    one_line(lambda: build_hooks(["nowhere.at_all:Hook"], None), "hooks = 'nowhere.at_all:Hook': cannot be imported")  # type: ignore[arg-type]
    one_line(lambda: build_hooks(["pathlib:Path"], None), "is no subclass of mirai_ds.train.loop.Hook")  # type: ignore[arg-type]
