"""A file is the old one or the new one, whatever happens in between."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mirai_ds.checkpoint.store import holds_a_run
from mirai_ds.runtime import disk


def test_the_block_writes_a_new_file_and_the_old_one_stays_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    disk.write_whole(path, "old")
    with disk.replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.parent == path.parent
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    disk.write_whole(path, b"old")

    def fails() -> None:
        with disk.replacing(path) as part:
            part.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_and_folder_are_flushed_in_that_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that reaches the disk before the content is an empty file after a power cut."""
    events: list[str] = []
    rename = Path.replace
    monkeypatch.setattr(disk, "sync", lambda path: events.append("folder" if path == tmp_path else "file"))
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("rename"), rename(self, target))[1])
    disk.write_whole(tmp_path / "a", "text")
    assert events == ["file", "rename", "folder"]
    events.clear()
    with disk.replacing(tmp_path / "b", flush=False) as part:
        part.write_text("text")
    assert events == ["rename"]


def test_a_killed_start_leaves_no_run_behind(tmp_path: Path) -> None:
    """What a process that is killed within a write leaves is known as its, and not taken for a run."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom mirai_ds.runtime.disk import replacing\n"
        "with replacing(Path(sys.argv[1]) / 'config.yaml') as part:\n"
        "    part.write_text('half')\n    os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env={**os.environ})
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert disk.left_behind(tmp_path / "config.yaml") == disk.left_behind(tmp_path / "*") == [left]
    assert not holds_a_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert holds_a_run(tmp_path)
