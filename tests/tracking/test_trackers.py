"""Trackers one by one, and the thread that keeps what they suffer from training."""

from __future__ import annotations

import json
import logging
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mirai_ds.config import RunConfig, build
from mirai_ds.tracking import TrackedRun, Tracker
from mirai_ds.tracking import tracker as tracker_module
from mirai_ds.tracking.csv_file import CsvFile
from mirai_ds.tracking.json_lines import JsonLines
from mirai_ds.tracking.registry import TRACKERS, close_trackers, find_trackers, open_trackers
from mirai_ds.tracking.tags import CHARTS, MEANINGS, meaning
from mirai_ds.tracking.tensorboard import TensorBoard
from mirai_ds.tracking.tracker import BackgroundTracker
from mirai_ds.tracking.wandb_run import WandbRun
from tests.one_line import one_line

PICTURE = np.zeros((4, 6, 3), np.uint8)


def start(folder: Path, step: int = 0, records: JsonLines | None = None) -> TrackedRun:
    return TrackedRun("mine", folder, step, records.position() if records else 0, {"seed": 3})


# --- the thread -------------------------------------------------------------------------------------------------------


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("mirai_ds"), "propagate", True)
    return caplog


class Recorder(Tracker):
    """Remembers its calls; fails where it is told to."""

    calls: list[tuple[Any, ...]]
    fail_at: tuple[int, ...] = ()

    def __init__(self, run: TrackedRun) -> None:
        self.calls = []

    def scalars(self, values: dict[str, float], step: int) -> None:
        if step in self.fail_at:
            raise ConnectionError("the network\nis down")
        self.calls.append((step, values))

    def close(self) -> None:
        self.calls.append(("closed",))


def test_calls_come_in_order_and_all_before_the_end(tmp_path: Path) -> None:
    one = Recorder(start(tmp_path))
    background = BackgroundTracker("mine", lambda: one)
    for step in range(50):
        background.scalars({"a": step / 2}, step)
    background.close()
    assert one.calls == [*((step, {"a": step / 2}) for step in range(50)), ("closed",)]


def test_a_tracker_that_fails_is_told_once_and_goes_on(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    one = Recorder(start(tmp_path))
    one.fail_at = (1, 2, 4)
    background = BackgroundTracker("mine", lambda: one)
    for step in range(6):
        background.scalars({"a": 1.0}, step)
    background.close()
    assert [call[0] for call in one.calls] == [0, 3, 5, "closed"]
    assert [record.getMessage() for record in warnings.records] == [
        "tracking mine: ConnectionError: the network is down; training goes on, metrics.jsonl has all values"
    ]


def test_one_that_cannot_begin(warnings: pytest.LogCaptureFixture) -> None:
    def refuse() -> Tracker:
        raise SystemExit("no account")

    background = BackgroundTracker("mine", refuse)
    background._thread.join(60)
    for step in range(3):
        background.scalars({"a": 1.0}, step)
        background.image("b", PICTURE, step)
    background.close()
    (record,) = warnings.records
    assert "cannot begin: SystemExit: no account" in record.getMessage()


def test_one_that_hangs_holds_nobody_up(
    tmp_path: Path, warnings: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for it: calls beyond what may wait are left out, and the end comes without it."""
    monkeypatch.setattr(tracker_module, "WAITING", 10)
    began, go_on = threading.Event(), threading.Event()

    class Stuck(Recorder):
        def scalars(self, values: dict[str, float], step: int) -> None:
            began.set()
            go_on.wait(60)
            super().scalars(values, step)

    one = Stuck(start(tmp_path))
    background = BackgroundTracker("mine", lambda: one)
    background.scalars({}, 0)
    assert began.wait(60)
    for step in range(1, 30):
        background.scalars({}, step)
    background.close(0.01)
    assert [record.getMessage().partition(";")[0] for record in warnings.records] == [
        "tracking mine: is 10 values behind, the next are left out"
    ]
    go_on.set()
    background._thread.join(60)
    assert [call[0] for call in one.calls] == [*range(11), "closed"]


# --- csv --------------------------------------------------------------------------------------------------------------


def write(folder: Path, steps: range, resumed: int = 0, length: int = -1, scale: float = 1.0) -> JsonLines:
    """As `Sinks` does: a record, then the tracker."""
    records = JsonLines(folder / "metrics.jsonl", resumed, length)
    table = CsvFile(start(folder, resumed, records))
    for step in steps:
        for values in ({"loss/ntp": scale / 3**step, "optimizer/lr": 1e-3}, {"held_out/ntp_ema": scale + step}):
            records.write({"step": step, "epoch": 0.5, **values})
            table.scalars(values, step)
    table.close()
    records.close()
    return records


def rows(folder: Path) -> list[tuple[int, str, float]]:
    first, *lines = (folder / "metrics.csv").read_text().splitlines()
    assert first == "step,tag,value"
    return [(int(step), tag, float(value)) for step, tag, value in (line.split(",") for line in lines)]


def of_records(folder: Path) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], tag, value) for line in lines for tag, value in line.items() if tag not in ("step", "epoch")]


def test_the_table_is_the_records_whatever_was_gone_back(tmp_path: Path) -> None:
    write(tmp_path, range(1, 5))
    assert rows(tmp_path) == of_records(tmp_path)
    assert len(rows(tmp_path)) == 12
    write(tmp_path, range(3, 7), resumed=2, scale=7.0)  # other values: the run went on with other batches
    assert [step for step, tag, _ in rows(tmp_path) if tag == "loss/ntp"] == [1, 2, 3, 4, 5, 6]
    assert rows(tmp_path) == of_records(tmp_path)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("7,loss/n")  # torn by a full disk
    write(tmp_path, range(7, 8), resumed=6)
    assert rows(tmp_path) == of_records(tmp_path)
    write(tmp_path, range(1, 2))  # anew
    assert [step for step, _, _ in rows(tmp_path)] == [1, 1, 1]


def test_a_table_begun_late_has_everything(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    (tmp_path / "metrics.csv").unlink()
    write(tmp_path, range(4, 5), resumed=3)
    assert [step for step, tag, _ in rows(tmp_path) if tag == "loss/ntp"] == [1, 2, 3, 4]


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_has_meanings_and_charts(tmp_path: Path) -> None:
    board = TensorBoard(start(tmp_path))
    for step in (1, 2):
        board.scalars({"loss/ntp": 3.0 / step, "mine/own": 1.0}, step)
    board.image("samples/grid", PICTURE, 2)
    board.text("config/run", "a: 1", 0)
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/ntp")] == [(1, 3.0), (2, 1.5)]
    assert events.SummaryMetadata("loss/ntp").summary_description == MEANINGS["loss/ntp"]
    assert [(e.step, e.value) for e in events.Scalars("mine/own")] == [(1, 1.0), (2, 1.0)]  # nobody knows its meaning
    (config,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("custom_scalars")]
    layout = events.Tensors(config)[0].tensor_proto.string_val[0]
    assert b"losses" in layout
    assert layout.index(b"losses") < layout.index(b"quality") < layout.index(b"machine")
    assert events.Images("samples/grid")[0].width == 6


def test_meanings() -> None:
    assert meaning("cosine/head2_down0_right1") == MEANINGS["cosine/"]
    assert meaning("quality/fid") == MEANINGS["quality/fid"]
    assert meaning("quality/sfid") == MEANINGS["quality/"]
    assert meaning("mine/own") == ""
    assert next(iter(CHARTS)) == "losses"


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def history(folder: Path) -> list[tuple[str, int, dict[str, float]]]:
    """(run, step, values) of all offline files, in the order of their starts: LevelDB's log format, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda one: one.stat().st_mtime_ns):
        data, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # the rest of a block that holds no header
                at += 32768 - at % 32768
                continue
            length, kind = struct.unpack_from("<HB", data, at + 4)
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record = Record.FromString(whole)
                whole = b""
                if record.WhichOneof("record_type") == "history":
                    items = {".".join(item.nested_key) or item.key: item for item in record.history.item}
                    values = {key: json.loads(item.value_json) for key, item in items.items() if key[0] != "_"}
                    found.append((path.stem, record.history.step.num, values))
    return found


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the package wandb is not installed: pip install 'mirai_ds[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")


def log(folder: Path, steps: range, resumed: int = 0, picture: bool = False) -> None:
    one = WandbRun(start(folder, resumed))
    for step in steps:
        one.scalars({"loss/ntp": 1 / 3 + step}, step)
        one.scalars({"held_out/ntp_ema": 2.5}, step)
        if picture:
            one.image("samples/grid", PICTURE, step)
    one.close()


@pytest.mark.usefixtures("offline")
def test_wandb_has_each_step_once_after_a_start_that_went_back(tmp_path: Path) -> None:
    log(tmp_path, range(1, 5), picture=True)
    log(tmp_path, range(3, 7), resumed=2)
    sent = history(tmp_path)
    assert [step for _, step, _ in sent] == [1, 2, 3, 4, 5, 6]
    assert all(values["loss/ntp"] == 1 / 3 + step for _, step, values in sent)
    assert all(values["held_out/ntp_ema"] == 2.5 for _, _, values in sent)
    assert sent[0][2]["samples/grid.width"] == 6
    assert len({run for run, _, _ in sent}) == 1  # one run there, in two files
    log(tmp_path, range(1, 3))  # anew: another run
    assert len({run for run, _, _ in history(tmp_path)}) == 2


def test_wandb_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    one_line(lambda: find_trackers(["csv", "wandb"]), "is not installed", "pip install 'mirai_ds[wandb]'")


@pytest.mark.usefixtures("offline")
def test_without_a_login_it_writes_offline_and_says_how_to_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    import wandb

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    log(tmp_path, range(1, 2))
    assert [step for _, step, _ in history(tmp_path)] == [1]
    assert f"`wandb sync {tmp_path}/wandb/offline-run-*` sends it" in warnings.text


# --- by name ----------------------------------------------------------------------------------------------------------


def test_the_same_values_go_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from mirai_ds.tracking import Tracker\nSEEN = []\nclass Mine(Tracker):\n"
        "    def scalars(self, values, step):\n        SEEN.append((step, values))\nclass NoTracker:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = find_trackers(["tensorboard", "csv", "mine:Mine"])
    given = {1: {"loss/ntp": 0.5, "score/a": 1.0}, 2: {"loss/ntp": 0.25}}
    opened = open_trackers(found, start(tmp_path))
    for one in opened:
        for step, values in given.items():
            one.scalars(values, step)
    close_trackers(opened)
    import mine  # type: ignore[import-not-found]

    flat = [(step, tag, value) for step, values in given.items() for tag, value in values.items()]
    assert dict(mine.SEEN) == given
    assert rows(tmp_path) == flat
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = [(e.step, tag, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    assert sorted(seen) == sorted(flat)
    one_line(lambda: find_trackers(["mine:NoTracker"]), "tracking = 'mine:NoTracker'", "no subclass of")
    one_line(lambda: find_trackers(["nowhere:Mine"]), "cannot be imported")


def test_the_configuration_knows_the_names() -> None:
    assert RunConfig().tracking == ["tensorboard"]
    assert set(TRACKERS) == {"tensorboard", "wandb", "csv"}
    for value, said in ((["wandbs"], "did you mean 'wandb'?"), (["csv", "csv"], "names a tracker twice")):
        one_line(lambda value=value: build({"tracking": value}), said)
