"""Build script.  Metadata is in pyproject.toml; here is what it cannot say.

`kernels/` and `ds_configs/` sit at the top level, where users look for them, and are installed *inside* the package
(`mirai_ds.kernels`, `mirai_ds.ds_configs`): the name `kernels` belongs to another project on PyPI.
"""

from setuptools import find_packages, setup

ROOMS = {"mirai_ds.kernels": "kernels", "mirai_ds.ds_configs": "ds_configs"}
packages = [*find_packages(include=["mirai_ds", "mirai_ds.*"]), "mirai_ds.config.recipes"]
for package, folder in ROOMS.items():
    packages += [package] + [f"{package}.{name}" for name in find_packages(folder)]

setup(
    packages=packages,
    package_dir=ROOMS,
    package_data={
        "mirai_ds": ["py.typed"],
        "mirai_ds.config.recipes": ["*.yaml"],
        "mirai_ds.ds_configs": ["*.json"],
        "mirai_ds.kernels": ["*/*.cu", "*/*.cpp", "*/*.h"],
    },
)
