"""Whole steps as CUDA graphs on a fake GPU: the plain step's bits, one launch, no wait, what falls back and says so."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gpu.rehearsal.conftest import FakeGpu
from tests.gpu.rehearsal.test_steps import Case, case

pytestmark = pytest.mark.rehearsal

# A graph and what feeds it: tokens, labels, keys (and images) of each micro-batch, two learning rates, the multiplier;
# and a copy of the results.  None of it grows with the network.
LAUNCHES = 10


def captured(*given: Any, schedule: Case | None = None, **named: Any) -> Case:
    """`case` with the whole step captured."""
    settings = case(*given, **named)
    settings["train"]["cuda_graph"] = "auto"
    settings["foresight"] |= {"schedule": schedule} if schedule else {}
    return settings


CASES: dict[str, Case] = {
    f"{method}, stage {stage}, {precision}": captured(method, stage, precision)
    for stage in range(3)
    for method, precision in (
        ("none", "bf16-autocast"), ("mirai-e", "bf16-autocast"), ("mirai-e", "fp32"), ("mirai-e", "bf16"),
    )
    if (stage, precision) != (0, "bf16")
} | {
    "mtp": captured("mtp"),
    "par": captured(model={"par_tokens": 4}),
    "mirai-i": captured("mirai-i", foresight={"encoder": {"name": "vit_tiny_patch16_224"}}),
    "frozen teacher": captured(foresight={"teacher_weights": "replaced by random ones"}),
    "stochastic depth": captured(model={"drop_path": 0.2}),
    "recompute full": captured(train={"recompute": {"policy": "full"}}),
    "recompute mlp": captured(train={"recompute": {"policy": "mlp"}}),
    "recompute every-n": captured(train={"recompute": {"policy": "every-n", "every": 2}}),
    "accumulation": captured(train={"micro_batch_size": 4}),
    "whole cross-entropy": captured(train={"cross_entropy": "whole"}),
    "not deterministic": captured(train={"deterministic": False}),
    "overlap": captured(zero={"overlap_comm": True}),
    "multiplier of each step": captured(schedule={"kind": "cosine", "final": 0.1}),
    # Heads wake after two fifths of an epoch of 14 steps: both kinds of step are captured before the traced ones.
    "asleep, then aligned": captured(foresight={"warmup_epochs": 0.4}) | {"rehearsal": {"warm": 10}},
    "diagnostics": captured(train={"micro_batch_size": 4}) | {"logging": {"diagnostics": True}},
    "heads alone, then a ramp": captured(
        foresight={"warmup_epochs": 0.3, "head_warmup_epochs": 0.3, "ramp_epochs": 1.0}
    ) | {"rehearsal": {"warm": 10}},
    "multiplier of a step": captured(schedule={"kind": "step", "at_epochs": [0.4]}) | {"rehearsal": {"warm": 10}},
}  # fmt: skip


@pytest.fixture(scope="module")
def results(fake_gpu: FakeGpu, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, Case]]:
    """Of each case what the captured steps did, and the same steps run plainly."""
    folder = tmp_path_factory.mktemp("captured")
    plain = json.loads(json.dumps(CASES))
    for settings in plain.values():
        settings["train"]["cuda_graph"] = "off"
        settings["rehearsal"] = {"warm": 4} | settings.get("rehearsal", {})
    found = []
    for name, cases in (("graph", CASES), ("plain", plain)):
        (folder / f"{name}.json").write_text(json.dumps(cases), encoding="utf-8")
        fake_gpu("-m", "tests.gpu.rehearsal.steps", str(folder / f"{name}.json"), str(folder / f"{name}-done.json"))
        found.append(json.loads((folder / f"{name}-done.json").read_text(encoding="utf-8")))
    return {name: (found[0][name], found[1][name]) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_a_replay_is_the_plain_step_to_the_last_bit(results: dict[str, tuple[Case, Case]], name: str) -> None:
    graph, plain = results[name]
    assert "error" not in graph, graph["error"]
    assert "error" not in plain, plain["error"]
    for quantity in ("losses", "norms", "state", "refused"):
        assert graph[quantity] == plain[quantity], quantity
    # Each step moved the weights.  Losses of a network this new lie within 1e-4, and two may round to one number.
    assert len(set(graph["norms"])) == len(graph["norms"]) >= 6
    assert graph["refused"] == 0


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_one_launch_and_waits_for_nothing(results: dict[str, tuple[Case, Case]], name: str) -> None:
    graph, plain = results[name]
    assert graph["plain"] == ""
    assert graph["graphs"] == 1
    micro_batches = 2 if name in ("accumulation", "diagnostics") else 1
    assert graph["launches"] + graph["graphs"] + graph["copies"] <= LAUNCHES * micro_batches
    assert plain["launches"] > 500
    assert (graph["waits"], graph["pageable"], graph["mixed"], graph["missing"]) == ({}, 0, {}, {})


@pytest.mark.parametrize("name", CASES)
def test_all_memory_goes_with_the_engine(results: dict[str, tuple[Case, Case]], name: str) -> None:
    """How much of it there is, is looked at where sizes are real."""
    graph, plain = results[name]
    assert graph["left"] <= plain["left"]


PLAINLY = {
    "stage 3": (captured("mirai-e", 3), "ZeRO-3 asks the device"),
    "offloaded": (captured(zero={"offload_optimizer": {"device": "cpu"}}), "the optimizer is in host memory"),
    "deepspeed": (
        captured(train={"recompute": {"policy": "full", "implementation": "deepspeed"}}), "state of random generators",
    ),
    "desynchronised": (captured(foresight={"desynchronised_ranks": 2}), "DesynchronisedTeacher is not `capturable`"),
    "off": (case(), "train.cuda_graph is off"),
}  # fmt: skip


def test_what_cannot_be_captured_runs_plainly_and_says_why(fake_gpu: FakeGpu, tmp_path: Any) -> None:
    (tmp_path / "cases.json").write_text(json.dumps({name: given for name, (given, _) in PLAINLY.items()}), "utf-8")
    fake_gpu("-m", "tests.gpu.rehearsal.steps", str(tmp_path / "cases.json"), str(tmp_path / "done.json"))
    done = json.loads((tmp_path / "done.json").read_text("utf-8"))
    for name, (_, reason) in PLAINLY.items():
        assert reason in done[name]["plain"], name
        assert (done[name]["graphs"], len(set(done[name]["norms"]))) == (0, len(done[name]["norms"])), name


def test_a_capture_that_fails_falls_back(fake_gpu: FakeGpu, tmp_path: Any) -> None:
    """A teacher of the user's own that reads from the device: the fourth step finds out, is run plainly, and so on; the
    numbers are those of a run that never tried."""
    own = {"encoder": {"name": "tests.gpu.rehearsal.refused:AskingTeacher"}}
    tries = captured("mirai-i", foresight=own) | {"rehearsal": {"warm": 4}}
    never = case("mirai-i", foresight=own) | {"rehearsal": {"warm": 4}}
    (tmp_path / "cases.json").write_text(json.dumps({"tries": tries, "never": never}), "utf-8")
    said = fake_gpu("-m", "tests.gpu.rehearsal.steps", str(tmp_path / "cases.json"), str(tmp_path / "done.json"))
    done = json.loads((tmp_path / "done.json").read_text("utf-8"))
    assert "error" not in done["tries"], done["tries"]["error"]
    assert "captur" in done["tries"]["plain"]
    assert "the step cannot be captured as a CUDA graph (" in said.stdout + said.stderr
    for quantity in ("losses", "norms", "state"):
        assert done["tries"][quantity] == done["never"][quantity], quantity


def test_a_refused_replay_is_examined_and_made_again(fake_gpu: FakeGpu) -> None:
    """NaN comes into one replay from outside, as from a fault of memory: the step is found finite when it is run again
    plainly, and the run goes on, captured, as if nothing had been.  Graphs that were forgotten are captured anew."""
    done = json.loads(fake_gpu("-m", "tests.gpu.rehearsal.refused").stdout.splitlines()[-1])
    refused, undisturbed = done["refused"], done["undisturbed"]
    assert [step.pop("made again") for step in refused["steps"]] == [number == 5 for number in range(10)]
    assert not any(step.pop("made again") for step in undisturbed["steps"])
    assert refused == undisturbed
    assert refused["plain"] == ""
    assert len({step["loss"] for step in refused["steps"]}) == 10
