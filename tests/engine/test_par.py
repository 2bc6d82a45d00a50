"""PAR under the engine: masks through every recompute policy, the learnable tokens through every ZeRO stage.

Bounds as in test_trajectories.py and test_gradients.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mirai_ds.engine.engine import parameter_groups
from tests.engine import cases
from tests.engine.test_gradients import BOUND, POLICIES
from tests.engine.test_trajectories import FP32_BOUND

FULL = {"policy": "full"}


@pytest.fixture(scope="module")
def plain(ranks: Any) -> np.ndarray[Any, Any]:
    """PAR with Mirai-E written out in plain PyTorch."""
    return np.array(ranks[1].run(cases.plain_losses, "mirai-e", 20, 4)[0])


@pytest.mark.parametrize(("stage", "recompute"), [(0, {}), (3, FULL)])
def test_stages_follow_plain_pytorch(ranks: Any, plain: Any, stage: int, recompute: dict[str, Any]) -> None:
    losses = ranks[2].run(cases.losses_case, "mirai-e", stage, 1, recompute, par_tokens=4)
    assert losses[0] == losses[1]
    assert plain[0] - plain[-1] > 2
    assert np.abs(np.array(losses[0]) - plain).max() <= FP32_BOUND


def test_par_is_another_model(ranks: Any, plain: Any) -> None:
    """The control: in raster order, or with Mirai-I, the losses are others."""
    raster = np.array(ranks[1].run(cases.plain_losses, "mirai-e", 20)[0])
    assert np.abs(raster - plain).max() > 1e-2


@pytest.mark.matrix
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("method", "policy"), [("mirai-e", "full"), ("mirai-e", "every-n"), ("mirai-e", "deepspeed"), ("mirai-i", "none")]
)
def test_applied_gradient_is_the_average(ranks: Any, method: str, stage: int, policy: str) -> None:
    found = ranks[2].run(cases.gradient_case, method, stage, 2, POLICIES[policy], par_tokens=4)
    assert max(found) <= BOUND


def test_learnable_tokens_travel_with_the_teacher() -> None:
    config = cases.toy_config("mirai-e", par_tokens=4)
    objective = cases.toy_objective(config)
    names = {id(p): name for name, p in objective.named_parameters()}
    owners = {names[id(p)]: g["owner"] for g in parameter_groups(objective, config) for p in g["params"]}
    assert owners["gpt.spe_tok_embeddings.special_embeddings.weight"] == "teacher"
    decayed = {names[id(p)] for g in parameter_groups(objective, config) for p in g["params"] if g["weight_decay"]}
    assert "gpt.spe_tok_embeddings.special_embeddings.weight" in decayed
