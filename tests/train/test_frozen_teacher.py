"""A pretrained, frozen teacher: whose weights it has, that it never changes, and what a resume demands of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.llamagen import write_llamagen
from mirai_ds.config import RunConfig, load
from mirai_ds.engine.engine import parameter_groups
from mirai_ds.foresight import EmaTeacher, MiraiObjective
from mirai_ds.model import GPT, initialise
from mirai_ds.train.checkpoints import Checkpoints, Origin
from mirai_ds.train.teacher import build_teacher
from tests.one_line import one_line
from tests.train.conftest import SMALL, numbers, small_train

TINY = [
    "model.dim=16",
    "model.n_layer=3",
    "model.n_head=2",
    "foresight.projector_dim=16",
    "eval.classifier.enabled=false",
]
FIELD = "foresight.teacher_weights"


def tiny(*overrides: str) -> RunConfig:
    return load("digits-mirai-e", [*TINY, *overrides])


def teacher_of(path: object, *overrides: str) -> tuple[EmaTeacher, str, list[str]]:
    teacher, digest, notes = build_teacher(tiny(f"{FIELD}={path}", *overrides), torch.device("cpu"))
    assert isinstance(teacher, EmaTeacher)
    return teacher, digest, notes


@pytest.fixture(scope="module")
def gpt() -> dict[str, torch.Tensor]:
    model = GPT(tiny().model)
    initialise(model, 5)
    return model.state_dict()


def test_the_average_is_preferred(gpt: dict[str, torch.Tensor], tmp_path: Path) -> None:
    ema = {name: value + 1 for name, value in gpt.items()}
    write_llamagen(tmp_path / "both.pt", gpt, ema)
    write_llamagen(tmp_path / "ema.safetensors", ema, info={"weights": "ema"})
    write_llamagen(tmp_path / "raw.pt", gpt)
    teachers = {name: teacher_of(tmp_path / name) for name in ("both.pt", "ema.safetensors", "raw.pt")}
    for name, wanted, kind in (("both.pt", ema, "ema"), ("ema.safetensors", ema, "ema"), ("raw.pt", gpt, "raw")):
        teacher, digest, notes = teachers[name]
        assert teacher.frozen
        assert all(torch.equal(value, wanted[key]) for key, value in teacher.trunk.named_parameters())
        assert notes == [f"frozen teacher: {tmp_path / name} ({kind} weights), digest {digest[:12]}"]
    digests = [digest for _, digest, _ in teachers.values()]
    assert digests[0] == digests[1] != digests[2]  # of the weights, not of the file


def test_only_what_the_teacher_runs_is_in_the_digest(gpt: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for name, changed in (("a.pt", None), ("b.pt", "output.weight"), ("c.pt", "layers.0.ffn_norm.weight")):
        write_llamagen(tmp_path / name, {k: v + 1 if k == changed else v for k, v in gpt.items()})
    a, b, c = (teacher_of(tmp_path / name)[1] for name in ("a.pt", "b.pt", "c.pt"))
    assert a == b != c


def test_the_engine_keeps_no_group_for_it() -> None:
    """The teacher's blocks are apart in ZeRO only to be refreshed from their shards."""
    owners = []
    for path in ("null", "x.pt"):
        config = tiny(f"{FIELD}={path}", "foresight.warmup_epochs=0")
        objective = MiraiObjective(config.model, config.foresight)
        owners.append({group["owner"] for group in parameter_groups(objective, config)})
    assert owners == [{"teacher", "gpt", "heads"}, {"gpt", "heads"}]


def test_it_is_never_refreshed(gpt: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The average is not even asked; the run's own is gathered before each aligned step, once a version."""
    write_llamagen(tmp_path / "a.pt", gpt)
    asked: list[str] = []

    class Average:
        version = 3

        def gather(self, names: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
            asked.extend(sorted(names))
            return ((name, torch.ones_like(gpt[name], dtype=dtype)) for name in names)

    frozen, _, _ = teacher_of(tmp_path / "a.pt")
    before = {name: value.clone() for name, value in frozen.trunk.state_dict().items()}
    frozen.refresh(Average(), 7)
    assert asked == []
    assert all(torch.equal(value, before[name]) for name, value in frozen.trunk.state_dict().items())
    own, digest, notes = build_teacher(tiny(), torch.device("cpu"))
    assert (digest, notes) == ("", [])
    assert isinstance(own, EmaTeacher)
    for _ in range(2):  # the second time nothing is newer
        own.refresh(Average(), 7)
    assert asked == sorted(own.names)
    assert all(bool((value == 1).all()) for value in own.trunk.parameters())


def test_another_teacher_is_refused_at_a_resume() -> None:
    config = tiny(f"{FIELD}=x.pt")
    info = store.CheckpointInfo(
        4, config.train.global_batch_size, config.seed, 0, 1, 2, "fp32", "mirai-e", "", 4, data="d", teacher="a" * 64
    )
    run = SimpleNamespace(config=config, origin=Origin("d", "a" * 64))
    Checkpoints._check_origin(run, info, "folder")  # type: ignore[arg-type]
    run.origin = Origin("d", "b" * 64)
    one_line(
        lambda: Checkpoints._check_origin(run, info, "folder"),  # type: ignore[arg-type]
        "folder: was trained with another teacher (digest aaaaaaaaaaaa)", f"{FIELD} = 'x.pt'", "(bbbbbbbbbbbb)",
    )  # fmt: skip


def test_mistakes(gpt: dict[str, torch.Tensor], tmp_path: Path) -> None:
    def refused(path: object, *parts: str, overrides: tuple[str, ...] = ()) -> None:
        one_line(lambda: teacher_of(path, *overrides), f"{FIELD} = ", *parts)

    refused(tmp_path / "none.pt", "no such file")
    (tmp_path / "text.pt").write_text("hello")
    refused(tmp_path / "text.pt", "text.pt")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "not a run folder (it has no config.yaml)")
    write_llamagen(tmp_path / "a.pt", gpt)
    refused(tmp_path / "a.pt", "does not fit the model", "the model is 32, 3", overrides=("model.dim=32",))
    lacks = {name: value for name, value in gpt.items() if name != "tok_embeddings.weight"}
    write_llamagen(tmp_path / "b.pt", lacks)
    refused(tmp_path / "b.pt", "1 of", "tok_embeddings.weight")


def test_a_run_is_a_teacher(finished: Path, tmp_path: Path) -> None:
    """Its newest whole checkpoint, or the one whose folder is given; its average, not its raw weights."""
    sizes = [o for o in SMALL if o.startswith("model.")]
    newest, digest, notes = teacher_of(finished, *sizes)
    assert notes == [f"frozen teacher: EMA of {finished} at step 66, digest {digest[:12]}"]
    at_22, other, notes = teacher_of(store.folder_of(finished, 22), *sizes)
    assert "at step 22" in notes[0]
    assert other != digest
    assert not torch.equal(newest.trunk.tok_embeddings.weight, at_22.trunk.tok_embeddings.weight)
    one_line(lambda: teacher_of(store.folder_of(finished, 23), *sizes), FIELD)
    one_line(lambda: teacher_of(finished, *sizes, "model.block_size=16"), "is of a 8x8 grid, this run has 4")
    one_line(lambda: teacher_of(finished, *[*sizes, "model.n_head=4"]), "n_head = 2", "this one has 4")  # shapes fit


def settings(*changes: str) -> dict[str, Any]:
    """12 aligned steps, a checkpoint every 4."""
    dropped = ("checkpoint.", "foresight.warmup", "sampling.", "eval.")
    kept = [o for o in SMALL if not o.startswith(dropped)]
    more = ["checkpoint.every_steps=4", "checkpoint.keep_last=6", "train.max_steps=12", "eval.classifier.enabled=false",
            "eval.loss.at_end=false", "sampling.at_end=false", "eval.loss.every_steps=null",
            "foresight.warmup_epochs=0"]  # fmt: skip
    return {"overrides": [*kept, *more, *changes]}


@pytest.mark.exhaustive
def test_a_run_with_a_frozen_teacher_resumes_exactly(finished: Path, tmp_path: Path) -> None:
    teacher = store.folder_of(finished, 66)
    run, again = tmp_path / "run", tmp_path / "again"
    done = small_train(run, **settings(f"{FIELD}={teacher}"))
    assert done.code == 0, done.out[-2000:] + done.err[-2000:]
    _, digest, _ = teacher_of(teacher, *[o for o in SMALL if o.startswith("model.")])
    assert f"frozen teacher: EMA of {finished} at step 66, digest {digest[:12]}" in done.out
    info = json.loads((store.folder_of(run, 8) / "info.json").read_text())
    assert info["teacher"] == digest
    aligned = [record["loss/alignment"] for record in numbers(run)]
    assert len(set(aligned)) == 12
    shutil.copytree(run, again)
    for step in (8, 12):
        shutil.rmtree(store.folder_of(again, step))
    resumed = small_train(again, "--resume", "auto", **settings(f"{FIELD}={teacher}"))
    assert resumed.code == 0, resumed.out[-2000:] + resumed.err[-2000:]
    assert numbers(again) == numbers(run)
    refused = small_train(
        again, "--resume", "4", **settings(f"{FIELD}={store.folder_of(finished, 22)}", "train.max_steps=13")
    )
    assert refused.code == 2
    assert "was trained with another teacher" in refused.err
    assert "step-00000022" in refused.err
