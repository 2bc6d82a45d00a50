"""The ranks in a container: which words or options start them there, and which folders they see."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import mirai_ds
from mirai_ds.config.errors import UserError
from mirai_ds.submit.cluster import Runtime, SlurmCluster
from mirai_ds.submit.values import one_line

PYTHON_INSIDE = "python3"


@dataclass(frozen=True)
class Container:
    """An image and the program that runs it."""

    image: str
    runtime: Runtime


def asked_for(cluster: SlurmCluster, image: str | None, runtime: Runtime | None) -> Container | None:
    """The command line's image and runtime, else the cluster file's; None without one.  Raises UserError."""
    image = cluster.container if image is None else image
    if image is None:
        if runtime is not None:
            raise UserError(f"--container-runtime {runtime}: there is no --container; give one, or remove it")
        return None
    one_line(image, "--container")
    chosen = runtime or cluster.container_runtime
    squashed = image.endswith((".sqsh", ".squashfs"))
    if not image or image.startswith("-"):
        raise UserError(f"--container {image!r}: is no image; give a file or docker://NAME")
    if chosen == "pyxis" and image.endswith(".sif"):
        raise UserError(f"--container {image}: pyxis takes a .sqsh file (`enroot import`) or docker://NAME, no .sif")
    if chosen != "pyxis" and squashed:
        raise UserError(f"--container {image}: {chosen} takes a .sif file or docker://NAME; for .sqsh use pyxis")
    return Container(image if "://" in image else os.path.abspath(image), chosen)


def check_image(container: Container) -> None:
    """Raises UserError where the image's file is not there."""
    if "://" not in container.image and not os.path.exists(container.image):
        raise UserError(f"--container {container.image}: no such file; give a .sif or .sqsh file, or docker://NAME")


def mounts(cluster: SlurmCluster, submit_dir: str, paths: Iterable[str]) -> list[str]:
    """What the container sees, as FROM:TO: the working folder, this checkout, `paths` and the cluster file's own.

    A path that is not there yet gives the nearest folder above it that is.  Raises UserError for a name that mounts
    cannot carry.
    """
    checkout = Path(mirai_ds.__file__).resolve().parents[1]
    own = [str(checkout)] if (checkout / "pyproject.toml").is_file() else []
    seen = [there(path) for path in (submit_dir, *own, *paths)]
    for path in seen:
        if re.search("[:,]", path):
            raise UserError(f"{path}: a container's mounts are written with : and ,; choose a path without them")
    given = [entry if ":" in entry else f"{entry}:{entry}" for entry in cluster.mounts]
    return list(dict.fromkeys([*(f"{path}:{path}" for path in seen), *given]))


def there(path: str) -> str:
    """`path` made absolute, or the nearest folder above it that exists; where none but / does, the path itself."""
    whole = Path(os.path.abspath(path))
    found = next((str(place) for place in (whole, *whole.parents) if place.exists()), "/")
    return str(whole) if found == "/" else found


def prefix(container: Container, seen: list[str], submit_dir: str, gpus: bool) -> list[str]:
    """The words before `python` that start it in the container; of pyxis none, whose options are srun's."""
    if container.runtime == "pyxis":
        return []
    binds = [word for mount in seen for word in ("--bind", mount)]
    return [container.runtime, "exec", *["--nv"] * gpus, *binds, "--pwd", submit_dir, container.image]


def srun_options(container: Container, seen: list[str], submit_dir: str) -> list[str]:
    """Options of srun that start the ranks in the container; of apptainer none."""
    if container.runtime != "pyxis":
        return []
    image = container.image
    if image.startswith("docker://"):  # enroot writes a registry's name before a #
        first, slash, rest = image.removeprefix("docker://").partition("/")
        image = f"{first}#{rest}" if slash and ("." in first or ":" in first) else f"{first}{slash}{rest}"
    return [f"--container-image={image}", f"--container-mounts={','.join(seen)}", f"--container-workdir={submit_dir}"]
