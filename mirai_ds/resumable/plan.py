"""What an unfinished extraction has promised: its settings and its list of images, fixed when it began."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirai_ds.config import UserError
from mirai_ds.config.errors import shown
from mirai_ds.data.stores.files import MANIFEST
from mirai_ds.runtime.disk import write_whole

Array = np.ndarray[Any, Any]

PLAN, LISTING, PARTS = "plan.json", "listing.txt", "parts"


@dataclass(frozen=True)
class WorkPlan:
    """settings decide the content and are kept in the manifest; source is where the images are read from."""

    kind: str
    source: str
    settings: dict[str, str]
    block_images: int
    num_images: int
    classes: list[str]

    @property
    def blocks(self) -> int:
        """Blocks of `block_images` images; the last may be shorter."""
        return -(-self.num_images // self.block_images)

    def images_of(self, block: int) -> range:
        """Image numbers of a block."""
        return range(block * self.block_images, min((block + 1) * self.block_images, self.num_images))


@dataclass(frozen=True)
class Listing:
    """The images of a plan in order: names and labels (n,) int32."""

    names: list[str]
    labels: Array


def pillow_version() -> str:
    """Pillow's version, which decides pixels."""
    import PIL

    return str(PIL.__version__)


def torch_version() -> dict[str, str]:
    """The versions that decide codes, beside the device."""
    import torch

    return {"torch": torch.__version__, "machine": platform.machine()}


def begin(folder: Path, plan: WorkPlan, listing: Listing) -> None:
    """Fix plan and list; the plan comes last, and others wait for it.  Raises UserError where files are in the way."""
    folder.mkdir(parents=True, exist_ok=True)
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in (LISTING, PARTS))
    foreign = [name for name in foreign if not name.endswith(".tmp")]
    if foreign:
        raise UserError(f"--out {folder}: holds {foreign[0]!r} and no extraction; give a new or empty folder")
    (folder / PARTS).mkdir(exist_ok=True)
    lines = (f"{label}\t{name}\n" for name, label in zip(listing.names, listing.labels.tolist(), strict=True))
    write_whole(folder / LISTING, "".join(lines).encode())
    write_whole(folder / PLAN, (json.dumps(asdict(plan), indent=1, ensure_ascii=False) + "\n").encode())


def read_plan(folder: Path) -> WorkPlan | None:
    """The plan in `folder`; None where there is none.  Raises UserError when it cannot be read."""
    try:
        return WorkPlan(**json.loads((folder / PLAN).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / PLAN}: cannot be read ({error}); remove {folder} and extract again") from None


def read_listing(folder: Path, plan: WorkPlan) -> Listing:
    """The list of a plan.  Raises UserError when it does not fit."""
    try:
        lines = (folder / LISTING).read_text(encoding="utf-8").split("\n")[:-1]
        pairs = [line.split("\t", 1) for line in lines]
        listing = Listing([name for _, name in pairs], np.array([int(label) for label, _ in pairs], dtype=np.int32))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / LISTING}: cannot be read ({error}); remove {folder} and extract again") from None
    if len(listing.names) != plan.num_images:
        raise UserError(f"{folder / LISTING}: has {len(listing.names)} lines, not {plan.num_images}; extract again")
    return listing


def check_same(folder: Path, begun: WorkPlan, kind: str, source: str | None, settings: dict[str, str]) -> None:
    """Raises UserError naming the first setting that differs from those the extraction in `folder` began with."""
    before = {"kind": begun.kind, **({} if source is None else {"images": begun.source}), **begun.settings}
    now = {"kind": kind, **({} if source is None else {"images": source}), **settings}
    for name in sorted(before | now):
        if before.get(name) != now.get(name):
            raise UserError(
                f"--out {folder}: was begun with {name} = {shown(before.get(name))}, this is "
                f"{shown(now.get(name))}; go on with the same, or give another folder"
            )


def wait_for_plan(folder: Path, seconds: float) -> WorkPlan | None:
    """The plan that rank 0 makes; None when the store is finished already.  Raises UserError after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        if (folder / MANIFEST).is_file():
            return None
        plan = read_plan(folder)
        if plan is not None:
            return plan
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    raise UserError(f"--out {folder}: rank 0 has made no {PLAN} within {seconds:.0f} s; see its messages")
