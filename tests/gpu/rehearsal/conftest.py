"""How the rehearsal's tests start Python on a fake GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.rehearsal.build import Unavailable, fake_cuda
from tests.gpu.rehearsal.environment import ROOT, fake_environment


@dataclass
class FakeGpu:
    """Runs `python ARGUMENTS` where CUDA is the fake one."""

    built: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self, *arguments: str, env: dict[str, str] | None = None, timeout: float = 570, **settings: Any
    ) -> subprocess.CompletedProcess[str]:
        """The finished process, which ended well unless `fails` is true; settings are those of `fake_environment`."""
        fails = settings.pop("fails", False)
        with fake_environment(self.built, **settings) as made:
            done = subprocess.run(
                [sys.executable, *arguments], env=made | (env or {}), cwd=ROOT, capture_output=True, text=True,
                check=False, timeout=timeout,
            )  # fmt: skip
        assert fails or done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
        return done


@pytest.fixture(scope="session")
def fake_gpu() -> FakeGpu:
    """Skips with the reason where there can be no fake."""
    built = fake_cuda()
    if isinstance(built, Unavailable):
        pytest.skip(f"no fake GPU here: {built.reason}")
    return FakeGpu(built)


@pytest.fixture
def run_code(fake_gpu: FakeGpu, tmp_path: Path) -> Callable[..., str]:
    """Runs a piece of Python on a fake GPU and returns what it printed."""

    def run(code: str, **settings: Any) -> str:
        script = tmp_path / "script.py"
        script.write_text(code, encoding="utf-8")
        return fake_gpu(str(script), **settings).stdout

    return run
