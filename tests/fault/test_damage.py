"""Torn, cut, bit-flipped and half-deleted checkpoints are never loaded; failing writes leave the earlier ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.saver import superseded
from mirai_ds.config import CheckpointConfig, UserError
from mirai_ds.runtime.disk import digest_of_file
from tests.fault.faulty_ranks import curve, run_ranks
from tests.fault.test_kills import IF_PRESENT, assert_same, finish
from tests.fault.test_stop import has_step
from tests.marks import by_hand
from tests.waiting import wait_until

FILES = ("info.json", "manifest.json", "state-rank00000.safetensors", "state-rank00001.safetensors")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished run: checkpoints of steps 16, 20 and 24."""
    shutil.copytree(whole, tmp_path / "run")
    assert store.list_steps(tmp_path / "run") == [16, 20, 24]
    return tmp_path / "run"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def one_name_twice(path: Path) -> None:
    """One bit of the manifest: the first rank's file bears the second's name."""
    text = path.read_bytes()
    assert text.count(b"state-rank00000") == text.count(b"state-rank00001") == 1
    path.write_bytes(text.replace(b"state-rank00000", b"state-rank00001"))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    """What some file systems leave of a file after a power loss: its length."""
    path.write_bytes(bytes(path.stat().st_size))


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Callable[[Path], None]] = [cut, empty, zeros, longer, folder_instead, Path.unlink]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_file_is_skipped_for_the_one_before(run: Path, name: str, damage: Callable[[Path], None]) -> None:
    skips(run, name, damage)


def test_a_manifest_that_names_a_file_twice_is_damaged(run: Path) -> None:
    """And leaves another out, which nobody would check."""
    assert "stands twice" in skips(run, "manifest.json", one_name_twice)


def skips(run: Path, name: str, damage: Callable[[Path], None]) -> str:
    """Whether the newest checkpoint, damaged, is passed over for the one before; what is said of it."""
    damage(store.folder_of(run, 24) / name)
    folder, info, skipped = store.find(run, "auto")
    assert (folder, info.step) == (store.folder_of(run, 20), 20)
    assert len(skipped) == 1
    assert "step-00000024" in skipped[0]
    with pytest.raises(UserError, match="step-00000024"):
        store.find(run, "24")
    return skipped[0]


@pytest.fixture(scope="module")
def flipped(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose bits may be flipped, if they are flipped back."""
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("flipped") / "run"))


@given(st.integers(0, 2**32))
@settings(max_examples=120, deadline=None)
def test_any_flipped_bit_is_seen(flipped: Path, seed: int) -> None:
    source = random.Random(seed)
    path = store.folder_of(flipped, 24) / source.choice(FILES)
    good = path.read_bytes()
    place, bit = source.randrange(len(good)), 1 << source.randrange(8)
    bad = bytearray(good)
    bad[place] ^= bit
    try:
        path.write_bytes(bad)
        try:
            info = store.verify(path.parent)
        except UserError:
            return
        # White space of the manifest, or a name in it that nothing asks for: what it says is the same.
        assert path.name == "manifest.json"
        assert json.loads(bad)["files"] == json.loads(good)["files"]
        assert info.step == 24
    finally:
        path.write_bytes(good)


def test_a_digest_is_of_all_of_a_large_file(tmp_path: Path) -> None:
    """Files are read in pieces of 4 MiB; the tests' own checkpoints are smaller."""
    data = bytearray(random.Random(0).randbytes((9 << 20) + 5))
    path = tmp_path / "large"
    for place in (0, 5 << 20, len(data) - 1):
        data[place] ^= 1
        path.write_bytes(data)
        assert digest_of_file(path) == hashlib.sha256(data).hexdigest()


def test_swapped_files_are_seen(run: Path) -> None:
    """Each is whole by itself."""
    a, b = (store.folder_of(run, 24) / name for name in FILES[2:])
    spare = a.with_name("spare")
    a.rename(spare), b.rename(a), spare.rename(b)
    with pytest.raises(UserError, match=r"content differs from its digest|bytes, should be"):
        store.verify(a.parent)
    other = store.folder_of(run, 20) / FILES[2]
    shutil.copy(other, store.folder_of(run, 16) / FILES[2])
    with pytest.raises(UserError, match=r"content differs from its digest|bytes, should be"):
        store.verify(store.folder_of(run, 16))


def test_a_stray_file_is_no_part_of_a_checkpoint(run: Path) -> None:
    """A rank file of a wider layout left beside the others must not be read."""
    from mirai_ds.checkpoint.format import StateReader

    folder = store.folder_of(run, 24)
    shutil.copy(store.folder_of(run, 16) / FILES[2], folder / "state-rank00007.safetensors")
    assert store.verify(folder).step == 24
    reader = StateReader(folder)
    assert reader.read("master", "gpt.norm.weight").shape == (32,)
    assert reader.rng(2) == {}


@pytest.mark.parametrize("name", ["../step-00000020/info.json", "/etc/hostname", "a/../info.json"])
def test_a_manifest_names_files_of_its_own_folder_only(run: Path, name: str) -> None:
    path = store.folder_of(run, 24) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"]["info.json"]
    path.write_text(json.dumps(manifest))
    assert store.find(run, "auto")[1].step == 20
    with pytest.raises(UserError, match="is not a file in it"):
        store.find(run, "24")


def test_the_pointer_is_never_believed(run: Path) -> None:
    """DeepSpeed starts afresh in silence without one; here it is for humans."""
    pointer = run / "checkpoints" / store.POINTER
    assert pointer.read_text() == "step-00000024"
    for text in (None, "", "step-00000099", "../elsewhere"):
        pointer.unlink(missing_ok=True) if text is None else pointer.write_text(text)
        assert store.find(run, "auto")[1].step == 24


def test_leftovers_are_no_checkpoints(run: Path) -> None:
    folder = store.folder_of(run, 24)
    for name in ("step-00000028.partial-1", "step-00000028.deleted-77", "step-new", "step-"):
        shutil.copytree(folder, folder.with_name(name))
    assert store.list_steps(run) == [16, 20, 24]


def test_nothing_whole_is_an_error_and_never_a_fresh_start(run: Path) -> None:
    for step in (16, 20, 24):
        cut(store.folder_of(run, step) / FILES[2])
    before = (run / "metrics.jsonl").read_bytes()
    for request in ("auto", "if-present"):
        ended = run_ranks(run, "--resume", request)
        assert ended.codes == [2, 2]
        assert f"--resume {request}: nothing to resume from" in ended.out
        assert "none of 3 is whole" in ended.out
        assert ended.outcome.startswith("failed")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert store.list_steps(run) == [16, 20, 24]  # for whoever wants to look at them


def test_the_log_says_what_was_skipped_and_the_run_goes_on(run: Path, whole: Path) -> None:
    cut(store.folder_of(run, 24) / FILES[3])
    (store.folder_of(run, 20) / FILES[1]).unlink()
    out = finish(run)
    assert out.count("mirai-ds: skipped") == 2
    assert f"{store.folder_of(run, 24) / FILES[3]}" in out
    assert "resumed after step 16" in out
    assert_same(run, whole, 24)


def limit_files(rank: int, size: int) -> None:
    """From the second checkpoint on no file of this rank may be larger: a write fails as on a full disk."""
    import os

    if int(os.environ["RANK"]) != rank:
        return
    from mirai_ds.train.session import Session

    inner, saves = Session.save_checkpoint, [0]

    def save(self: Session) -> None:
        saves[0] += self.checkpoints.saved_step != self.step
        if saves[0] == 2:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            inner(self)
        finally:
            if not self.config.checkpoint.background:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    Session.save_checkpoint = save  # type: ignore[method-assign]


@pytest.mark.parametrize(("rank", "background"), [(0, True), (1, False), by_hand(0, False), by_hand(1, True)])
def test_a_failing_write_stops_with_its_cause(tmp_path: Path, rank: int, background: bool) -> None:
    run = tmp_path / "run"
    ended = run_ranks(run, settings=[f"checkpoint.background={str(background).lower()}"], prepare=limit_files,
                      arguments=(rank, 50_000))  # fmt: skip
    assert ended.codes == [2, 2], ended.out[-3000:]
    assert ended.outcome.startswith(f"failed checkpoint of step 8 could not be written (rank {rank}: ")
    assert "earlier ones are intact" in ended.outcome
    assert store.list_steps(run) == [4]
    store.verify(store.folder_of(run, 4))
    assert not list((run / "checkpoints").glob("*.partial-*"))
    # In the background the loop hears of it when the thread that writes has had a processor, and at the latest where
    # the next checkpoint waits for this one.
    assert not has_step(run, 13 if background else 11)


def test_a_failing_write_may_be_survived(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = run_ranks(run, settings=["checkpoint.on_failure=continue"], prepare=limit_files, arguments=(1, 50_000))
    assert ended.codes == [0, 0], ended.out[-3000:]
    assert "warning: checkpoint of step 8 could not be written (rank 1: " in ended.out
    assert "trying again at the next one" in ended.out
    assert_same(run, whole, 24)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for two checkpoints and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no right to mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_really_full_disk(small_disk: Path) -> None:
    run = small_disk / "run"
    ended = run_ranks(run, settings=["guard.preflight=false", "tracking=[]"])
    assert ended.codes == [2, 2], ended.out[-3000:]
    assert "could not be written" in ended.out
    assert "No space left on device" in ended.out
    steps = store.list_steps(run)
    assert steps
    for step in steps:
        store.verify(store.folder_of(run, step))
    assert store.find(run, "auto")[1].step == steps[-1]
    # Room is made: the run goes on where it was.
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    finish(run, settings=["tracking=[]"])


def test_a_disk_that_fills_up_between_checkpoints(small_disk: Path) -> None:
    """The log is what does not fit any more: one line, and no requeue that would change nothing."""
    run = small_disk / "run"

    def fill(_: Any) -> None:
        wait_until("step 2", lambda: has_step(run, 2))
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()

    ended = run_ranks(run, settings=["guard.preflight=false", "checkpoint.every_steps=1000", "train.max_steps=2000",
                                     "train.epochs=100", "tracking=[]"], during=fill)  # fmt: skip
    assert 2 in ended.codes, ended.out[-3000:]
    assert "No space left on device" in ended.out
    assert "Traceback" not in ended.out
    assert not ended.outcome.startswith("requeue")


def test_preflight_says_that_the_disk_is_too_small(small_disk: Path) -> None:
    ended = run_ranks(small_disk / "run")
    assert ended.codes == [2, 2]
    assert "free, two checkpoints need" in ended.outcome
    assert not has_step(small_disk / "run", 0)


def fake_checkpoints(run: Path, metrics: dict[int, float]) -> None:
    for step, value in metrics.items():
        folder = store.folder_of(run, step)
        folder.mkdir(parents=True)
        info: dict[str, Any] = dict.fromkeys(
            ("global_batch_size", "seed", "samples_in_epoch", "world_size", "zero_stage", "applied_steps"), 0
        )
        info |= dict.fromkeys(("precision", "method", "code"), "")
        info |= {"step": step, "metrics": {"held_out/ntp_ema": value}}
        (folder / "info.json").write_text(json.dumps(info))


def test_what_is_kept(tmp_path: Path) -> None:
    fake_checkpoints(tmp_path, {10: 5.0, 20: 3.0, 30: 4.0, 40: 2.0, 50: 4.5, 60: 4.4})
    assert superseded(tmp_path, CheckpointConfig(keep_last=2)) == [10, 20, 30, 40]
    assert superseded(tmp_path, CheckpointConfig(keep_last=1, keep_every_steps=30)) == [10, 20, 40, 50]
    assert superseded(tmp_path, CheckpointConfig(keep_last=1, keep_steps=[20, 25, 50])) == [10, 30, 40]
    assert superseded(tmp_path, CheckpointConfig(keep_last=1, keep_best=2)) == [10, 30, 50]
    assert superseded(tmp_path, CheckpointConfig(keep_last=6)) == []


def test_best_and_permanent_ones_stay_in_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rules = ["checkpoint.keep_last=1", "checkpoint.keep_every_steps=12", "checkpoint.keep_steps=[5]",
             "checkpoint.keep_best=1", "eval.loss.every_steps=4"]  # fmt: skip
    ended = run_ranks(run, *IF_PRESENT, settings=rules)
    assert ended.codes == [0, 0], ended.out[-2000:]
    measured = {r["step"]: r["held_out/ntp_ema"] for r in curve(run) if "held_out/ntp_ema" in r and r["step"]}
    best = min(measured, key=measured.__getitem__)
    assert store.list_steps(run) == sorted(
        {5, 12, 24, best}
    )  # 5 is no multiple of the interval, and saved all the same
    assert {s: store.verify(store.folder_of(run, s)).metrics["held_out/ntp_ema"] for s in (12, 24)} == {
        s: measured[s] for s in (12, 24)
    }
