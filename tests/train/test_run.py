"""A run as its user sees it: files, numbers, pictures, learning."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mirai_ds.checkpoint import store
from mirai_ds.cli.main import main
from mirai_ds.config import dump, load
from mirai_ds.kernels.build import find
from mirai_ds.kernels.toolchain import vector_unit
from mirai_ds.runs.configuration import read_run_config
from mirai_ds.tracking.tags import meaning
from mirai_ds.train.hooks.log import Sinks
from mirai_ds.train.hooks.report import ReportHook, print_table
from tests.train.conftest import SMALL, numbers, records, small_train
from tests.warm_start import warm_mirai_ds

SCALARS = {
    "loss/total", "loss/ntp", "loss/alignment", "cosine/head1_down0_right0", "cosine/head2_down0_right1",
    "cosine/head3_down1_right0", "foresight/schedule", "optimizer/lr", "optimizer/grad_norm", "optimizer/skipped_steps",
    "speed/images_per_s", "speed/tokens_per_s", "speed/model_tflops_per_s_per_rank", "memory/peak_gib",
    "held_out/ntp_raw", "held_out/ntp_ema", "score/accuracy_generated", "score/accuracy_real", "checkpoint/stall_s",
    "checkpoint/write_s", "foresight/lambda/head1_down0_right0", "foresight/lambda/head2_down0_right1",
    "foresight/lambda/head3_down1_right0",
}  # fmt: skip


def test_the_folder_explains_the_run(finished: Path) -> None:
    config = read_run_config(finished)
    assert dump(config) == (finished / "config.yaml").read_text()
    assert config.model.dim == 64
    assert config.foresight.convention == "official"
    assert config.foresight.border == "wrap"
    ds = json.loads((finished / "deepspeed.json").read_text())
    assert (ds["train_batch_size"], ds["train_micro_batch_size_per_gpu"], ds["gradient_clipping"]) == (32, 16, 1.0)
    assert ds["zero_optimization"]["stage"] == 2
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert set(environment["packages"]) >= {"torch", "deepspeed", "numpy"}


def test_every_step_is_logged_once(finished: Path) -> None:
    steps = [r["step"] for r in records(finished) if "loss/total" in r]
    assert steps == list(range(1, 67))


def test_total_is_ntp_plus_lambda_times_alignment(finished: Path) -> None:
    for r in records(finished):
        if "loss/total" in r:
            aligned = r["step"] > 11  # warm-up: a quarter of an epoch of 44 steps
            assert ("loss/alignment" in r) == aligned
            lambdas = [value for name, value in r.items() if name.startswith("foresight/lambda/")]
            assert (r["foresight/schedule"], lambdas) == (float(aligned), [2.0 * aligned] * 3)
            expected = r["loss/ntp"] + r["foresight/schedule"] * r.get("loss/alignment", 0.0)
            assert r["loss/total"] == pytest.approx(expected, rel=1e-6, abs=1e-6)
            if aligned:  # official: weights 2, summed over heads
                cosines = sum(v for k, v in r.items() if k.startswith("cosine/"))
                assert r["loss/alignment"] == pytest.approx(-2 * cosines, rel=1e-5)


def test_held_out_loss_falls_and_cosines_rise(finished: Path) -> None:
    found = [r for r in records(finished) if "held_out/ntp_raw" in r]
    assert [r["step"] for r in found] == [0, 33, 66]
    assert found[0]["held_out/ntp_raw"] == pytest.approx(np.log(17), abs=1e-6)  # zero output matrix: uniform
    assert found[0]["held_out/ntp_raw"] == found[0]["held_out/ntp_ema"]
    # ln 17 = 2.833 before training; 66 steps of this model reach 1.79 here, its average 1.81. 0.7 leaves room for other
    # BLAS roundings.
    assert found[0]["held_out/ntp_raw"] - found[-1]["held_out/ntp_raw"] > 0.7
    assert found[0]["held_out/ntp_ema"] - found[-1]["held_out/ntp_ema"] > 0.7
    aligned = [r for r in records(finished) if "loss/alignment" in r]
    for head in ("head1_down0_right0", "head2_down0_right1", "head3_down1_right0"):
        curve = [r[f"cosine/{head}"] for r in aligned]
        assert abs(curve[0]) < 0.2
        assert np.mean(curve[-5:]) - curve[0] > 0.5


def test_tensorboard_has_every_name(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == SCALARS
    assert tags["images"] == ["samples/grid"]
    assert {name.removesuffix("/text_summary") for name in tags["tensors"]} == {
        "config/run", "config/deepspeed", "custom_scalars__config__",
    }  # fmt: skip
    assert all(meaning(tag) for tag in SCALARS)  # a name without a meaning would stand in TensorBoard unexplained
    written = {e.step: e.value for e in events.Scalars("loss/ntp")}
    for r in records(finished):
        if "loss/ntp" in r:
            assert written[r["step"]] == pytest.approx(r["loss/ntp"], rel=1e-6)


def test_pictures(finished: Path) -> None:
    grid = np.asarray(Image.open(finished / "samples" / "step-00000066.png"))
    assert grid.shape[0] == 10 * 66 + 2  # 10 classes of 8 px at 8x, 2 px between
    names = grid.shape[1] - (2 * 66 + 2)  # two images each, after the digits' names
    assert 8 < names < 20
    assert (grid[2:66, :names].max(), grid[2:66, :names].min()) == (240, 64)
    assert len(np.unique(grid)) > 8
    beside = np.asarray(Image.open(finished / "samples.png"))
    assert beside.shape[0] == grid.shape[0] + 24  # a line of text above
    assert beside.shape[1] == grid.shape[1] + 8 + (2 * 66 + 2)
    assert np.array_equal(beside[24:, : grid.shape[1]], grid)
    curve = np.asarray(Image.open(finished / "loss.png").convert("L"))
    assert (curve < 128).mean() > 0.001


def test_the_report_says_what_the_table_shows(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    out = (finished / "stdout.txt").read_text()
    assert report["steps"] == 66
    assert report["accuracy"]["real"] > 0.95
    assert f"curves: tensorboard --logdir {finished.parent}, and http://localhost:6006/#custom_scalars" in out
    assert f"{report['accuracy']['real']:.3f}" in out
    assert f"{report['held_out/ntp_ema']['last']:.4f}" in out
    last = [r for r in records(finished) if "held_out/ntp_ema" in r][-1]
    assert report["held_out/ntp_ema"]["last"] == last["held_out/ntp_ema"]


def test_checkpoints_are_whole(finished: Path) -> None:
    assert store.list_steps(finished) == [11, 22, 33, 44, 55, 66]
    info = store.verify(store.folder_of(finished, 66))
    assert (info.step, info.world_size, info.zero_stage, info.applied_steps) == (66, 2, 2, 66)
    assert (finished / "checkpoints" / "latest").read_text() == "step-00000066"


def invoke(*arguments: object) -> Result:
    """The command line inside this process (ranks are not started by what is tested here)."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_verbs_on_a_finished_run(finished: Path, tmp_path: Path) -> None:
    """sample from the run, export, sample from the export: the same images."""
    choice = ("--per-class", 1, "--classes", "3,8")
    first = invoke("sample", finished, *choice, "--out", tmp_path / "a")
    assert first.exit_code == 0, first.output
    exported = invoke("export", finished, "--weights", "ema", "--out", tmp_path / "e.pt")
    assert exported.exit_code == 0, exported.output
    assert f"of ema weights, step {store.list_steps(finished)[-1]}" in exported.output
    second = invoke("sample", tmp_path / "e.pt", "--recipe", finished / "config.yaml", *choice, "--out", tmp_path / "b")
    assert second.exit_code == 0, second.output
    a, b = (np.load(tmp_path / name / "tokens.npz") for name in "ab")
    assert a["labels"].tolist() == [3, 8]
    assert np.array_equal(a["tokens"], b["tokens"])
    assert np.array_equal(a["images"], b["images"])
    assert a["images"].shape == (2, 8, 8, 3)
    unguided = invoke("sample", finished, *choice, "--cfg", 1, "--out", tmp_path / "c")
    assert unguided.exit_code == 0, unguided.output
    assert not np.array_equal(np.load(tmp_path / "c" / "tokens.npz")["tokens"], a["tokens"])


def test_a_weights_file_without_its_data_gives_tokens(finished: Path, tmp_path: Path) -> None:
    assert invoke("export", finished, "--weights", "raw", "--out", tmp_path / "e.safetensors").exit_code == 0
    text = (
        (finished / "config.yaml").read_text().replace("source: digits\n  path: null", "source: npz\n  path: gone.npz")
    )
    (tmp_path / "moved.yaml").write_text(text)
    arguments = ("--recipe", tmp_path / "moved.yaml", "--per-class", 1, "--classes", "4", "--out", tmp_path / "o")
    done = invoke("sample", tmp_path / "e.safetensors", *arguments)
    assert done.exit_code == 0, done.output
    assert "no pictures: data.path = 'gone.npz'" in done.output
    tokens = np.load(tmp_path / "o" / "tokens.npz")["tokens"]
    assert tokens.shape == (1, 64)
    assert 0 < tokens.max() < 17
    alone = invoke(
        "sample", tmp_path / "e.safetensors", "--cfg", 1.5, *arguments[2:]
    )  # it says its model, not its data
    assert alone.exit_code == 0, alone.output
    assert "(raw weights)" in alone.output
    assert "no pictures: a weights file does not say" in alone.output
    assert np.array_equal(np.load(tmp_path / "o" / "tokens.npz")["tokens"], tokens)


def test_verify_prints_every_array_and_exits_by_the_verdict() -> None:
    fixture = Path(__file__).parents[1] / "fixtures" / "mirai_e_official_k3.npz"
    good = invoke("verify", fixture)
    assert good.exit_code == 0, good.output
    assert "head_losses" in good.output
    assert "arrays ok" in good.output
    strict = invoke("verify", fixture, "--tolerance", "1e-12")
    assert strict.exit_code == 1
    assert "FAILED" in strict.output


def test_doctor_and_recipes(tmp_path: Path) -> None:
    doctor = invoke("doctor")
    assert doctor.exit_code == 0, doctor.output
    assert "ready to train" in doctor.output
    assert "alignment   kernel: auto will run the compiled cpu kernel" in doctor.output
    assert str(find("cpu")) in doctor.output
    listed = invoke("recipes", "list").output
    assert {line.split()[0] for line in listed.splitlines()} >= {"digits-baseline", "digits-mirai-e"}
    shown = invoke("recipes", "show", "digits-mirai-e").output
    (tmp_path / "mine.yaml").write_text(shown)
    assert dump(load(str(tmp_path / "mine.yaml"))) == dump(load("digits-mirai-e"))


def test_mistakes_in_verbs_are_one_line(finished: Path, tmp_path: Path) -> None:
    cases = [
        (["train", "digits-mirai"], "digits-mirai-e"),
        (["train", "digits-mirai-e", "--set", "model.depth=3"], "model.depth"),
        (["train", "digits-mirai-e", "--ranks", "3"], "train.global_batch_size"),
        (["train", "digits-mirai-e", "--deepspeed", "zero9"], "zero2"),
        (["train", "digits-mirai-e", "--fresh", "--resume", "auto"], "--fresh"),
        (["train", "digits-mirai-e", "--run-dir", finished], "--resume auto"),
        (["train", "digits-mirai-e", "--run-dir", tmp_path / "new", "--resume", "auto"], "nothing to resume from"),
        (["train", "digits-mirai-e", "--run-dir", finished, "--resume", "last"], "if-present"),
        (["sample", tmp_path / "none"], "none"),
        (["sample", finished, "--classes", "3,11"], "11"),
        (["sample", finished, "--top-p", "0"], "--top-p"),
        (["sample", finished, "--step", "5"], "11, 22, 33, 44, 55, 66"),
        (["export", tmp_path, "--out", tmp_path / "x.pt"], "config.yaml"),
        (["verify", finished / "loss.png"], "loss.png"),
        (["recipes", "show", "digits-basline"], "digits-baseline"),
    ]
    for arguments, word in cases:
        done = invoke(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert len(done.stderr.strip().splitlines()) == 1, (arguments, done.stderr)
        assert word in done.stderr, (arguments, done.stderr)
        assert done.stderr.startswith("mirai-ds: error: "), done.stderr


def test_a_mistake_that_only_ranks_can_see(tmp_path: Path) -> None:
    """Found after the launch, in the data: still one line and exit code 2."""
    done = small_train(tmp_path / "run", "--set", "model.vocab_size=16")
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1
    assert done.err.startswith("mirai-ds: error: model.vocab_size = 16: ")
    assert "use at least 17" in done.err


def test_the_kernel_that_ran_is_said_once_and_stored(finished: Path) -> None:
    assert json.loads((finished / "environment.json").read_text())["alignment_kernel"] == "cpu"
    said = [line for line in (finished / "stdout.txt").read_text().splitlines() if "kernel" in line]
    assert said == ["mirai-ds: alignment loss: cpu kernel (foresight.kernel: auto)"]


def test_kernels_change_a_run_by_rounding_only(finished: Path, tmp_path: Path) -> None:
    """33 of the 66 steps: 22 of them aligned, and a look at held-out images after them."""
    shorter = ["foresight.kernel=reference", "train.max_steps=33", "eval.classifier.enabled=false"]
    done = small_train(tmp_path / "run", *[part for o in shorter for part in ("--set", o)])
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["alignment_kernel"] == "reference"
    compared = 0
    wanted = [record for record in numbers(finished) if record["step"] <= 33]
    for mine, theirs in zip(wanted, numbers(tmp_path / "run"), strict=True):
        for name in ("loss/total", "loss/alignment", "held_out/ntp_raw", "held_out/ntp_ema"):
            if name in mine:
                assert mine[name] == pytest.approx(theirs[name], rel=2e-4), (mine["step"], name)
                compared += 1
    assert compared == 33 + 22 + 2


def test_a_kernel_of_another_device_is_refused(tmp_path: Path) -> None:
    done = small_train(tmp_path / "run", "--set", "foresight.kernel=cuda")
    assert done.code == 2
    assert done.err.strip() == (
        "mirai-ds: error: foresight.kernel = 'cuda': the tensors are on cpu; use auto, cpu or reference"
    )


def test_without_a_compiler_a_run_says_so_once_and_trains(tmp_path: Path) -> None:
    """`auto` on a machine that cannot compile and has nothing built."""
    env = {"CXX": "no-such-compiler", "MIRAI_DS_CACHE": str(tmp_path / "cache")}
    settings = [*SMALL, "train.max_steps=2", "foresight.warmup_epochs=0", "eval.classifier.enabled=false"]
    overrides = [part for o in settings for part in ("--set", o)]
    done = warm_mirai_ds("train", "digits-mirai-e", *overrides, "--run-dir", str(tmp_path / "run"), env=env)
    assert done.code == 0, done.err
    said = [line for line in (done.out + done.err).splitlines() if "C++ compiler" in line]
    assert len(said) == 1
    assert said[0].startswith(
        "mirai-ds: the alignment loss runs in plain PyTorch (kernel: auto), because no C++ compiler"
    )
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["alignment_kernel"] == "reference"
    doctor = warm_mirai_ds("doctor", env=env).out
    assert f"kernels     cpu ({vector_unit()}): cannot be built: no C++ compiler" in doctor
    assert "kernel: auto will run reference (plain PyTorch)" in doctor
    explicit = warm_mirai_ds(
        "train", "digits-mirai-e", "--set", "foresight.kernel=cpu", "--run-dir", str(tmp_path / "no"), env=env
    )
    assert explicit.code == 2
    assert explicit.err.strip().startswith("mirai-ds: error: foresight.kernel = 'cpu': no C++ compiler")
    assert len(explicit.err.strip().splitlines()) == 1


def test_a_single_measurement_is_no_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured at the end only has no beginning; a first value comes with its step."""
    config = load("digits-mirai-e")
    session = SimpleNamespace(
        config=config, world=SimpleNamespace(size=1), engine=SimpleNamespace(stage=2), step=30,
        order=SimpleNamespace(steps_per_epoch=10),
    )  # fmt: skip
    records = [
        {"step": 10, "loss/ntp": 2.5}, {"step": 20, "loss/ntp": 2.25, "loss/alignment": -1.0},
        {"step": 30, "loss/ntp": 2.125, "loss/alignment": -1.5}, {"step": 30, "held_out/ntp_raw": 5.0449},
    ]  # fmt: skip
    found = ReportHook(Sinks())._summary(session, records, None)  # type: ignore[arg-type]
    once = {"first": None, "first_step": None, "last": 5.0449, "lowest": 5.0449, "lowest_step": 30}
    assert found["held_out/ntp_raw"] == once
    assert found["held_out/ntp_ema"]["last"] is None
    assert found["loss/ntp"] == {"first": 2.5, "first_step": 10, "last": 2.125}
    assert found["loss/alignment"] == {"first": -1.0, "first_step": 20, "last": -1.5}
    print_table(found, tmp_path)
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    lines = {row[1].strip(): row[2:4] for row in rows}
    assert [cell.strip() for cell in lines["held-out loss, raw weights"]] == ["", "5.0449"]
    assert [cell.strip() for cell in lines["training loss (next token)"]] == ["2.5000 (step 10)", "2.1250"]
    assert "lowest" not in lines

    turned = [{"step": s, "held_out/ntp_ema": v} for s, v in ((0, 2.8), (10, 1.4), (20, None), (30, 1.9))]
    found = ReportHook(Sinks())._summary(session, turned, None)  # type: ignore[arg-type]
    assert (found["held_out/ntp_ema"]["lowest"], found["held_out/ntp_ema"]["lowest_step"]) == (1.4, 10)
    print_table(found, tmp_path)
    out = capsys.readouterr().out
    assert out.index("1.9000") < out.index("lowest") < out.index("(step 10)") < out.index("1.4000")
