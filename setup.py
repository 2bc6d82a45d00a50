"""Build script.  Metadata is in pyproject.toml; here is what it cannot say.

`kernels/`, `ds_configs/` and `jobs/` sit at the top level, where users look for them; symbolic links make them parts of
the package (`mirai_ds.kernels`, `mirai_ds.ds_configs`, `mirai_ds.jobs`) for every tool.

Sources of the fused operations are always installed and compiled on first use.  MIRAI_BUILD_KERNELS=1 compiles them
now, with the torch that is installed: MIRAI_BUILD_KERNELS=1 pip install --no-build-isolation .
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PREBUILD = os.environ.get("MIRAI_BUILD_KERNELS", "0") not in ("", "0")
DATA = ["mirai_ds.config.recipes", "mirai_ds.jobs.parts", "mirai_ds.jobs.clusters"]  # folders without Python


class BuildWithKernels(build_py):
    """Compiles the kernels into the package when asked to."""

    def run(self) -> None:
        super().run()
        if PREBUILD:
            into = HERE / "kernels" if self.editable_mode else Path(self.build_lib) / "mirai_ds" / "kernels"
            prebuild(into / "prebuilt")


class MaybeBinary(Distribution):
    """A wheel with compiled kernels is for one platform."""

    def has_ext_modules(self) -> bool:
        return PREBUILD or super().has_ext_modules()


def prebuild(place: Path) -> None:
    """Compile for the CPU, and for CUDA where nvcc is, with the build code of this source tree."""
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "MIRAI_BUILD_KERNELS=1 compiles with the installed torch, and none is visible here: "
            "pip install torch ninja filelock, then pip install --no-build-isolation ."
        )
    sys.path.insert(0, str(HERE))
    from mirai_ds.kernels import build, toolchain

    for target in ["cpu"] + ["cuda"] * (toolchain.nvcc_path() is not None):
        try:
            build.build(target, place)
        except build.BuildError as error:
            raise SystemExit(f"MIRAI_BUILD_KERNELS=1: {error}") from None


setup(
    packages=[*find_packages(include=["mirai_ds", "mirai_ds.*"]), *DATA],
    package_data={
        "mirai_ds": ["py.typed"],
        "mirai_ds.analysis": ["*.j2"],
        "mirai_ds.proposal": ["*.j2"],
        "mirai_ds.config.recipes": ["*.yaml", "*/*.yaml"],
        "mirai_ds.ds_configs": ["*.json"],
        "mirai_ds.library": ["*.j2"],
        "mirai_ds.jobs": ["*.sbatch"],
        "mirai_ds.jobs.parts": ["*.sh"],
        "mirai_ds.jobs.clusters": ["*.yaml"],
        "mirai_ds.paper": ["*.yaml"],
        "mirai_ds.kernels": ["*/*.cu", "*/*.cpp", "*/*.h"],
    },
    cmdclass={"build_py": BuildWithKernels},
    distclass=MaybeBinary,
)
