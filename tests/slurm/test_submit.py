"""`mirai-ds submit` itself, with a stub for sbatch."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mirai_ds.cli.main import main
from mirai_ds.submit.plan import HINT
from tests.slurm.conftest import cluster_file
from tests.slurm.stubs import FakeSlurm

ACCEPTS = 'echo "$@" >>"$STUB/sbatch.calls"; echo $((40 + $(wc -l <"$STUB/sbatch.calls")))'


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the stubs, first in PATH."""
    folder = FakeSlurm(tmp_path / "stub").folder
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("STUB", str(folder))
    return folder


def sbatch(stub: Path, body: str) -> None:
    path = stub / "bin" / "sbatch"
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def submit(tmp_path: Path, *arguments: str) -> Result:
    fixed = ["--nodes", "2", "--run-dir", str(tmp_path / "my run"), "--cluster", cluster_file(tmp_path)]
    return CliRunner().invoke(main, ["submit", "digits-baseline", *fixed, *arguments])


def calls(stub: Path) -> list[str]:
    path = stub / "sbatch.calls"
    return path.read_text().splitlines() if path.exists() else []


def test_submits_what_it_shows(stub: Path, tmp_path: Path) -> None:
    sbatch(stub, ACCEPTS)
    done = submit(tmp_path, "--dependency", "afterok:12:13")
    assert done.exit_code == 0, done.output
    scripts = list((tmp_path / "my run" / "jobs").glob("digits-baseline-*.sbatch"))
    assert len(scripts) == 1
    assert done.stdout.startswith(scripts[0].read_text())
    assert calls(stub) == [
        f"--parsable --output={tmp_path}/my run/jobs/%x-%j.log --dependency=afterok:12:13 --kill-on-invalid-dep=yes "
        f"{scripts[0]}"
    ]
    run = shlex.quote(str(tmp_path / "my run"))
    assert "job 41: digits-baseline, 2 x 1 ranks, 0:10:00 each start\n" in done.stdout
    assert "log     tail -F " + shlex.quote(f"{tmp_path}/my run/jobs/digits-baseline-41.log") in done.stdout
    assert f"curves  tensorboard --logdir {run}\n" in done.stdout
    again = [line for line in scripts[0].read_text().splitlines() if line.startswith("#   sbatch ")]
    assert shlex.split(again[0].removeprefix("#   "))[-1] == str(scripts[0])


def test_chain(stub: Path, tmp_path: Path) -> None:
    sbatch(stub, ACCEPTS)
    done = submit(tmp_path, "--chain", "3")
    assert "job 41 -> 42 -> 43: " in done.stdout
    found = [[part for part in call.split() if part.startswith("--dep") or part.startswith("--kill")]
             for call in calls(stub)]  # fmt: skip
    after = "--kill-on-invalid-dep=yes"
    assert found == [[], ["--dependency=afterany:41", after], ["--dependency=afterany:42", after]]
    assert len(list((tmp_path / "my run" / "jobs").iterdir())) == 1


def test_the_logs_of_an_array_are_found_by_the_printed_command(stub: Path, tmp_path: Path) -> None:
    sbatch(stub, ACCEPTS)
    (tmp_path / "list.txt").write_text("digits-baseline\n")
    arguments = ["submit", str(tmp_path / "list.txt"), "--template", "array", "--run-dir", str(tmp_path / "my run")]
    done = CliRunner().invoke(main, [*arguments, "--cluster", cluster_file(tmp_path)])
    assert f"log     tail -F '{tmp_path}/my run/jobs/array-list-41'_*.log\n" in done.stdout, done.output


def test_a_dry_run_leaves_nothing(stub: Path, tmp_path: Path) -> None:
    sbatch(stub, ACCEPTS)
    done = submit(tmp_path, "--dry-run")
    assert done.exit_code == 0
    assert done.stdout.startswith("#!/bin/bash\n")
    assert not (tmp_path / "my run").exists()
    assert calls(stub) == []


def test_two_in_a_second_have_two_files(stub: Path, tmp_path: Path) -> None:
    sbatch(stub, ACCEPTS)
    for _ in range(3):
        assert submit(tmp_path).exit_code == 0
    assert len(list((tmp_path / "my run" / "jobs").glob("*.sbatch"))) == 3


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            "echo 'sbatch: error: invalid partition specified: x' >&2\n"
            "echo 'sbatch: error: Batch job submission failed: Invalid partition name specified' >&2; exit 1",
            "sbatch refused the job: invalid partition specified: x; Batch job submission failed: Invalid partition "
            "name specified",
        ),
        ("exit 3", "sbatch refused the job: exit code 3"),
        ("echo hello", "sbatch gave no job id but 'hello'"),
    ],
)
def test_refusals_are_one_line(body: str, expected: str, stub: Path, tmp_path: Path) -> None:
    sbatch(stub, body)
    done = submit(tmp_path)
    assert done.exit_code == 2
    assert done.stderr == f"mirai-ds: error: {expected}\n"
    assert (tmp_path / "my run").exists() == ("no job id" in expected)  # it may be in the queue, and needs its folder


def test_a_chain_that_breaks_names_what_is_in_the_queue(stub: Path, tmp_path: Path) -> None:
    sbatch(
        stub, ACCEPTS + '\n[ $(wc -l <"$STUB/sbatch.calls") -lt 3 ] || { echo "sbatch: error: too many" >&2; exit 1; }'
    )
    done = submit(tmp_path, "--chain", "4")
    assert done.exit_code == 2
    assert done.stderr == (
        "mirai-ds: error: sbatch refused the job: too many; submitted before it: 41, 42 (scancel 41 42)\n"
    )


def test_multi_cluster_ids(stub: Path, tmp_path: Path) -> None:
    sbatch(stub, "echo '77;west'")
    assert "job 77: " in submit(tmp_path).stdout


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = submit(tmp_path)
    assert done.exit_code == 2
    assert done.stderr.startswith("mirai-ds: error: sbatch: not found")
    assert "--dry-run" in done.stderr
    assert not (tmp_path / "my run").exists()
    assert submit(tmp_path, "--dry-run").exit_code == 0


def test_what_was_in_the_folder_stays(stub: Path, tmp_path: Path) -> None:
    sbatch(stub, "exit 3")
    (tmp_path / "my run" / "jobs").mkdir(parents=True)
    assert submit(tmp_path).exit_code == 2
    assert list((tmp_path / "my run").iterdir()) == [tmp_path / "my run" / "jobs"]


STORE = ("data.source=store", "data.path=store")
ENCODER = (*STORE, "data.images=store", "foresight.method=mirai-i", "foresight.encoder.name=dinov2-b")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (("data.source=npz", "data.path=no.npz"), "data.path = 'no.npz': no such file or folder"),
        (("data.source=npz", f"data.path={'x' * 300}"), "data.path = 'xxx"),
        (("data.source=store", "data.path=unfinished"), "data.path = 'unfinished': holds no manifest.json"),
        (
            (*STORE, "data.held_out_path=gone", "data.held_out_fraction=null"),
            "data.held_out_path = 'gone': no such file or folder",
        ),
        ((*STORE, "data.more_views=[store, gone]"), "data.more_views = 'gone': no such file or folder"),
        ((*STORE, "data.images=gone"), "data.images = 'gone': no such file or folder"),
        ((*STORE, "data.tokenizer=no.pt"), "data.tokenizer = 'no.pt': no such file or folder"),
        ((*ENCODER, "foresight.encoder.weights=no.pth"), "foresight.encoder.weights = 'no.pth': no such file"),
        (("foresight.method=mirai-e", "foresight.teacher_weights=no.pt"), "foresight.teacher_weights = 'no.pt': no "),
        (("train.init_from=no.pt",), "train.init_from = 'no.pt': no such file or folder"),
        (("eval.fid.at_end=true", "eval.fid.features_weights=no.pth"), "eval.fid.features_weights = 'no.pth': no "),
    ],
)
def test_files_that_are_not_there_are_heard_of_at_once(
    fields: tuple[str, ...], problem: str, stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written or sent, and by the line of a list."""
    sbatch(stub, ACCEPTS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").touch()
    (tmp_path / "unfinished").mkdir()
    options = [part for field in fields for part in ("--set", field)]
    done = submit(tmp_path, *options)
    assert (done.exit_code, calls(stub), done.stdout) == (2, [], "")
    assert done.stderr.startswith(f"mirai-ds: error: {problem}")
    assert done.stderr.endswith(f"; {HINT}\n")
    assert not (tmp_path / "my run").exists()
    (tmp_path / "list.txt").write_text(f"\ndigits-baseline {shlex.join(options)}\n")
    done = CliRunner().invoke(main, ["submit", "list.txt", "--template", "array", "--cluster", cluster_file(tmp_path)])
    assert (done.exit_code, calls(stub)) == (2, [])
    assert done.stderr.startswith(f"mirai-ds: error: list.txt:2: {problem}")
    assert submit(tmp_path, *options, "--no-check").exit_code == 0


def test_a_run_that_has_begun_reads_no_initial_weights(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch(stub, ACCEPTS)
    monkeypatch.chdir(tmp_path)
    options = ["--set", "train.init_from=gone.pt"]
    assert submit(tmp_path, *options).exit_code == 2
    sealed = tmp_path / "my run" / "checkpoints" / "step-00000004"
    sealed.mkdir(parents=True)
    assert submit(tmp_path, *options).exit_code == 2  # no whole checkpoint
    (sealed / "manifest.json").touch()
    assert submit(tmp_path, *options).exit_code == 0


def test_what_a_run_does_not_read_may_be_missing(stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch(stub, ACCEPTS)
    unread = ["data.source=my.module:make", "data.path=anything", "eval.fid.reference=gone"]
    unread += ["foresight.encoder.weights=gone", "foresight.method=none"]
    assert submit(tmp_path, *[part for field in unread for part in ("--set", field)]).exit_code == 0


MANY = ("--template", "sample_evaluate", "--", "--num", "9", "--out", "o")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("codes", "--template", "extract", "--", "--images", "gone", "--out", "o"), "--images gone: no such file"),
        (("codes", "--template", "extract", "--", "--images=.", "--tokenizer=gone", "--out=o"), "--tokenizer gone: "),
        (("gone", "--template", "sample_evaluate"), "RECIPE gone: no such file or folder"),
        (("gone", "--template", "sample_evaluate", "--dependency", "afterok:3"), ""),
        ((".", "--template", "sample_evaluate", "--", "--tokenizer", "gone"), "--tokenizer gone: no such"),
        ((".", "--reference", "gone", "--inception", ".", *MANY), "--reference gone: no such"),
        ((".", "--reference", ".", "--inception", "gone", *MANY), "--inception gone: no such"),
        (("digits-baseline", "--deepspeed", "no.json"), "deepspeed = 'no.json': no such file"),
    ],
)  # fmt: skip
def test_files_of_the_command_line(
    arguments: tuple[str, ...], problem: str, stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch(stub, ACCEPTS)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["submit", "--cluster", cluster_file(tmp_path), *arguments])
    assert (done.exit_code, len(calls(stub))) == ((2, 0) if problem else (0, 1)), done.output
    assert done.stderr.startswith(f"mirai-ds: error: {problem}" if problem else "")


def test_a_folder_that_cannot_be_written(stub: Path, tmp_path: Path) -> None:
    sbatch(stub, ACCEPTS)
    (tmp_path / "my run").write_text("a file")
    done = submit(tmp_path)
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr
    assert calls(stub) == []
