"""The bundle: what it holds, and that its script makes an environment from it without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.offline.bundle import NAME, collect, main, pack, pins
from tests.offline.lock import read_lock
from tests.offline.packing import project_files

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


def unpacked(folder: Path, python: str, wheels: list[Path], libraries: list[Path]) -> Path:
    pack(folder / "out.tar", python, wheels, libraries)
    with tarfile.open(folder / "out.tar") as archive:
        archive.extractall(folder / "there", filter="data")
    return folder / "there" / NAME


def install(bundle: Path, venv: Path, python: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "PYTHON": python, "PIP_NO_INDEX": "1", "HOME": str(venv.parent)}
    command = ["bash", str(bundle / "install.sh"), str(venv)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_parts_are_all_of_the_lock() -> None:
    everything = [f"{name}=={version}" for name, version in read_lock().items()]
    torch, rest = pins(["torch"]), pins(["libraries", "kernels"])
    assert sorted(torch + rest) == sorted(everything)
    assert {pin.partition("==")[0] for pin in torch} >= {"torch", "triton", "nvidia-cudnn-cu13", "cuda-toolkit"}
    assert "torch-fidelity" in {pin.partition("==")[0] for pin in rest}
    assert pins(["kernels"]) == []


def test_an_unknown_part_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--parts", "libraries,weights"])
    assert end.value.code == 2
    assert "--parts weights: use some of libraries, torch, kernels" in capsys.readouterr().err


@pytest.mark.matrix
def test_a_bundle_installs_without_a_network(tmp_path: Path) -> None:
    """The project's own wheel and the kernels; the rest is found where PYTHON has its torch."""
    wheels = collect(tmp_path / "wheels", HERE, ["kernels"])
    assert [wheel.name.split("-")[0] for wheel in wheels] == ["mirai_ds"]
    library = tmp_path / "0123abcd"
    library.mkdir()
    (library / "mirai_cpu.so").write_bytes(b"library")
    bundle = unpacked(tmp_path, HERE, wheels, [library])
    for name in project_files():
        assert os.path.lexists(bundle / "project" / name), name
    done = install(bundle, tmp_path / "venv", sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"installed; next: {tmp_path}/venv/bin/mirai-ds doctor"
    site = tmp_path / "venv" / "lib" / f"python{HERE}" / "site-packages"
    assert (site / "mirai_ds" / "kernels" / "prebuilt" / "0123abcd" / "mirai_cpu.so").read_bytes() == b"library"
    code = "import mirai_ds, mirai_ds.kernels.build as b; print(mirai_ds.__file__); print(b.prebuilt_folder())"
    told = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "python"), "-c", code], cwd="/", capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin"},
    ).stdout.splitlines()  # fmt: skip
    assert told == [str(site / "mirai_ds" / "__init__.py"), str(site / "mirai_ds" / "kernels" / "prebuilt")]
    again = install(bundle, tmp_path / "venv", sys.executable)
    assert again.returncode == 2
    assert again.stderr == f"install.sh: {tmp_path}/venv: is there already; give another folder, or remove it\n"


def test_what_the_script_refuses(tmp_path: Path) -> None:
    bundle = unpacked(tmp_path, "3.99", [], [])
    subprocess.run(["bash", "-n", str(bundle / "install.sh")], check=True)
    other = install(bundle, tmp_path / "venv", sys.executable)
    assert other.returncode == 2
    assert f"is Python {HERE}, this bundle is for 3.99; set PYTHON" in other.stderr
    none = install(bundle, tmp_path / "venv", "no-such-python")
    assert none.returncode == 2
    assert "no-such-python: cannot run; set PYTHON" in none.stderr
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\ncase "$2" in *torch*) exit 1 ;; *) exec {sys.executable} "$@" ;; esac\n')
    bare.chmod(0o755)
    (tmp_path / "second").mkdir()
    bundle = unpacked(tmp_path / "second", HERE, [], [])
    without = install(bundle, tmp_path / "venv", str(bare))
    assert without.returncode == 2
    assert "this bundle has no torch, and" in without.stderr
    assert not (tmp_path / "venv").exists()
