"""What makes a Python process see the fake GPU's values: installed at the start, at work once torch is imported."""

from __future__ import annotations

import atexit
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls an action with a module right after it was imported, before anybody else sees it."""

    def __init__(self, actions: dict[str, Action]) -> None:
        self.actions = actions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders make, with the action added."""
        action = self.actions.pop(fullname, None)
        if action is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_act(module: ModuleType) -> None:
            run(module)
            action(module)

        spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec


def install_in_this_process() -> None:
    """Called by every Python that starts in the fake's environment; imports nothing heavy."""
    sys.meta_path.insert(0, _AfterImport({"torch": _values, "mirai_ds.runtime.launch": _device_files}))


def _values(_: ModuleType) -> None:
    from tests.gpu.rehearsal import device

    device.install()
    if os.environ.get("MIRAI_FAKE_RECORDS"):
        _record_at_exit()


def _device_files(launch: ModuleType) -> None:
    """The launcher counts the driver's device files: show it a folder that has as many as there are fake devices."""
    counted = launch.gpu_names
    folder = Path(os.environ["MIRAI_FAKE_MEETINGS"]) / "dev"

    def gpu_names(devices: Path = folder) -> list[str]:
        found: list[str] = counted(devices)
        return found

    launch.gpu_names = gpu_names  # type: ignore[attr-defined]


def record() -> dict[str, Any]:
    """What this process did on fake devices: launches by physical device, operators without values."""
    from tests.gpu.rehearsal.device import not_computed
    from tests.gpu.rehearsal.library import library

    devices = range(int(os.environ["MIRAI_FAKE_GPUS"]))
    launches = {index: library().fake_launches(index) for index in devices}
    return {
        "command": sys.argv, "rank": int(os.environ.get("RANK", -1)),
        "launches": {index: count for index, count in launches.items() if count},
        "missing": dict(not_computed()),
    }  # fmt: skip


def _record_at_exit() -> None:
    leave = os._exit

    def write() -> None:
        found = record()
        if found["launches"]:
            path = Path(os.environ["MIRAI_FAKE_RECORDS"]) / f"{os.getpid()}.json"
            path.write_text(json.dumps(found), encoding="utf-8")

    def write_and_leave(code: int) -> None:
        write()
        leave(code)

    os._exit = write_and_leave  # type: ignore[assignment]
    atexit.register(write)
