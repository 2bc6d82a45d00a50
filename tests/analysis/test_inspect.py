"""What `inspect` says of a run folder, whatever state it is in."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mirai_ds.analysis.inspect_report import as_json
from mirai_ds.analysis.inspect_run import inspect_run, kind_of, last_values, lowest_values
from mirai_ds.config import ForesightConfig, ModelConfig
from mirai_ds.config.sizes import parameter_count
from mirai_ds.model import GPT
from mirai_ds.runs.records import parse_curve, size_text
from tests.analysis.fake import (
    ENVIRONMENT,
    cli,
    curve,
    write_checkpoint,
    write_curve,
    write_incarnation,
    write_run,
)
from tests.one_line import one_line


def lines_of(run: Path, *options: str) -> dict[str, list[str]]:
    """Label -> texts of what is printed."""
    done = cli("inspect", run, *options)
    found: dict[str, list[str]] = {}
    label = ""
    for line in filter(None, done.stdout.splitlines()):
        label = line[:12].strip() or label
        found.setdefault(label, []).append(line[13:].strip())
    return found


def test_a_run_is_described(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", name="mine")
    write_checkpoint(run, 40, world_size=4)
    write_checkpoint(run, 80)
    for name in ("samples/step-00000080.png", "samples/tokens.npz", "mine.pt", "config.before-1790000000.yaml"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("x")
    said = lines_of(run)
    assert said["run"][0].startswith(f"{run}: mine, ")
    assert said["model"] == [
        "custom: 6 blocks of width 128, 4 heads, 1.2 M parameters; 17 codes, 64 tokens (8x8), 10 classes"
    ]
    assert said["method"] == [
        "mirai-e, official convention, 3 heads of block 4, lambda [2.0, 2.0, 2.0], from epoch 0.4"
    ]
    assert said["training"] == ["8 epochs, batch 32, lr 0.002 cosine, fp32, EMA 0.98, seed 0, deepspeed zero2"]
    assert said["data"] == ["digits"]
    assert said["starts"][0].endswith("began anew, 2 ranks, code aaaaaaaaaa, torch 2.15.0")
    assert said["progress"] == ["step 80, epoch 2 of 8"]
    assert said["metrics"] == ["step 80: loss/total 2, loss/ntp 2.125, optimizer/lr 0.001"]
    assert said["speed"] == ["step 80: speed/images_per_s 108, memory/peak_gib 1"]
    assert said["held out"] == ["step 80: held_out/ntp_ema 2"]
    assert said["samples"] == ["samples/step-00000080.png"]
    assert said["exports"] == ["mine.pt, samples/tokens.npz"]
    assert said["settings"] == ["were changed at a resume; before: config.before-1790000000.yaml"]
    assert said["resume"][0] == "--resume auto would continue after step 80 if its digests fit (--verify reads them)"
    assert not {"note", "damaged", "left over", "outcome", "held by", "lowest"} & set(said)
    rows = [line.split() for line in cli("inspect", run).stdout.splitlines() if line[:2] in ("40", "80")]
    assert [[r[0], " ".join(r[5:8]), *r[8:]] for r in rows] == [
        ["40", "4 x ZeRO-2", "fp32", "aaaaaaaaaa", "sizes", "fit"],
        ["80", "2 x ZeRO-2", "fp32", "aaaaaaaaaa", "sizes", "fit,", "latest"],
    ]


def test_starts_and_their_resumes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    with (run / "starts.jsonl").open("a") as file:
        for number, extra in enumerate((["--resume", "auto"], ["--resume=40"], ["x"], ["--resume", "if-present"])):
            told = {**ENVIRONMENT, "world_size": number + 1, "command": ["m", *extra], "unix_time": 1_790_000_100}
            file.write(json.dumps(told) + "\n")
        file.write('{"unix_time": "soon", "packages": 3, "command": 7}\n')
        file.write('{"unix_time": 17')
    starts = inspect_run(run).starts
    assert [s.resume for s in starts] == [None, "auto", "40", None, "if-present", None]
    assert [s.ranks for s in starts] == [2, 1, 2, 3, 4, None]
    said = lines_of(run)["starts"]
    assert said[0] == "6; the newest 5:"
    assert said[1].startswith("2: ")
    assert said[1].endswith("--resume auto, 1 rank, code aaaaaaaaaa, torch 2.15.0")
    assert said[5] == "6: unknown time, began anew, unknown ranks, code unknown, torch None"


@pytest.mark.parametrize(
    ("text", "outcome", "said"),
    [
        ("finished 352 steps\n", ("finished", "352 steps"), ["finished 352 steps"]),
        ("requeue", ("requeue", ""), ["requeue"]),
        ("failed NaN in 3 steps", ("failed", "NaN in 3 steps"), ["failed NaN in 3 steps"]),
        ("exploded badly", None, None),
        ("", None, None),
    ],
)
def test_outcome(text: str, outcome: Any, said: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    (run / "outcome").write_text(text)
    assert inspect_run(run).outcome == outcome
    assert lines_of(run).get("outcome") == said


def test_who_holds_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    (run / "incarnations").mkdir()
    write_incarnation(run, 1)
    (said,) = lines_of(run)["held by"]
    assert said.startswith("start 1 (host node7, pid 42, since 2026-")
    assert said.endswith("; has not said that it ended")
    write_incarnation(run, 2, job="77", ended="requeue")
    (run / "incarnations" / "heartbeat").write_text("2 9")
    (said,) = lines_of(run)["held by"]
    assert said.startswith("start 2 (job 77 restart 0, host node7, pid 42, since 2026-")
    assert said.endswith("; ended: requeue")
    (run / "incarnations" / "00003.json").write_text('{"num')
    assert lines_of(run)["held by"] == ["start 3 (says nothing of itself); ended: died at once"]


def test_reports_of_what_went_wrong(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    for number in range(7):
        (run / "nonfinite" / f"step-{number:08d}").mkdir(parents=True)
    (run / "hang").mkdir()
    (run / "hang" / "rank-0.txt").write_text("stack")
    said = lines_of(run)
    assert said["not finite"] == ["7, the newest: " + ", ".join(f"nonfinite/step-{n:08d}" for n in range(2, 7))]
    assert said["hangs"] == ["hang/rank-0.txt"]


def test_numbers_that_are_missing_or_strange(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    rising = [
        {"step": 0, "held_out/ntp_ema": None},
        *curve(),
        {"step": 80, "epoch": 2.0, "held_out/ntp_ema": 2.4},
        {"step": 90, "held_out/ntp_ema": math.nan},
    ]
    write_curve(run, rising, end='{"step": 100, "loss/to')
    report = inspect_run(run)
    assert last_values(report.curve)["loss/ntp"] == (80, 2.125)
    assert last_values(report.curve)["held_out/ntp_ema"][0] == 90
    assert lowest_values(report.curve) == {"held_out/ntp_ema": (40, 2.25)}
    assert report.notes == ["metrics.jsonl: 1 unreadable line"]
    said = lines_of(run)
    assert (said["held out"], said["lowest"]) == (
        ["step 90: held_out/ntp_ema nan"], ["step 40: held_out/ntp_ema 2.25"],
    )  # fmt: skip
    assert json.loads(cli("inspect", run, "--json").stdout)["last"]["held_out/ntp_ema"] == {"step": 90, "value": "nan"}
    for text in ("", "\n\n"):
        (run / "metrics.jsonl").write_text(text)
        assert lines_of(run)["progress"] == ["no metrics were written"]
    (run / "metrics.jsonl").unlink()
    assert lines_of(run)["progress"] == ["no metrics were written"]
    assert parse_curve(b'{"step": 1, "a": 1' + b"0" * 400 + b"}\n").unreadable == [1]


def test_settings_of_another_version_are_shown_as_stored(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("ema:\n  decay: 0.98\n", "flavour: {patience: 3}\n"))
    said = lines_of(run)
    assert said["training"] == ["8 epochs, batch 32, lr 0.002 cosine, fp32, EMA None, seed 0, deepspeed zero2"]
    assert said["model"] == ["custom: 6 blocks of width 128, 4 heads; 17 codes, 64 tokens (8x8), 10 classes"]
    assert said["note"][0].startswith("the configuration is of another version or was edited, shown as it is stored (")
    assert "flavour" in said["note"][0]
    found = as_json(inspect_run(run))
    assert (found["configuration_valid"], found["parameters"]) == (False, None)
    path.write_text("a: [")
    (note,) = lines_of(run)["note"]
    assert "not valid YAML" in note
    path.unlink()
    assert lines_of(run)["note"] == ["there is no config.yaml"]
    assert "model" not in lines_of(run)


def test_other_methods(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", foresight__method="none", train__max_steps=25)
    said = lines_of(run)
    assert said["method"] == ["none"]
    assert said["training"][0].startswith("8 epochs, 25 steps at most, batch 32")
    run = write_run(tmp_path / "par", model__par_tokens=4)
    assert "1.2 M parameters; 17 codes, 64 tokens (8x8, PAR: 4 at once), 10 classes" in lines_of(run)["model"][0]
    run = write_run(tmp_path / "b", foresight__method="mirai-i", foresight__num_heads=1, foresight__weights=[1.0],
                    foresight__class_slot="false")  # fmt: skip
    assert lines_of(run)["method"][0].endswith("1 head of block 4, lambda [1.0], from epoch 0.4, encoder "
                                               "vit_base_patch14_dinov2")  # fmt: skip


@pytest.mark.parametrize("size", ["GPT-B", "custom"])
def test_parameters_are_the_models(size: str) -> None:
    small = {"dim": 64, "n_layer": 3, "n_head": 2, "vocab_size": 50, "num_classes": 7, "block_size": 16}
    model = ModelConfig(size=size) if size != "custom" else ModelConfig(size=size, **small)  # type: ignore[arg-type]
    if size == "custom":
        assert parameter_count(model) == sum(p.numel() for p in GPT(model).parameters())
    else:
        assert round(parameter_count(model) / 1e6, 1) == 110.9  # LlamaGen-B: 111 M
    assert ForesightConfig().active is False


def test_what_is_neither(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    folder = write_checkpoint(run, 40)
    (tmp_path / "empty").mkdir()
    one_line(lambda: kind_of(tmp_path / "gone"), "gone: no such folder")
    one_line(lambda: kind_of(run / "metrics.jsonl"), "metrics.jsonl: is a file; give the run folder")
    one_line(lambda: kind_of(folder), f"is a checkpoint; give its run folder, {run}")
    one_line(lambda: kind_of(tmp_path / "empty"), "is not a store of mirai_ds (it has no manifest.json)",
             "config.yaml, metrics.jsonl, starts.jsonl, checkpoints")  # fmt: skip
    done = cli("inspect", tmp_path / "empty")
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    (tmp_path / "empty" / "plan.json").write_text("{}")
    assert "extraction is not finished" in cli("inspect", tmp_path / "empty").stderr


def test_json_has_stable_keys(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    write_checkpoint(run, 80)
    (run / "outcome").write_text("finished all\n")
    done = cli("inspect", run, "--json", "--verify")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert set(found) == {
        "kind", "path", "name", "configuration", "configuration_valid", "parameters", "starts", "held_by", "outcome",
        "step", "epoch", "last", "lowest", "samples", "exports", "nonfinite", "hang", "earlier_configurations",
        "checkpoints", "digests_read", "latest", "leftovers", "resume", "bytes_used", "bytes_free", "notes", "damages",
    }  # fmt: skip
    assert (found["kind"], found["step"], found["epoch"]) == ("run", 80, 2.0)
    assert found["outcome"] == {"verdict": "finished", "reason": "all"}
    assert found["resume"] == {"step": 80, "reason": "", "skipped": []}
    assert found["last"]["loss/ntp"] == {"step": 80, "value": 2.125}
    assert found["configuration"]["optimizer"]["lr"] == 0.002
    (one,) = found["checkpoints"]
    assert (one["step"], one["whole"], one["latest"], one["info"]["seed"]) == (80, True, True, 0)
    assert one["bytes"] == sum(p.stat().st_size for p in (run / "checkpoints" / "step-00000080").iterdir())
    assert found["bytes_used"] == sum(p.stat().st_size for p in run.rglob("*") if p.is_file())


def test_the_best_checkpoint_is_marked(tmp_path: Path) -> None:
    """By the run's own metric, among whole ones; where nothing is kept for being the best none is."""
    rules = {"checkpoint__keep_best": 1, "checkpoint__every_steps": 20, "eval__loss__every_steps": 20}
    for name, changes, wanted in (("best", rules, [40]), ("plain", {}, [])):
        run = write_run(tmp_path / name, **changes)
        for step, loss in ((20, 1.5), (40, 1.25), (60, 1.0), (80, 1.75)):
            write_checkpoint(run, step, metrics={"held_out/ntp_ema": loss, "held_out/ntp_raw": -loss})
        (run / "checkpoints" / "step-00000060" / "info.json").write_text("{}")  # damaged
        found = json.loads(cli("inspect", run, "--json").stdout)["checkpoints"]
        assert [one["step"] for one in found if one["best"]] == wanted
    assert "fit, best" in cli("inspect", tmp_path / "best").stdout


def test_needs_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    write_checkpoint(run, 80)
    code = (
        "import sys, mirai_ds.cli.main as c\n"
        f"try: c.main(['inspect', {str(run)!r}, '--verify'])\n"
        "except SystemExit as end: print(end.code)\n"
        "print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-2:] == ["0", "[]"]


def test_sizes_for_people() -> None:
    assert [size_text(n) for n in (0, 999, 1500, 6_558_375_904)] == ["0 bytes", "999 bytes", "1.5 kB", "6.6 GB"]
