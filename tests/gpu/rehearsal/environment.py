"""The environment in which CUDA is the fake one, for a process and all that it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.gpu.rehearsal.build import LIBRARY

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


@contextmanager
def fake_environment(
    built: Path, *, gpus: int = 1, capability: int = 90, memory_gb: float = 80, values: str = "all"
) -> Iterator[dict[str, str]]:
    """Environment variables for subprocesses, good until the end of the block.

    built: what `build.fake_cuda` returned.  capability: 80 (A100) or 90 (H100).  values: `all`, `none`, or the number
    of elements above which an operator is launched and not computed.
    """
    with TemporaryDirectory(prefix="mirai-fake-gpu-") as folder:
        device_files = Path(folder) / "dev"
        device_files.mkdir()
        for index in range(gpus):
            (device_files / f"nvidia{index}").touch()
        library, env = str(built / LIBRARY), dict(os.environ)
        env |= {
            "MIRAI_FAKE_LIBRARY": library, "MIRAI_FAKE_GPUS": str(gpus), "MIRAI_FAKE_CAPABILITY": str(capability),
            "MIRAI_FAKE_MEMORY_GB": str(memory_gb), "MIRAI_FAKE_VALUES": values, "MIRAI_FAKE_MEETINGS": folder,
            "TRITON_LIBCUDA_PATH": str(built), "LD_PRELOAD": library,
            "LD_LIBRARY_PATH": _path(str(built), env.get("LD_LIBRARY_PATH")),
            "PYTHONPATH": _path(str(HERE / "bootstrap"), str(ROOT), env.get("PYTHONPATH")),
            # Kernels are counted in this process, not compiled in others that would each load torch.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }  # fmt: skip
        if values != "none":  # no Triton kernel computes here: what would be compiled runs as it is written
            env["TORCHDYNAMO_DISABLE"] = "1"
        env.setdefault("OMP_NUM_THREADS", "1")
        for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
            env.pop(name, None)
        yield env


def _path(*parts: str | None) -> str:
    return os.pathsep.join(part for part in parts if part)
