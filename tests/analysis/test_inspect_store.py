"""`inspect` of token and image stores through the command line, as text and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.analysis.fake import cli
from tests.extract.conftest import codebook, packed, photos, store  # noqa: F401


def test_json_of_stores(store: Path, packed: Path) -> None:  # noqa: F811
    for path, kind in ((store, "token store"), (packed, "image store")):
        done = cli("inspect", path, "--json")
        found = json.loads(done.stdout)
        assert (done.exit_code, set(found)) == (0, {"kind", "path", "manifest", "digests_read", "damages"})
        assert (found["kind"], found["path"], found["digests_read"]) == (kind, str(path), False)
        assert found["manifest"] == json.loads((path / "manifest.json").read_text())
        verified = json.loads(cli("inspect", path, "--json", "--verify").stdout)
        assert verified == {**found, "digests_read": True}


def test_damage_to_stores(store: Path, packed: Path, tmp_path: Path) -> None:  # noqa: F811
    for path in (store, packed):
        copy = tmp_path / path.name
        shutil.copytree(path, copy)
        victim = max(copy.iterdir(), key=lambda file: file.stat().st_size)
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
        done = cli("inspect", copy, "--json", "--verify")
        (damage,) = json.loads(done.stdout)["damages"]
        assert victim.name in damage
        assert (done.exit_code, done.stderr.strip().splitlines()[-1]) == (1, f"mirai-ds: error: {damage}")
        assert cli("inspect", copy).exit_code == 0
