"""Teachers out of step: against averages that are really kept, one a rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mirai_ds.config import RunConfig, load
from mirai_ds.foresight import DesynchronisedTeacher, EmaTeacher
from mirai_ds.foresight.desynchronised import NEGLIGIBLE, OTHER_SEEDS
from mirai_ds.model import GPT, initialise
from mirai_ds.train.teacher import build_teacher
from tests.one_line import one_line

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other

CPU, RANKS, DECAY = torch.device("cpu"), 4, 0.75
TOKENS = torch.randint(17, (8, 64), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8)
FIELD = "foresight.desynchronised_ranks"


def config(*more: str) -> RunConfig:
    sizes = ["model.dim=16", "model.n_layer=3", "model.n_head=2", "foresight.projector_dim=16"]
    return load("digits-mirai-e", [*sizes, f"ema.decay={DECAY}", f"{FIELD}={RANKS}", "seed=5", *more])


def started(seed: int) -> dict[str, Tensor]:
    gpt = GPT(config().model)
    initialise(gpt, seed, config().model.init_std)
    return {name: value.detach().clone() for name, value in gpt.state_dict().items()}


def plain_features(weights: dict[str, Tensor], tokens: Tensor, labels: Tensor) -> Tensor:
    c = config()
    teacher = EmaTeacher(c.model, c.foresight, torch.float32, CPU, autocast=False)
    teacher.load((name, weights[name]) for name in teacher.names)
    return teacher.features(tokens, labels, None)


@pytest.fixture
def teacher() -> DesynchronisedTeacher:
    built, digest, notes = build_teacher(config(), CPU)
    assert isinstance(built, DesynchronisedTeacher)
    assert digest == ""
    assert notes == ["experiment: 4 teachers that began at different random weights, as in the authors' code"]
    return built


@pytest.mark.parametrize("updates", [0, 1, 6])
def test_equals_averages_that_are_kept(teacher: DesynchronisedTeacher, updates: int) -> None:
    """fp32: a weight is a sum of few numbers of size 0.1, an error of 1e-7 becomes at most 1e-5 in a feature."""
    averages = [started(5), *[started(5 + OTHER_SEEDS * rank) for rank in range(1, RANKS)]]
    for step in range(updates):  # all ranks hold the same model
        model = started(100 + step)
        for average in averages:
            for name, value in average.items():
                value.lerp_(model[name], 1 - DECAY)
    teacher.age(updates)
    teacher.load((name, averages[0][name]) for name in teacher.names)
    found = teacher.features(TOKENS, LABELS, None)
    for rank, average in enumerate(averages):
        rows = slice(2 * rank, 2 * rank + 2)
        torch.testing.assert_close(
            found[rows], plain_features(average, TOKENS[rows], LABELS[rows]), rtol=1e-4, atol=1e-5
        )
        if rank:  # and not rank 0's
            wrong = plain_features(averages[0], TOKENS[rows], LABELS[rows])
            assert (found[rows] - wrong).abs().max() > 1e-3
    # Asked again, the same: what is loaded for a rank does not stay.
    assert torch.equal(teacher.features(TOKENS, LABELS, None), found)


def test_a_start_long_ago_is_forgotten(teacher: DesynchronisedTeacher) -> None:
    teacher.age(60)
    assert DECAY**60 < NEGLIGIBLE
    weights = started(7)
    teacher.load((name, weights[name]) for name in teacher.names)
    assert torch.equal(teacher.features(TOKENS, LABELS, None), plain_features(weights, TOKENS, LABELS))


def test_one_rank_emulates_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    one_line(lambda: build_teacher(config(), CPU), f"{FIELD} = 4", "this run has 2; start it with --ranks 1")


MISTAKES: dict[str, Callable[[], object]] = {
    "mirai-i": lambda: load("digits-baseline", ["foresight.method=mirai-i", f"{FIELD}=8"]),
    "mtp": lambda: load("digits-baseline", ["foresight.method=mtp", f"{FIELD}=8"]),
    "a frozen teacher": lambda: config("foresight.teacher_weights=x.pt"),
}


@pytest.mark.parametrize("call", MISTAKES.values(), ids=list(MISTAKES))
def test_only_the_own_average_can_be_out_of_step(call: Callable[[], object]) -> None:
    one_line(call, FIELD, "the run's own EMA", "remove it")
