"""Weights & Biases: one run there for a run here, whatever number of starts it takes."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from typing import Any

from mirai_ds.config import UserError
from mirai_ds.runtime.disk import write_whole
from mirai_ds.runtime.log import LOG
from mirai_ds.tracking.tracker import CLOSE_SECONDS, Picture, TrackedRun, Tracker

PLACE = "wandb/mirai_ds.json"  # below the run: its id there, and the last step that was sent
MOST = 50  # characters of a run's name in its id


class WandbRun(Tracker):
    """`WANDB_*` variables say where to: project (`mirai_ds` by default), entity, mode.  Without a login it writes
    offline, to be sent by `wandb sync`.

    What was sent cannot be taken back: a start that went back sends nothing of the steps that were sent before, whose
    values are the same, and goes on after them.
    """

    @classmethod
    def check(cls) -> None:
        """Raises UserError without the package."""
        if importlib.util.find_spec("wandb") is None:
            raise UserError(
                "tracking = 'wandb': the package is not installed; pip install 'mirai_ds[wandb]', or leave it out"
            )

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._place = run.folder / PLACE
        self._place.parent.mkdir(parents=True, exist_ok=True)
        known: dict[str, Any] = {"id": f"{run.name[:MOST]}-{secrets.token_hex(4)}", "step": -1}
        if run.step and self._place.is_file():
            known = json.loads(self._place.read_text(encoding="utf-8"))
        self._id = known["id"]
        self._images = wandb.Image
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "mirai_ds", id=self._id, name=run.name, dir=str(run.folder),
            config=run.config, resume="allow", mode=_mode(run),  # type: ignore[arg-type]
            settings=wandb.Settings(console="off", silent=True, finish_timeout=CLOSE_SECONDS - 5),
        )  # fmt: skip
        self._sent = self._run.step - 1 if self._run.resumed else known["step"]
        self._newest = self._sent
        self._note(self._sent)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """See `Tracker.scalars`."""
        self._log(values, step)

    def image(self, name: str, image: Picture, step: int) -> None:
        """See `Tracker.image`."""
        self._log({name: self._images(image)}, step)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._run.finish()
        self._note(self._newest)

    def _log(self, values: dict[str, Any], step: int) -> None:
        if step <= self._sent:
            return
        self._run.log(values, step=step)
        if step > self._newest:
            self._note(self._newest)  # the package keeps a step's values back until the next one begins
            self._newest = step

    def _note(self, step: int) -> None:
        write_whole(self._place, json.dumps({"id": self._id, "step": step}))


def _mode(run: TrackedRun) -> str:
    """The user's, else online where there is a login.  Never asks for one: nobody may be there to answer."""
    import wandb

    asked = os.environ.get("WANDB_MODE")
    if asked:
        return asked
    problem = "not logged in"
    try:
        if wandb.login(prompt=False):
            return "online"
    except Exception as error:  # no network, a wrong key: of the package's own types
        problem = " ".join(str(error).split()).rstrip(".")
    LOG.warning(
        "tracking wandb: %s; written offline, `wandb sync %s` sends it", problem, run.folder / "wandb/offline-run-*"
    )
    return "offline"
