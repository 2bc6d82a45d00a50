"""Trackers of a real run that is killed and goes on: the same values everywhere, none twice, and training does not
notice those that fail."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.fault.faulty_ranks import Kill, curve, run_ranks, tensors

SETTINGS = ["train.max_steps=8", "eval.loss.every_steps=4", "sampling.every_steps=null", "sampling.at_end=false"]
OWN = """
from mirai_ds.tracking import Tracker


class Full(Tracker):
    def scalars(self, values, step):
        raise OSError(28, "No space left on device")
"""


def test_killed_and_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    plain = run_ranks(tmp_path / "plain", settings=[*SETTINGS, "tracking=[]"])
    assert plain.codes == [0, 0], plain.out[-3000:]
    assert not (tmp_path / "plain" / "tensorboard").exists()
    run, settings = tmp_path / "run", [*SETTINGS, "tracking=[csv, own:Full, tensorboard]"]
    first = run_ranks(
        run, settings=settings, kill=Kill(0, "step 7"), env=env, prepare=_import_from, arguments=(str(tmp_path),)
    )
    assert first.codes[0] == -9
    again = run_ranks(
        run, "--resume", "auto", settings=settings, env=env, prepare=_import_from, arguments=(str(tmp_path),)
    )
    assert again.codes == [0, 0], again.out[-3000:]
    assert "resumed after step 4" in again.out
    assert curve(run) == curve(tmp_path / "plain")
    assert tensors(run, 8) == tensors(tmp_path / "plain", 8)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = [
        (line["step"], tag, value) for line in lines for tag, value in line.items() if tag not in ("step", "epoch")
    ]
    table = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert [(int(step), tag, float(value)) for step, tag, value in table] == wanted
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [e.step for e in events.Scalars("loss/ntp")] == list(range(1, 9))
    assert {tag for _, tag, _ in wanted} == {
        tag for tag in events.Tags()["scalars"] if not tag.startswith("checkpoint/")
    }
    assert again.out.count("tracking own:Full: OSError: [Errno 28] No space left on device") == 1


def _import_from(folder: str) -> None:
    import sys

    sys.path.insert(0, folder)


def test_a_tracker_that_cannot_be_had_is_heard_of_before_the_first_step(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path / "run", settings=[*SETTINGS, "tracking=[nowhere:Tracker]"])
    assert 2 in ended.codes
    assert "tracking = 'nowhere:Tracker': cannot be imported" in ended.out
    assert "Traceback" not in ended.out
