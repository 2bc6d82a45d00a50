"""Compiling on first use: keys, locks that outlive nobody, failures in the compiler's words, prebuilt libraries."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mirai_ds.kernels import build, registers, toolchain
from mirai_ds.kernels.foresight_cosine import op
from tests.waiting import wait_until

REAL_CPU = build.SOURCES["cpu"]
TINY = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree with one small file, a cache and a node's own disk; the folder of the sources."""
    for name in ("sources", "cache", "node"):
        (tmp_path / name).mkdir()
    (tmp_path / "sources" / "one.cpp").write_text(TINY)
    (tmp_path / "sources" / "one.h").write_text("")
    monkeypatch.setattr(build, "HERE", tmp_path / "sources")
    monkeypatch.setattr(build, "SOURCES", {"cpu": ("one.cpp",)})
    monkeypatch.setattr(build, "HEADERS", {"cpu": ("one.h",)})
    monkeypatch.setenv("MIRAI_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    return tmp_path / "sources"


# A process that builds in the same folders, with a compiler that takes its time.
BUILDER = """
import sys, tempfile
from pathlib import Path
from mirai_ds.kernels import build
sources, cache, node = sys.argv[1:4]
tempfile.tempdir = node
build.HERE, build.SOURCES, build.HEADERS = Path(sources), {"cpu": ("one.cpp",)}, {"cpu": ("one.h",)}
try:
    print(build.build("cpu", Path(cache), lambda text: print("SAID", text, flush=True)))
except build.BuildError as error:
    print("FAILED", error)
"""


def start_builder(sources: Path, slow_compiler: Path | None = None) -> subprocess.Popen[str]:
    env = {**os.environ, **({"CXX": str(slow_compiler)} if slow_compiler else {})}
    folders = [str(sources.parent / name) for name in ("sources", "cache", "node")]
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, *folders], env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def slow_compiler(folder: Path, before: str) -> Path:
    """A compiler that runs a line of shell first and writes a line a call into `calls`."""
    path = folder / "slow-c++"
    path.write_text(f'#!/bin/sh\necho x >> {folder}/calls\n{before}\nexec {toolchain.host_compiler()} "$@"\n')
    path.chmod(0o755)
    return path


def hanging_compiler(folder: Path) -> Path:
    """One that goes on when `started` is taken away, which it makes."""
    return slow_compiler(folder, f"touch {folder}/started; while [ -e {folder}/started ]; do sleep 0.1; done")


def first_and_waiting(tiny: Path, others: int) -> tuple[subprocess.Popen[str], list[str]]:
    """A process that compiles while `others` wait for it; it, and what each printed in the end."""
    compiler = slow_compiler(tiny, f"touch {tiny}/started; while [ ! -e {tiny}/go ]; do sleep 0.05; done")
    first = start_builder(tiny, compiler)
    wait_until("the compiler has begun", (tiny / "started").exists)
    waiting = [start_builder(tiny, compiler) for _ in range(others)]
    heard = [process.stdout.readline() for process in waiting if process.stdout]
    (tiny / "go").touch()
    return first, [
        said + process.communicate(timeout=120)[0]
        for said, process in zip(["", *heard], [first, *waiting], strict=True)
    ]


def test_built_once_and_found_again(tiny: Path) -> None:
    said: list[str] = []
    assert build.find("cpu") is None
    path = build.library("cpu", said.append)
    assert path == tiny.parent / "cache" / build.digest("cpu") / "mirai_cpu.so"
    assert path.read_bytes().startswith(b"\x7fELF")
    assert len(said) == 2
    assert said[0].startswith("compiling the cpu kernels once for this machine")
    before = path.stat().st_mtime_ns
    assert build.library("cpu", said.append) == path
    assert path.stat().st_mtime_ns == before
    assert len(said) == 2
    assert sorted(p.name for p in path.parent.iterdir()) == ["build.log", "mirai_cpu.so"]


def test_what_a_cuda_library_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """sm_80's machine code runs on 8.x, PTX of 9.0 on all that is newer; an older device is compiled for."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(toolchain, "device_capabilities", set)
    usual = toolchain.architectures()
    runs = {c: usual.run_on(c) for c in [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]}
    assert [capability for capability, fits in runs.items() if not fits] == [(7, 0), (7, 5)]
    monkeypatch.setattr(toolchain, "device_capabilities", lambda: {(7, 5), (8, 6)})
    assert toolchain.architectures() == toolchain.Architectures(("75", "80", "90"), ("90",))
    assert "-gencode=arch=compute_75,code=sm_75" in toolchain.device_flags()


def test_torchs_own_list_of_architectures_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;12.0+PTX")
    before = build.digest("cuda")
    assert toolchain.architectures() == toolchain.Architectures(("86", "120"), ("120",))
    assert [flag for flag in toolchain.device_flags() if "gencode" in flag] == [
        "-gencode=arch=compute_86,code=sm_86", "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]  # fmt: skip
    assert not toolchain.architectures().run_on((9, 0))
    monkeypatch.setattr(toolchain, "device_capabilities", lambda: {(9, 0)})
    assert "compiled for sm_86, sm_120, PTX 120 (TORCH_CUDA_ARCH_LIST) and a GPU here is sm_90" in str(
        op._unfit_device()
    )
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert build.digest("cuda") != before
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    with pytest.raises(build.BuildError, match="'Ampere' is no compute capability"):
        toolchain.architectures()


def test_whatever_decides_the_code_decides_its_name(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [build.digest("cpu")]
    assert build.digest("cpu") == keys[0]
    (tiny / "one.cpp").write_text(TINY + "// changed\n")
    keys.append(build.digest("cpu"))
    (tiny / "one.h").write_text("#pragma once\n")
    keys.append(build.digest("cpu"))
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    keys.append(build.digest("cpu"))
    for other in {"AVX512", "AVX2", "DEFAULT"} - {toolchain.vector_unit()}:
        monkeypatch.setattr(toolchain, "vector_unit", lambda unit=other: unit)
        keys.append(build.digest("cpu"))
    assert len(set(keys)) == len(keys)


def test_an_installed_library_comes_before_the_cache(tiny: Path) -> None:
    in_cache = build.library("cpu", lambda _: None)
    assert build.main(["cpu", "--into", str(tiny / "prebuilt")]) == 0
    assert build.find("cpu") == tiny / "prebuilt" / build.digest("cpu") / "mirai_cpu.so" != in_cache


def test_an_error_is_the_compilers(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "one.cpp").write_text("int answer() { return forty_two; }\n")
    with pytest.raises(build.BuildError) as caught:
        build.library("cpu", lambda _: None)
    lines = str(caught.value).splitlines()
    assert lines[0] == "compiling the cpu kernels failed:"
    assert "one.cpp:1:" in lines[1]
    assert "forty_two" in lines[1]
    log = Path(lines[-1].rpartition(": ")[2])
    assert "forty_two" in log.read_text()
    assert list((tiny.parent / "cache").iterdir()) == []  # nothing half-built is left
    assert build.main(["cpu"]) == 2
    assert "mirai-ds: error: compiling the cpu kernels failed" in capsys.readouterr().err


def test_a_symbol_nobody_has_fails_the_build_not_the_run(tiny: Path) -> None:
    (tiny / "one.cpp").write_text("int elsewhere(); int answer() { return elsewhere(); }\n")
    with pytest.raises(build.BuildError, match=r"undefined reference to .elsewhere"):
        build.library("cpu", lambda _: None)


def test_no_compiler(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tiny))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler .* apt-get install g\+\+"):
        build.library("cpu", lambda _: None)


def test_a_cache_that_cannot_be_written(tiny: Path) -> None:
    (tiny.parent / "file").write_text("")
    with pytest.raises(build.BuildError, match=r"cannot be written .*; set MIRAI_DS_CACHE"):
        build.build("cpu", tiny.parent / "file" / "below", lambda _: None)


def test_one_builds_the_others_wait(tiny: Path) -> None:
    first, outputs = first_and_waiting(tiny, 2)
    paths = {output.splitlines()[-1] for output in outputs}
    assert paths == {str(tiny.parent / "cache" / build.digest("cpu") / "mirai_cpu.so")}
    assert (tiny / "calls").read_text().count("x") == 2  # compile and link, once
    assert "SAID compiling" in outputs[0]
    for output in outputs[1:]:
        assert f"SAID waiting for process {first.pid} on " in output
        assert "SAID compil" not in output


def test_a_failure_is_not_repeated_by_those_who_waited(tiny: Path) -> None:
    (tiny / "one.cpp").write_text("int answer() { return forty_two; }\n")
    _, outputs = first_and_waiting(tiny, 1)
    assert all("FAILED compiling the cpu kernels failed" in output for output in outputs)
    assert all("forty_two" in output for output in outputs)
    assert (tiny / "calls").read_text().count("x") == 1
    (tiny / "one.cpp").write_text("int answer() { return 42; }\n")
    assert build.library("cpu", lambda _: None).is_file()


def test_a_killed_builder_holds_nobody_up(tiny: Path) -> None:
    """SIGKILL in the middle of a compilation: the next process builds at once and clears up."""
    killed = start_builder(tiny, hanging_compiler(tiny))
    wait_until("the compiler has begun", (tiny / "started").exists)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    try:
        said: list[str] = []
        path = build.library("cpu", said.append, wait_seconds=0.0)
        assert not any("waiting" in text for text in said)
        assert path.is_file()
        assert [p.name for p in (tiny.parent / "cache").iterdir()] == [path.parent.name]
    finally:
        (tiny / "started").unlink()  # its compiler is there still, in a session of its own


def test_waiting_ends_and_names_the_owner(tiny: Path) -> None:
    owner = start_builder(tiny, hanging_compiler(tiny))
    try:
        wait_until("the compiler has begun", (tiny / "started").exists)
        said: list[str] = []
        with pytest.raises(
            build.BuildError, match=rf"process {owner.pid} on .* holds the build lock .* end that process"
        ):
            build.library("cpu", said.append, wait_seconds=0.3)
        assert said[0].startswith(f"waiting for process {owner.pid} on ")
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.wait()
        (tiny / "started").unlink()


def test_threads_of_one_process_wait_for_each_other(tiny: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build.library("cpu", lambda _: None))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1


def test_the_real_toolkit_is_found_through_links_and_wrappers(tmp_path: Path) -> None:
    """nvcc as a link into another folder, and as a script that calls it: include/ is beside neither."""
    home, shims = tmp_path / "cuda-99", tmp_path / "bin"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    shims.mkdir()
    (home / "include" / "cuda_runtime.h").write_text("")
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "#$ _HERE_=$(dirname "$(readlink -f "$0")")" >&2\n')
    nvcc.chmod(0o755)
    (shims / "nvcc").symlink_to(nvcc)
    wrapper = shims / "wrapped"
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    assert [toolchain.cuda_home(str(path)) for path in (nvcc, shims / "nvcc", wrapper)] == [home] * 3
    (home / "include" / "cuda_runtime.h").unlink()
    assert toolchain.cuda_home(str(wrapper)) is None


def test_a_toolkit_of_another_release_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").write_text("")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 9.2, V9.2.1"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(build.BuildError, match=r"is release 9.2, torch was built with CUDA 13.0: use a toolkit 13.0"):
        build.steps("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(build.BuildError, match="a build without CUDA"):
        build.steps("cuda")


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3onev' for 'sm_80'
ptxas info    : Function properties for _Z3onev
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z3twov' for 'sm_90'
ptxas info    : Function properties for _Z3twov
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 128 registers, 388 bytes cmem[0]
"""


def test_registers_and_spills_are_read_from_the_compilers_log() -> None:
    assert registers.read_log(PTXAS) == [
        registers.KernelUse("_Z3onev", "sm_80", 40, 0, 0),
        registers.KernelUse("_Z3twov", "sm_90", 128, 24, 20),
    ]
    with pytest.raises(ValueError, match="1 of 2 kernels could be read"):
        registers.read_log(PTXAS.replace("24 bytes stack frame", "some bytes"))
    with pytest.raises(ValueError, match="0 of 0"):
        registers.read_log("")


def test_a_spill_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "library", lambda target: tmp_path / "mirai_cuda.so")
    (tmp_path / "build.log").write_text(PTXAS)
    assert registers.main() == 1
    assert "sm_90: stack 24 bytes, spilled 20 bytes" in capsys.readouterr().out
    (tmp_path / "build.log").write_text(PTXAS.split("ptxas info    : Compiling entry function '_Z3twov'")[0])
    assert registers.main() == 0


@pytest.mark.parametrize(
    "unit", [pytest.param("avx2", marks=pytest.mark.exhaustive), pytest.param("default", marks=pytest.mark.matrix)]
)
def test_the_cpu_kernel_on_lesser_vector_units(unit: str) -> None:
    """Compiled for what other machines have, with the values it has here."""
    files = [str(Path(__file__).with_name("test_values.py"))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", *files],
        env={**os.environ, "ATEN_CPU_CAPABILITY": unit}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 150  # type: ignore[index]


def test_importing_needs_no_compiler_and_loads_nothing() -> None:
    code = (
        "import sys, os; os.environ['PATH'] = ''\n"
        "from mirai_ds.kernels import build, toolchain\n"
        "assert 'torch' not in sys.modules\n"
        "import mirai_ds.foresight, torch\n"
        "assert 'torch._dynamo' not in sys.modules  # torch's own compiler\n"
        "print([p for p in torch.ops.loaded_libraries if 'mirai' in p])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_shipped_lists_name_every_source() -> None:
    folder = Path(build.__file__).parent / "foresight_cosine"
    named = {name for target in build.TARGETS for name in build.SOURCES[target] + build.HEADERS[target]}
    assert named == {f"foresight_cosine/{p.name}" for p in folder.iterdir() if p.suffix in (".cu", ".cpp", ".h")}
    assert REAL_CPU == ("foresight_cosine/cpu.cpp",)


@pytest.mark.matrix
def test_a_package_can_bring_its_libraries(tmp_path: Path) -> None:
    """MIRAI_BUILD_KERNELS=1: compiled into the package under the name that a run will look for."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2], env={**os.environ, "MIRAI_BUILD_KERNELS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = tmp_path / "mirai_ds" / "kernels"
    library = kernels / "prebuilt" / build.digest("cpu") / "mirai_cpu.so"
    assert library.read_bytes().startswith(b"\x7fELF")
    for target in build.TARGETS:  # a wheel carries the sources too
        assert all((kernels / name).is_file() for name in build.SOURCES[target] + build.HEADERS[target])


def test_compiled_ahead_for_machines_that_cannot(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every vector unit's library in one folder, and found there by each: no compiler, nothing that can be written."""
    folder = tiny.parent / "ahead"
    keys = []
    for unit in ("AVX2", "DEFAULT"):
        monkeypatch.setattr(toolchain, "vector_unit", lambda unit=unit: unit)
        assert build.main(["cpu", "--into", str(folder)]) == 0
        keys.append(build.digest("cpu"))
    assert sorted(path.name for path in folder.iterdir()) == sorted(keys)
    assert build.find("cpu") is None  # nobody has said where
    monkeypatch.setenv("MIRAI_DS_PREBUILT", str(folder))
    monkeypatch.setenv("MIRAI_DS_CACHE", "/proc/none")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "/none")
    for unit, key in zip(("AVX2", "DEFAULT"), keys, strict=True):
        monkeypatch.setattr(toolchain, "vector_unit", lambda unit=unit: unit)
        assert build.library("cpu") == folder / key / "mirai_cpu.so"
