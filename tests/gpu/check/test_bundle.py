"""The bundle: what it holds, and that its script can be run."""

from __future__ import annotations

import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.gpu.check.bundle import NAME, core_version, pack
from tests.offline.packing import project_files


def test_the_tar_holds_the_project_wheels_and_a_script(tmp_path: Path) -> None:
    wheel, library = tmp_path / "thing-1-py3-none-any.whl", tmp_path / "0123abcd"
    wheel.write_bytes(b"wheel")
    library.mkdir()
    (library / "mirai_cuda.so").write_bytes(b"library")
    pack(tmp_path / "out.tar", [wheel], library)
    with tarfile.open(tmp_path / "out.tar") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    there = tmp_path / "there" / NAME
    assert (there / "wheels" / wheel.name).read_bytes() == b"wheel"
    assert (there / "project" / "kernels" / "prebuilt" / "0123abcd" / "mirai_cuda.so").read_bytes() == b"library"
    for name in project_files():
        assert os.path.lexists(there / "project" / name), name
    script = there / "run-gpu-check.sh"
    assert script.stat().st_mode & 0o100
    assert "@COMMIT@" not in script.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(("line", "expected"), [("Requires-Dist: pydantic-core==2.50.5\n", "2.50.5"), ("", None)])
def test_the_core_that_a_pydantic_needs(tmp_path: Path, line: str, expected: str | None) -> None:
    path = tmp_path / "pydantic-2.14.4-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pydantic-2.14.4.dist-info/METADATA", "Name: pydantic\n" + line)
    if expected is None:
        with pytest.raises(ValueError, match="does not say which pydantic-core"):
            core_version(path)
    else:
        assert core_version(path) == expected
