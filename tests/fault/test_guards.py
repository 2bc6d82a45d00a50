"""NaN, spikes, endless restarts, and the checks before the first step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.format import StateReader
from mirai_ds.config import UserError
from mirai_ds.train.hooks import spike as spike_hook
from mirai_ds.train.skipped import SkippedSteps
from tests.fault.faulty_ranks import Kill, around_steps, curve, pictures, run_ranks, tensors
from tests.fault.test_kills import IF_PRESENT, assert_same, finish
from tests.marks import by_hand


def test_only_skips_of_steps_that_follow_each_other_count_together() -> None:
    skipped = SkippedSteps()
    counts = []
    for step in (7, 8, 20, 21, 22, 40):
        skipped.add(step)
        counts.append(skipped.in_a_row)
    assert counts == [1, 2, 1, 2, 3, 1]
    again = SkippedSteps()
    again.load_state_dict(skipped.state_dict())
    again.add(41)
    assert again.in_a_row == 2


def test_a_spike_is_one_beside_the_last_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses that fall from 8 to 2: 5 is none in the beginning and one at the end."""
    config = SimpleNamespace(action="stop", window=4, sigmas=6.0)
    session: Any = SimpleNamespace(config=SimpleNamespace(guard=SimpleNamespace(spike=config)), step=0)
    monkeypatch.setattr(spike_hook, "mean_over_ranks", lambda values: {"ntp": [values["ntp"]]})
    hook = spike_hook.SpikeHook(SimpleNamespace(scalars=lambda *_: None))  # type: ignore[arg-type]
    for loss in (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.5, 2.2, 2.1, 2.0):
        hook.after_step(session, SimpleNamespace(applied=True, metrics={"ntp": loss}))  # type: ignore[arg-type]
    assert hook.window == [2.5, 2.2, 2.1, 2.0]
    with pytest.raises(UserError, match=r"loss 5\.0000 is above"):
        hook.after_step(session, SimpleNamespace(applied=True, metrics={"ntp": 5.0}))  # type: ignore[arg-type]


def break_module(name: str, step: int, rank: int, row: int, times: int = 1000, backward: bool = False) -> None:
    """One row of a module's output (or of the gradient that arrives at it) becomes NaN in that step on that rank."""
    if int(os.environ["RANK"]) != rank:
        return
    left, now, hooked = [times], [-1], []

    def poison(_m: Any, _i: Any, out: Any) -> Any:
        if now[0] not in (step, step + 1 if times > 500 else step) or left[0] <= 0 or not torch.is_grad_enabled():
            return out
        left[0] -= 1
        tensor = out[0] if isinstance(out, tuple) else out
        mask = torch.zeros_like(tensor)
        mask[row if mask.dim() else ()] = float("nan")  # the output layer gives the loss itself
        if backward:
            tensor.register_hook(lambda g: g + mask)
            return out
        return tensor + mask

    def stepped(inner: Any, session: Any, number: int) -> Any:
        now[0] = number
        if not hooked:  # for good, and before a step's instruments
            module = dict(session.engine.ds.module.named_modules())[name]
            hooked.append(module.register_forward_hook(poison))
        return inner(session, number)

    around_steps(stepped)


ONE_STEP = ["train.recompute={policy: none}", "guard.nonfinite_skips=2"]


@pytest.mark.parametrize(("stage", "backward"), [
    by_hand("zero0", False), by_hand("zero2", True), by_hand("zero3", False), ("zero3", True), ("zero2-offload", False),
])  # fmt: skip
def test_nan_is_named_kept_and_not_applied(tmp_path: Path, stage: str, backward: bool) -> None:
    run = tmp_path / "run"
    settings = [*ONE_STEP, "train.max_steps=9", "checkpoint.every_steps=1"]
    fault = ("gpt.layers.1.feed_forward", 5, 1, 3, 1000, backward)
    ended = run_ranks(run, "--deepspeed", stage, settings=settings, prepare=break_module, arguments=fault)
    assert ended.codes == [0, 0], ended.out[-3000:]
    folder = run / "nonfinite" / "step-00000006"
    report = json.loads((folder / "report.json").read_text())
    finding = report["findings"][1]
    assert (finding["module"], finding["rank"]) == ("gpt.layers.1.feed_forward", 1)
    assert finding["what"] == ("gradient of the output" if backward else "output")
    # Rank 1 holds rows 16..31 of the global batch of step 6; its row 3 is the one.
    order_of = expected_sample(5, 16 + 3)
    assert finding["samples"] == [order_of]
    assert f"samples [{order_of}]" in ended.out
    # Steps 6 and 7 were not applied: weights, moments and average are those after step 5.
    steps = {r["step"]: r for r in curve(run) if "loss/ntp" in r}
    assert steps[7]["optimizer/skipped_steps"] == 2
    assert steps[9]["optimizer/skipped_steps"] == 2
    state = StateReader(folder / "state")
    kept = StateReader(store.folder_of(run, 7))
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
        for name in state.shapes:
            assert torch.equal(state.read(kind, name), kept.read(kind, name))
    assert store.verify(folder / "state").step == 5


def expected_sample(step: int, position: int) -> int:
    """Place in the digits of a position in the global batch."""
    from mirai_ds.config import load
    from mirai_ds.data import DataOrder, load_dataset

    config = load("digits-mirai-e", [])
    train = load_dataset(config.data, config.model).train
    indices, _ = DataOrder(len(train), 32, config.seed).batch(step)
    return int(train.places(indices[position : position + 1].numpy())[0])


@pytest.mark.matrix
def test_the_module_is_named_though_blocks_are_compiled(tmp_path: Path) -> None:
    """Hooks are no part of compiled graphs: the step is examined as it was written.  The fault is in the weights, so
    that the compiled step has it too."""
    run = tmp_path / "run"
    ended = run_ranks(run, settings=[*ONE_STEP, "guard.nonfinite_skips=0", "train.compile=blocks"],
                      prepare=break_weight, arguments=("gpt.layers.1.feed_forward.w2", 3))  # fmt: skip
    assert ended.codes == [2, 2], ended.out[-3000:]
    assert "output of gpt.layers.1.feed_forward.w2 on rank" in ended.outcome, ended.outcome


def break_weight(name: str, step: int) -> None:
    """From that step on the module's product overflows: a scale that the masters do not have."""

    def stepped(inner: Any, session: Any, number: int) -> Any:
        if number == step:
            weight = dict(session.engine.ds.module.named_modules())[name].weight
            weight.data.fill_(3e38)
        return inner(session, number)

    around_steps(stepped)


def test_too_many_in_a_row_stop_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = run_ranks(run, settings=[*ONE_STEP, "guard.nonfinite_skips=1"], prepare=break_module,
                      arguments=("gpt.output", 5, 0, 0))  # fmt: skip
    assert ended.codes == [2, 2], ended.out[-3000:]
    assert ended.outcome.startswith("failed step 7: the first value that is not finite: output of gpt.output on rank 0")
    assert "2 in a row, guard.nonfinite_skips = 1" in ended.outcome
    assert store.list_steps(run) == [4]


def test_a_fault_of_the_machine_is_repeated_away(whole: Path, tmp_path: Path) -> None:
    """NaN that is not there the second time: the step is done as if nothing had been, to the last digit."""
    run = tmp_path / "run"
    ended = run_ranks(run, prepare=break_module, arguments=("gpt.layers.2", 5, 1, 3, 1))
    assert ended.codes == [0, 0], ended.out[-3000:]
    assert "not finite, but finite when repeated" in ended.out
    assert_same(run, whole, 24)


@pytest.mark.parametrize("times", [by_hand(1), 1000])
def test_what_is_found_out_later_ends_the_same(tmp_path: Path, times: int) -> None:
    """Nobody looks for twelve steps: the refused step, the ones after it and the heads' awakening (after step 8) are
    done again, and weights, moments, average, curve and report are to the last digit those of a run that looks at each
    step."""
    rare = ["checkpoint.every_steps=12", "eval.loss.every_steps=null", "sampling.every_steps=null",
            "train.max_steps=12"]  # fmt: skip
    runs = {every: tmp_path / str(every) for every in (1, 12)}
    said = {}
    for every, run in runs.items():
        fault = ("gpt.layers.1.feed_forward", 5, 1, 3, times)
        settings = [*ONE_STEP, *rare, f"logging.every_steps={every}"]
        ended = run_ranks(run, "--deepspeed", "zero2", settings=settings, prepare=break_module, arguments=fault)
        assert ended.codes == [0, 0], ended.out[-3000:]
        said[every] = [line.partition("; see")[0] for line in ended.out.splitlines() if "not finite" in line]
    assert said[1] == said[12]
    assert len(said[1]) == (1 if times == 1 else 2)
    assert tensors(runs[12], 12) == tensors(runs[1], 12)
    assert pictures(runs[12]) == pictures(runs[1])
    curves = {every: {r["step"]: r for r in curve(run) if "loss/ntp" in r} for every, run in runs.items()}
    assert curves[12][12] == curves[1][12]
    assert curves[12][12]["optimizer/skipped_steps"] == (0 if times == 1 else 2)


def spike_at(step: int, times: int) -> None:
    """The loss of a batch of data is three times as large, whatever the weights."""
    from mirai_ds.foresight.objective import MiraiObjective

    forward = MiraiObjective.forward

    def stepped(inner: Any, session: Any, number: int) -> Any:
        bad = step <= number + session.progress.batch_offset < step + times

        def louder(self: Any, *arguments: Any, **named: Any) -> Any:
            loss, metrics = forward(self, *arguments, **named)
            return loss * 3, {**metrics, "ntp": metrics["ntp"] * 3}

        MiraiObjective.forward = louder if bad else forward  # type: ignore[method-assign]
        return inner(session, number)

    around_steps(stepped)


SPIKE = ["checkpoint.every_steps=4", "checkpoint.keep_last=9"]


def spike(action: str, **more: Any) -> list[str]:
    fields = {"action": action, "window": 10, "sigmas": 6.0, **more}
    return [*SPIKE, *[f"guard.spike.{name}={value}" for name, value in fields.items()]]


def test_a_spike_rolls_back_and_leaves_the_batches_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = run_ranks(run, settings=spike("rollback"), prepare=spike_at, arguments=(17, 1))
    assert ended.codes == [0, 0], ended.out[-3000:]
    assert "step 18: loss" in ended.out
    assert "back to step 16 (rollback 1 of 3), leaving out 2 batches in all" in ended.out
    steps = [r["step"] for r in curve(run) if "loss/ntp" in r]
    assert steps == list(range(1, 25))
    assert not any("guard/spike" in r for r in curve(run))  # taken back with the step
    info = store.verify(store.folder_of(run, 24))
    assert (info.batch_offset, info.incarnation, info.hooks["spike"]["rollbacks"]) == (2, 2, 1)
    # Killed and resumed on the new branch, the run repeats itself.
    again = tmp_path / "again"
    run_ranks(
        again, *IF_PRESENT, settings=spike("rollback"), prepare=spike_at, arguments=(17, 1), kill=Kill(1, "step 22")
    )
    finish(again, settings=spike("rollback"), prepare=spike_at, arguments=(17, 1))
    assert curve(again) == curve(run)


def test_a_spike_before_the_first_checkpoint_is_only_told(tmp_path: Path) -> None:
    settings = [*spike("rollback"), "checkpoint.every_steps=20", "train.max_steps=15"]
    ended = run_ranks(tmp_path / "run", settings=settings, prepare=spike_at, arguments=(12, 1))
    assert ended.codes == [0, 0], ended.out[-3000:]
    assert "step 13: loss" in ended.out
    assert "there is no checkpoint to go back to yet" in ended.out


def test_rollbacks_that_do_not_help_stop_the_run(tmp_path: Path) -> None:
    ended = run_ranks(
        tmp_path / "run", settings=spike("rollback", max_rollbacks=2), prepare=spike_at, arguments=(17, 99)
    )
    assert ended.codes == [2, 2]
    assert "2 rollbacks did not help (guard.spike.max_rollbacks)" in ended.outcome


@pytest.mark.parametrize(("action", "codes"), [("warn", [0, 0]), ("stop", [2, 2])])
def test_a_spike_is_told_or_stops(tmp_path: Path, action: str, codes: list[int]) -> None:
    run = tmp_path / "run"
    ended = run_ranks(run, settings=[*spike(action), "train.max_steps=20"], prepare=spike_at, arguments=(17, 1))
    assert ended.codes == codes, ended.out[-3000:]
    assert "step 18: loss" in ended.out
    told = [r["step"] for r in curve(run) if "guard/spike" in r]
    assert told == [18]
    assert ("WARNING rank 0: step 18: loss" in (run / "log.txt").read_text()) == (action == "warn")
    assert ("ERROR rank 0: step 18: loss" in (run / "log.txt").read_text()) == (action == "stop")


def test_no_spike_in_an_ordinary_run(whole: Path, tmp_path: Path) -> None:
    """The guard looks and changes nothing."""
    run = tmp_path / "run"
    ended = run_ranks(run, settings=["guard.spike={action: stop, window: 10}", "checkpoint.keep_last=3"])
    assert ended.codes == [0, 0], ended.out[-3000:]
    assert curve(run) == curve(whole)


def crash_in_step(step: int) -> None:

    def crashing(inner: Any, session: Any, number: int) -> Any:
        if number == step:
            raise RuntimeError("the driver says no")
        return inner(session, number)

    around_steps(crashing)


def test_restarts_without_progress_come_to_an_end(whole: Path, tmp_path: Path) -> None:
    """A scheduler would requeue this for ever; the fourth start refuses, one by hand may try."""
    run = tmp_path / "run"
    for _ in range(3 + 1):  # the first one gets to step 4
        ended = run_ranks(run, *IF_PRESENT, prepare=crash_in_step, arguments=(6,))
        assert ended.outcome.startswith("requeue crashed: rank "), ended.out[-2000:]
        assert "RuntimeError: the driver says no" in ended.outcome
    ended = run_ranks(run, *IF_PRESENT, prepare=crash_in_step, arguments=(6,))
    assert ended.codes == [2, 2]
    assert ended.outcome.startswith("failed")
    assert "the last 3 starts died without getting to a checkpoint after step 4" in ended.outcome
    ended = run_ranks(run, "--resume", "auto", settings=["train.max_steps=8"])
    assert ended.codes == [0, 0], ended.out[-2000:]
    assert curve(run) == [record for record in curve(whole) if record["step"] <= 8]
