"""The plain alignment loss against a loop in fp64, and its corners."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mirai_ds.config import ForesightConfig, ModelConfig
from mirai_ds.foresight import MiraiObjective, index_table, slot_counts
from mirai_ds.kernels.foresight_cosine.reference import foresight_cosine
from mirai_ds.model import initialise, next_token_loss

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other


def random_case(heads: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, 11, (9, heads), generator=generator)
    return {
        "projected": [torch.randn(2, 9, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(heads)],
        "target": torch.randn(2, 11, 5, generator=generator, dtype=torch.float64).to(dtype),
        "index": index,
        "weights": torch.tensor([2.0, 0.5, 1.25, 0.0][:heads]),
        "counts": (index >= 0).sum(0).float(),
    }


def looped(case: dict[str, Any], reduction: str) -> tuple[float, list[float]]:
    """One number at a time."""
    case = {**case, "projected": [p.detach() for p in case["projected"]], "target": case["target"].detach()}
    batch, slots, width = case["projected"][0].shape
    cosines = []
    for k, states in enumerate(case["projected"]):
        total = 0.0
        for b in range(batch):
            for s in range(slots):
                row = int(case["index"][s, k])
                if row < 0:
                    continue
                x = [float(states[b, s, c]) for c in range(width)]
                y = [float(case["target"][b, row, c]) for c in range(width)]
                size = max(math.hypot(*x), 1e-12) * max(math.hypot(*y), 1e-12)
                total += sum(p * q for p, q in zip(x, y, strict=True)) / size
        cosines.append(total / (float(case["counts"][k]) * batch))
    weighted = [-float(w) * c for w, c in zip(case["weights"], cosines, strict=True)]
    return (sum(weighted) if reduction == "sum" else sum(weighted) / len(weighted)), cosines


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_equals_a_loop_in_fp64(heads: int, reduction: str) -> None:
    case = random_case(heads)
    loss, cosine = foresight_cosine(**case, reduction=reduction)
    wanted, cosines = looped(case, reduction)
    assert float(loss) == pytest.approx(wanted, rel=1e-12)
    assert cosine.tolist() == pytest.approx(cosines, rel=1e-12)
    assert loss.dtype == torch.float64
    stacked, _ = foresight_cosine(**{**case, "projected": torch.stack(case["projected"], 2)}, reduction=reduction)
    assert float(stacked) == float(loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_fp32_for_narrow_inputs(dtype: torch.dtype) -> None:
    case = random_case(3, dtype)
    loss, cosine = foresight_cosine(**case)
    assert loss.dtype == cosine.dtype == torch.float32
    exact, _ = looped(case, "sum")  # of the rounded inputs
    assert float(loss) == pytest.approx(exact, rel=2e-6)


def test_mean_is_sum_over_heads() -> None:
    case = random_case(4)
    total, _ = foresight_cosine(**case, reduction="sum")
    mean, _ = foresight_cosine(**case, reduction="mean")
    assert float(mean) == pytest.approx(float(total) / 4, rel=1e-12)


def test_counts_constant_or_valid() -> None:
    """Identical features: with valid counts every cosine is 1, with constant ones the share of valid slots."""
    for normalizer, wanted in (("valid", [1.0, 1.0, 1.0]), ("constant", [1.0, 12 / 16, 12 / 16])):
        config = ForesightConfig(method="mirai-i", convention="paper", num_heads=3, normalizer=normalizer)
        table = index_table(config, 4)
        ones = torch.ones(2, 16, 6)
        loss, cosine = foresight_cosine(
            [ones] * 3, ones, table, torch.tensor([1.0, 2.0, 4.0]), slot_counts(config, table), "sum"
        )
        assert cosine.tolist() == pytest.approx(wanted, rel=1e-6)
        assert float(loss) == pytest.approx(-(wanted[0] + 2 * wanted[1] + 4 * wanted[2]), rel=1e-6)


def test_scale_of_either_side_does_not_matter_and_sign_does() -> None:
    case = random_case()
    loss, cosine = foresight_cosine(**case)
    scaled = {**case, "projected": [7.0 * p for p in case["projected"]], "target": 0.01 * case["target"]}
    assert float(foresight_cosine(**scaled)[0]) == pytest.approx(float(loss), rel=1e-12)
    turned, opposite = foresight_cosine(**{**case, "target": -case["target"]})
    assert float(turned) == pytest.approx(-float(loss), rel=1e-12)
    assert opposite.tolist() == pytest.approx((-cosine).tolist(), rel=1e-12)


def test_zero_vectors_have_cosine_zero_and_finite_gradients() -> None:
    case = random_case(1)
    case["index"] = torch.arange(9)[:, None]
    case["counts"] = torch.tensor([9.0])
    case["target"][:, 4] = 0.0
    before, _ = looped(case, "sum")
    states = case["projected"][0]
    states[0, 0] = 0.0
    states.requires_grad_()
    loss, cosine = foresight_cosine(**case)
    wanted, cosines = looped(case, "sum")
    assert wanted != before
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-12)
    assert cosine.tolist() == pytest.approx(cosines, rel=1e-12)
    loss.backward()
    assert states.grad is not None
    assert bool(torch.isfinite(states.grad).all())
    assert torch.equal(states.grad[:, 4], torch.zeros(2, 5, dtype=torch.float64))  # a zero target pulls nowhere


def test_slots_without_a_target_add_nothing_even_when_not_finite() -> None:
    case = random_case()
    loss, _ = foresight_cosine(**case)
    broken = [p.clone() for p in case["projected"]]
    for k, states in enumerate(broken):
        free = (case["index"][:, k] < 0).nonzero().flatten()
        assert len(free) > 0
        states[:, free] = torch.tensor([math.nan, math.inf, 0, 1, 2], dtype=torch.float64)
        states.requires_grad_()
    again, _ = foresight_cosine(**{**case, "projected": broken})
    assert float(again.detach()) == float(loss)
    again.backward()
    for k, states in enumerate(broken):
        assert states.grad is not None
        free = case["index"][:, k] < 0
        assert torch.equal(states.grad[:, free], torch.zeros_like(states.grad[:, free]))
        assert bool((states.grad[:, ~free].abs().sum(-1) > 0).all()) == (float(case["weights"][k]) > 0)


@pytest.mark.parametrize("where", ["projected", "target"])
def test_nan_with_a_target_is_not_hidden(where: str) -> None:
    case = random_case(1)
    case["index"] = torch.arange(9)[:, None]
    (case["projected"][0] if where == "projected" else case["target"])[1, 3, 2] = math.nan
    assert math.isnan(float(foresight_cosine(**case)[0]))


def test_unused_rows_of_the_target_do_not_matter() -> None:
    case = random_case(1)
    case["index"] = torch.arange(9)[:, None]
    loss, _ = foresight_cosine(**case)
    case["target"][:, 9:] = math.nan
    assert float(foresight_cosine(**case)[0]) == float(loss)


@pytest.mark.parametrize("bad", [11, -2, 1000])
def test_index_outside_the_target(bad: int) -> None:
    case = random_case()
    case["index"][2, 1] = bad
    with pytest.raises(IndexError, match="target has 11 rows"):
        foresight_cosine(**case)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("projected", [torch.zeros(2, 9, 5)] * 2),
        ("projected", [torch.zeros(2, 9, 5), torch.zeros(2, 9, 4), torch.zeros(2, 9, 5)]),
        ("projected", [torch.zeros(2, 8, 5)] * 3),
        ("target", torch.zeros(3, 11, 5)),
        ("target", torch.zeros(2, 11, 6)),
        ("weights", torch.ones(2)),
        ("counts", torch.ones(4)),
        ("index", torch.zeros(9, 2, dtype=torch.int64)),
    ],
)
def test_shapes_that_do_not_fit(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"\(\d+,") as caught:
        foresight_cosine(**{**random_case(dtype=torch.float32), name: value})
    assert not isinstance(caught.value, IndexError)


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="reduction = 'max'"):
        foresight_cosine(**random_case(), reduction="max")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients(reduction: str) -> None:
    case = random_case()

    def loss_of(*projected: Tensor) -> Tensor:
        return foresight_cosine(**{**case, "projected": list(projected)}, reduction=reduction)[0]

    assert torch.autograd.gradcheck(loss_of, [p.requires_grad_() for p in case["projected"]])


def test_no_gradient_reaches_the_target_or_the_reported_cosine() -> None:
    case = random_case()
    case["target"].requires_grad_()
    case["projected"][0].requires_grad_()
    loss, cosine = foresight_cosine(**case)
    assert not cosine.requires_grad
    loss.backward()
    assert case["target"].grad is None


@pytest.mark.parametrize("convention", ["official", "paper"])
def test_objective_joins_losses(convention: str) -> None:
    """total = ntp + multiplier * alignment; without a target the heads are not touched."""
    model = ModelConfig(size="custom", dim=16, n_layer=3, n_head=2, vocab_size=20, num_classes=4, block_size=16)
    foresight = ForesightConfig(
        method="mirai-e", convention=convention, num_heads=3, weights=[2.0, 1.0, 0.5], projector_dim=8
    )
    foresight.fill_from_model(model)
    objective = MiraiObjective(model, foresight)
    initialise(objective, 0, std=0.3)
    tokens, labels = torch.arange(32).view(2, 16) % 20, torch.tensor([1, 3])
    target = torch.randn(2, 17, 16, generator=torch.Generator().manual_seed(0))
    alone, metrics = objective(tokens, labels, None)
    assert set(metrics) == {"ntp"}
    assert float(alone.detach()) == float(metrics["ntp"])
    total, metrics = objective(tokens, labels, None, target, 0.25)
    pull = -sum(w * c for w, c in zip([2.0, 1.0, 0.5], metrics["cosine"].tolist(), strict=True))
    pull = pull if convention == "official" else pull / 3
    assert abs(pull) > 1e-3
    assert float(metrics["alignment"]) == pytest.approx(pull, rel=1e-5)
    assert float(total.detach()) == pytest.approx(float(alone.detach()) + 0.25 * pull, rel=1e-6)
    states = objective.gpt(tokens[:, :-1], labels, tap=(2,)).hidden[2]  # round(3 * 8 / 12) = 2
    case = {"projected": [head(states) for head in objective.projectors], "target": target}
    case |= {"index": index_table(foresight, 4), "weights": torch.ones(3)}
    case["counts"] = slot_counts(foresight, case["index"])
    assert metrics["cosine"].tolist() == pytest.approx(looped(case, "sum")[1], rel=1e-4)


def test_objective_drops_by_the_samples_keys() -> None:
    model = ModelConfig(size="custom", dim=16, n_layer=3, n_head=2, vocab_size=20, num_classes=4, block_size=16)
    objective = MiraiObjective(model, ForesightConfig())
    initialise(objective, 0, std=0.3)
    torch.nn.init.normal_(objective.gpt.output.weight, generator=torch.Generator().manual_seed(0))
    tokens, labels, keys = torch.arange(32).view(2, 16) % 20, torch.tensor([1, 3]), torch.tensor([5, 6])
    found = objective(tokens, labels, keys)[0]
    assert torch.equal(found, next_token_loss(objective.gpt(tokens[:, :-1], labels, keys).logits, tokens))
    assert abs(float((found - objective(tokens, labels, None)[0]).detach())) > 1e-3
