"""The container recipes as far as they can be checked without a container: linted, every file they name is there, and
Dockerfile and Apptainer recipe make the same image."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

from mirai_ds.kernels import toolchain
from tests.offline.lock import ROOT

FOLDER = ROOT / "jobs" / "containers"
DOCKERFILE, DEFINITION, SCRIPT = (FOLDER / name for name in ("Dockerfile", "mirai-ds.def", "install.sh"))
PARSED = DockerfileParser(path=str(DOCKERFILE))
STEPS = [(step["instruction"], step["value"]) for step in PARSED.structure if step["instruction"] != "COMMENT"]


def copied() -> dict[str, str]:
    """Source -> destination of every COPY; into a folder a file keeps its name."""
    found = {}
    for _, value in (step for step in STEPS if step[0] == "COPY"):
        *sources, into = value.split()
        found |= {source: into + source.rpartition("/")[2] if into.endswith("/") else into for source in sources}
    return found


def section(name: str) -> list[str]:
    """Lines of a section of the Apptainer recipe."""
    match = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert match is not None
    return [line.strip() for line in match[1].splitlines() if line.strip()]


def test_hadolint_finds_nothing() -> None:
    """Of the Dockerfile and, by its ShellCheck, of the commands in it."""
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}")
    if program is None:
        pytest.skip("no hadolint for this processor")
    done = subprocess.run([program, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_shell_parts_are_bash() -> None:
    for text in (SCRIPT.read_text(encoding="utf-8"), "\n".join(section("post")), "\n".join(section("environment"))):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_every_file_that_is_copied_is_there() -> None:
    sources = copied()
    assert {"mirai_ds", "kernels", "ds_configs", "jobs", "setup.py", "requirements-lock.txt"} < set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
    tracked = subprocess.run(["git", "ls-files", "--", *sources], cwd=ROOT, capture_output=True, text=True, check=True)
    if tracked.stdout:  # a checkout, not an unpacked bundle
        assert {name.split("/")[0] for name in tracked.stdout.splitlines()} == {s.split("/")[0] for s in sources}


def test_every_command_s_files_were_copied_before_it() -> None:
    there: set[str] = set()
    phases = re.findall(r"^(\w+)\)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    called = []
    for instruction, value in STEPS:
        if instruction == "COPY":
            *sources, into = value.split()
            there |= {into + s.rpartition("/")[2] if into.endswith("/") else into for s in sources}
        if instruction == "RUN":
            bash, script, phase = value.split()
            assert bash == "bash"
            assert script in there
            called.append(phase)
    assert called == phases == ["system", "python", "project"]
    assert "/opt/mirai/requirements-lock.txt" in there


def test_both_recipes_make_the_same_image() -> None:
    text = DEFINITION.read_text(encoding="utf-8")
    base = re.search(r"^From: (\S+)$", text, re.MULTILINE)
    assert base is not None
    assert base[1] == PARSED.baseimage
    assert dict(line.split() for line in section("files")) == copied()
    exports = [line for line in section("environment") if line.startswith("export ")]
    assert exports == [line for line in section("post") if line.startswith("export ")] + [
        "export PATH=/opt/mirai/venv/bin:$PATH"
    ]
    set_there = dict(line.removeprefix("export ").replace('"', "").split("=", 1) for line in exports)
    assert {k: v for k, v in PARSED.envs.items() if k != "PATH"} == {k: v for k, v in set_there.items() if k != "PATH"}
    assert section("post")[3:] == [value for instruction, value in STEPS if instruction == "RUN"]


def test_the_image_s_kernels_run_on_every_card_since_the_a100(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = toolchain.read_arch_list(PARSED.envs["TORCH_CUDA_ARCH_LIST"])
    assert compiled.machine_code == ("80", "86", "89", "90", "100", "120")
    assert [compiled.run_on(c) for c in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)]] == [True] * 7
    assert not compiled.run_on((7, 5))


def test_the_base_has_the_toolkit_of_the_locked_torch() -> None:
    from tests.offline.lock import read_lock

    release = re.match(r"nvidia/cuda:(\d+\.\d+)\.", PARSED.baseimage)
    assert release is not None
    assert read_lock()["nvidia-cuda-runtime"].startswith(release[1] + ".")
