"""Every kind of damage to a checkpoint is found and named, and `inspect` foretells what a resume does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mirai_ds.analysis.checkpoints import Resume, leftovers, read_checkpoints, read_pointer, resume_point
from mirai_ds.analysis.inspect_run import inspect_run
from mirai_ds.checkpoint import store
from mirai_ds.config import UserError
from tests.analysis.fake import cli, write_checkpoint, write_incarnation, write_run

STATE = "state-rank00001.safetensors"


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def torn_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:100])


def other_format(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 7}))


def cut_file(folder: Path) -> None:
    path = folder / STATE
    path.write_bytes(path.read_bytes()[:-1])


def no_file(folder: Path) -> None:
    (folder / STATE).unlink()


def flipped_bit(folder: Path) -> None:
    path = folder / STATE
    data = bytearray(path.read_bytes())
    data[500] ^= 4
    path.write_bytes(data)


def flipped_info(folder: Path) -> None:
    path = folder / "info.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def unknown_info(folder: Path) -> None:
    shutil.rmtree(folder)
    write_checkpoint(folder.parents[1], int(folder.name[5:]), flavour="salt")


DAMAGES: list[tuple[Callable[[Path], None], bool, str]] = [
    (no_manifest, True, "not a whole checkpoint (FileNotFoundError"),
    (torn_manifest, True, "not a whole checkpoint (JSONDecodeError"),
    (other_format, True, "format 7, this version reads 1"),
    (cut_file, True, f"{STATE}: 999 bytes, should be 1000"),
    (no_file, True, "not a whole checkpoint (FileNotFoundError"),
    (flipped_bit, False, f"{STATE}: content differs from its digest"),
    (flipped_info, False, "info.json: content differs from its digest"),
    (unknown_info, True, "flavour"),
]


def found_by_the_store(run: Path) -> Resume:
    try:
        _, info, skipped = store.find(run, "auto")
        return Resume(info.step, "", tuple(skipped))
    except UserError:
        return Resume(None, "", ())


@pytest.mark.parametrize(("damage", "cheap", "reason"), DAMAGES, ids=[d[0].__name__ for d in DAMAGES])
def test_damage_of_the_newest(damage: Callable[[Path], None], cheap: bool, reason: str, tmp_path: Path) -> None:
    """cheap: sizes and manifest tell already.  The words are those with which a resume passes it over."""
    run = write_run(tmp_path / "r")
    for step in (40, 80):
        write_checkpoint(run, step)
    damage(store.folder_of(run, 80))
    full, quick = (read_checkpoints(run, digests, {}) for digests in (True, False))
    assert [bool(c.damage) for c in full] == [False, True]
    assert [bool(c.damage) for c in quick] == [False, cheap]
    assert reason in full[1].damage
    assert quick[1].damage in ("", full[1].damage)
    assert resume_point(full) == found_by_the_store(run) == Resume(40, "", (full[1].damage,))
    assert resume_point(quick).step == (40 if cheap else 80)
    done = cli("inspect", run, "--verify")
    assert done.exit_code == 1
    assert done.stderr == f"mirai-ds: error: {full[1].damage}\n"
    assert "resume       --resume auto would continue after step 40\n" in done.stdout
    assert f"damaged      {full[1].damage}\n" in done.stdout
    assert f"             passing over {full[1].damage}\n" in done.stdout
    assert "verified     1 damaged checkpoint\n" in done.stdout
    assert cli("inspect", run).exit_code == 0
    assert ("DAMAGED" in cli("inspect", run).stdout) == cheap


@pytest.mark.parametrize(("damage", "cheap", "reason"), DAMAGES, ids=[d[0].__name__ for d in DAMAGES])
def test_damage_of_an_old_one(damage: Callable[[Path], None], cheap: bool, reason: str, tmp_path: Path) -> None:
    """A resume would not look at it, --verify does."""
    run = write_run(tmp_path / "r")
    for step in (40, 80):
        write_checkpoint(run, step)
    damage(store.folder_of(run, 40))
    full = read_checkpoints(run, True, {})
    assert [reason in full[0].damage, full[1].damage] == [True, ""]
    assert resume_point(full) == found_by_the_store(run) == Resume(80, "", ())
    done = cli("inspect", run, "--verify", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["damages"] == [full[0].damage]


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    assert resume_point(read_checkpoints(run, True, {})) == Resume(None, "there is no checkpoint", ())
    assert "resume       --resume auto would refuse: there is no checkpoint\n" in cli("inspect", run).stdout
    (run / "checkpoints").mkdir()
    assert resume_point(read_checkpoints(run, True, {})).reason == "there is no checkpoint"
    flipped_bit(write_checkpoint(run, 40))
    no_manifest(write_checkpoint(run, 80))
    found = resume_point(read_checkpoints(run, True, {}))
    assert (found.step, found.reason, len(found.skipped)) == (None, "none of 2 checkpoints is whole", 2)
    with pytest.raises(UserError, match="none of 2 is whole"):
        store.find(run, "auto")


def test_a_branch_that_was_left_behind(tmp_path: Path) -> None:
    """Start 2 went on after step 40; start 1 still wrote 60 and 120."""
    run = write_run(tmp_path / "r")
    (run / "incarnations").mkdir()
    for number, after, by in ((1, 0, None), (2, 40, 1), (3, None, None)):  # 3 has taken the run and not begun
        write_incarnation(run, number, resumed_after=after, resumed_from=by)
    for step, by in ((40, 1), (60, 1), (80, 2), (120, 1)):
        write_checkpoint(run, step, incarnation=by)
    report = inspect_run(run, verify=True)
    assert [c.damage for c in report.checkpoints] == ["", "", "", ""]
    assert [bool(c.abandoned) for c in report.checkpoints] == [False, True, False, True]
    path = store.folder_of(run, 120)
    said = f"{path}: written by attempt 1 after a later attempt had resumed from an earlier step; ignored"
    assert report.resume == Resume(80, "", (said,))
    shutil.rmtree(run / "incarnations")
    assert inspect_run(run, verify=True).resume == Resume(120, "", ())


def test_leftovers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    write_checkpoint(run, 40)
    assert leftovers(run) == []
    checkpoints = run / "checkpoints"
    for name in ("step-00000080.partial", "step-00000080.partial-3", "step-00000040.replaced", "step-9.deleted-77"):
        (checkpoints / name).mkdir()
        (checkpoints / name / STATE).write_bytes(bytes(2000))
    (checkpoints / "latest.new").write_text("step-00000080")
    (checkpoints / "notes.txt").write_text("mine")
    assert leftovers(run) == [
        "latest.new (a pointer that was being written, 13 bytes)",
        "notes.txt (unknown, 4 bytes)",
        "step-00000040.replaced (a checkpoint that was being removed, 2.0 kB)",
        "step-00000080.partial (a save that did not finish, or is being written, 2.0 kB)",
        "step-00000080.partial-3 (a save that did not finish, or is being written, 2.0 kB)",
        "step-9.deleted-77 (a checkpoint that was being removed, 2.0 kB)",
    ]
    done = cli("inspect", run, "--verify")
    assert done.exit_code == 0
    assert done.stdout.count("\nleft over    ") == 6
    assert "resume       --resume auto would continue after step 40\n" in done.stdout


def test_pointer(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    assert read_pointer(run) == (None, "")
    for step in (40, 80):
        write_checkpoint(run, step)
    assert read_pointer(run) == ("step-00000080", "")
    pointer = run / "checkpoints" / "latest"
    for text, said in (
        ("step-00000120", "checkpoints/latest names 'step-00000120', which is not there"),
        ("", "checkpoints/latest names '', which is not there"),
        ("step-00000040\n", "checkpoints/latest names 'step-00000040', not the newest checkpoint"),
    ):
        pointer.write_text(text)
        assert read_pointer(run) == (text.strip(), said)
        done = cli("inspect", run, "--verify")
        assert done.exit_code == 0
        assert f"note         {said}\n" in done.stdout
        assert "resume       --resume auto would continue after step 80\n" in done.stdout
    assert [c["latest"] for c in json.loads(cli("inspect", run, "--json").stdout)["checkpoints"]] == [True, False]
    pointer.unlink()
    assert read_pointer(run) == (None, "checkpoints/latest is missing")


def test_reading_changes_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    flipped_bit(write_checkpoint(run, 40))
    (run / "checkpoints" / "step-00000080.partial").mkdir()
    before = {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in run.rglob("*")}
    cli("inspect", run, "--verify")
    assert {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in run.rglob("*")} == before
