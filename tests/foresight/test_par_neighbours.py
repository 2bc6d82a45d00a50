"""Neighbours on the grid through PAR's order: slots, seams, and the objective that they lead to."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mirai_ds.config import ConfigError, ForesightConfig, ModelConfig
from mirai_ds.foresight import (
    EmaTeacher,
    MiraiObjective,
    decoded_targets,
    index_table,
    offsets,
    seam_notes,
    slot_counts,
)
from mirai_ds.model import GPT, initialise, next_token_loss
from tests.model import plain_gpt as plain
from tests.model import plain_par

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other

Cell = tuple[int, int]


def target_of(cell: Cell, offset: Cell, grid: int, border: str) -> Cell | None:
    row, column = cell[0] + offset[0], cell[1] + offset[1]
    if border == "wrap":
        flat = row * grid + column
        return divmod(flat, grid) if flat < grid * grid else None
    if border == "clamp":
        return min(row, grid - 1), min(column, grid - 1)
    return (row, column) if row < grid and column < grid else None


def brute_force(config: ForesightConfig, grid: int, n: int) -> tuple[dict[Cell, int], list[list[int]]]:
    """(slot, head) -> row of the target, and of each head how many targets the slot sees, and how many there are.

    The sequence is written down slot by slot, and everything is looked up in it.
    """
    walk = plain_par.walk(grid, n)
    holds: list[Any] = ["class", *walk[:n], *["learnable"] * (n - 1), *walk[n:]]
    slot_with = {cell: slot for slot, cell in enumerate(holds) if cell in walk}
    sees = plain_par.sees(len(holds), n)
    found, counts = {}, [[0, 0] for _ in range(config.heads)]
    for head, offset in enumerate(offsets(config)):
        for q, cell in enumerate(walk):
            if config.layout == "1d":
                target = walk[q + offset[1]] if q + offset[1] < len(walk) else None
            else:
                target = target_of(cell, offset, grid, config.border or "")
            if config.slots == "input":
                if cell == walk[-1]:
                    continue  # no input
                slot = slot_with[cell]
            else:
                slot = q
            if target is None or (
                config.method == "mirai-e" and target == walk[-1] and not config.teacher_sees_last_token
            ):
                continue
            late = target != cell and sees[slot][slot_with[target]]
            counts[head][0] += late
            counts[head][1] += 1
            if not (late and config.mask_decoded_targets):
                row = target[0] * grid + target[1] if config.method == "mirai-i" else slot_with[target]
                found[slot, head] = row
        if config.class_slot:
            found[0, head] = 0
    return found, counts


CHOICES = list(
    itertools.product(["mirai-e", "mirai-i"], ["official", "paper"], ["mask", "wrap", "clamp"], [(8, 4), (6, 9)])
)


@pytest.mark.parametrize(("method", "convention", "border", "shape"), CHOICES)
def test_any_choice_equals_brute_force(method: str, convention: str, border: str, shape: tuple[int, int]) -> None:
    grid, n = shape
    for layout, mask in (("2d", False), ("2d", True), ("1d", False), ("1d", True)):
        config = ForesightConfig(
            method=method, convention=convention, border=border, num_heads=6, layout=layout, mask_decoded_targets=mask
        )  # type: ignore[arg-type]
        wanted, counts = brute_force(config, grid, n)
        if any(all(slot == 0 or head != k for slot, head in wanted) for k in range(6)):
            with pytest.raises(ConfigError, match="has no target"):
                index_table(config, grid, n)
            continue
        table = index_table(config, grid, n)
        assert table.shape == (grid * grid + n - 1, 6)
        assert {(s, k): int(table[s, k]) for s, k in (table >= 0).nonzero().tolist()} == wanted
        assert decoded_targets(config, grid, n) == [tuple(pair) for pair in counts]
        assert slot_counts(config, table, grid * grid).tolist() == [
            float(sum(1 for _, head in wanted if head == k)) for k in range(6)
        ]


def paper(method: str = "mirai-i", **changes: Any) -> ForesightConfig:
    return ForesightConfig(**{"method": method, "convention": "paper", "num_heads": 3, **changes})


def test_seams_of_16_by_4() -> None:
    """right is +4 in the sequence and below +32, across a seam -27 and -222: 16 of 240 pairs each, 6.7 %."""
    assert decoded_targets(paper(), 16, 4) == [(0, 256), (16, 240), (16, 240)]
    # Down-right: a column seam alone is no step back, the place one row further down comes later all the same.
    assert decoded_targets(paper(num_heads=4), 16, 4)[3] == (15, 225)
    assert decoded_targets(paper(), 16, None) == [(0, 256), (0, 240), (0, 240)]
    assert decoded_targets(paper(layout="1d"), 16, 4) == [(0, 256), (0, 255), (0, 254)]
    # The slot that holds x_q, q >= 4, sees the others of its step: three in four have the next token among them.
    held = paper(layout="1d", slots="input")
    assert decoded_targets(held, 16, 4) == [(0, 255), (189, 255), (126, 254)]
    assert decoded_targets(held, 16, None) == [(0, 255), (0, 255), (0, 254)]
    table = index_table(paper(), 16, 4)
    order = plain_par.raster(16, 4)
    jumps = {k: {order.index(int(row)) - slot for slot, row in enumerate(table[:256, k]) if row >= 0} for k in (1, 2)}
    assert jumps == {1: {4, -27}, 2: {32, -222}}
    # By regions: 3 seams in each direction of 24 cells at n = 16 on the 24 grid.
    assert decoded_targets(paper(), 24, 16)[1:] == [(72, 552), (72, 552)]


def test_masking_takes_just_the_seams() -> None:
    free, masked = (index_table(paper("mirai-e", mask_decoded_targets=m), 16, 4) for m in (False, True))
    gone = (free >= 0) & (masked < 0)
    assert gone.sum(0).tolist() == [0, 16, 16]
    assert torch.equal(masked[~gone], free[~gone])
    order = plain_par.walk(16, 4)
    assert {order[slot][1] for slot in gone[:, 1].nonzero().flatten().tolist()} == {7}
    assert {order[slot][0] for slot in gone[:, 2].nonzero().flatten().tolist()} == {7}
    assert slot_counts(paper(normalizer="constant"), masked, 256).tolist() == [256.0] * 3


@pytest.mark.parametrize("method", ["mirai-e", "mirai-i"])
def test_slots_of_both_conventions(method: str) -> None:
    """The slot that holds x_q: 1 + q for q < n, else n + q; the one that predicts it: q."""
    order = plain_par.walk(8, 4)
    one = (order.index((5, 2)), order.index((5, 3)))  # 5,2 and its right neighbour
    first = (order.index((0, 4)), order.index((0, 5)))  # x_1, whose neighbour is x_5
    assert first == (1, 5)
    for q, target in (one, first):
        row = 4 + target if method == "mirai-e" else order[target][0] * 8 + order[target][1]
        predict = index_table(paper(method), 8, 4)
        held = index_table(ForesightConfig(method=method, num_heads=3), 8, 4)  # type: ignore[arg-type]
        assert int(predict[q, 1]) == row
        assert int(held[1 + q if q < 4 else 4 + q, 1]) == row
    held = index_table(ForesightConfig(method=method, num_heads=3), 8, 4)  # type: ignore[arg-type]
    assert (held[5:8] == -1).all()  # the learnable tokens hold no cell
    assert held[0].tolist() == ([0, 0, 0] if method == "mirai-e" else [-1, -1, -1])


def test_what_a_run_says_of_seams() -> None:
    model = ModelConfig(size="custom", dim=8, n_layer=1, n_head=1, block_size=64, par_tokens=4)
    (said,) = seam_notes(paper(), model)
    assert "kept (foresight.mask_decoded_targets: true leaves them out)" in said
    assert "down 0 right 1: 8 of 56 (14.3%); down 1 right 0: 8 of 56 (14.3%)" in said
    assert "left out" in str(seam_notes(paper(mask_decoded_targets=True), model))
    assert seam_notes(paper(layout="1d"), model) == []
    assert seam_notes(ForesightConfig(), model) == []
    assert seam_notes(paper(), model.model_copy(update={"par_tokens": None})) == []


MODEL = ModelConfig(size="custom", par_tokens=4, **{**plain.TINY, "block_size": 64})
TOKENS = torch.randint(48, (2, 64), generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([1, 4])


def filled(method: str, convention: str, **changes: Any) -> ForesightConfig:
    config = ForesightConfig(
        **{"method": method, "convention": convention, "num_heads": 3, "projector_dim": 16, **changes}
    )
    config.fill_from_model(MODEL)
    return config


def teacher_of(config: ForesightConfig, seed: int) -> tuple[EmaTeacher, GPT]:
    whole = GPT(MODEL)
    initialise(whole, seed, std=0.3)
    teacher = EmaTeacher(MODEL, config, torch.float32, torch.device("cpu"), autocast=False)
    teacher.load((name, whole.state_dict()[name]) for name in sorted(teacher.names))
    return teacher, whole


def test_teacher_has_the_learnable_tokens_and_sees_the_last_cell_where_the_convention_says_so() -> None:
    """official: all tokens but the last, N + n - 1 slots; paper: all, N + n, the last block of them whole."""
    official, whole = teacher_of(filled("mirai-e", "official"), seed=2)
    assert plain_par.LEARNABLE in official.names
    short = official.features(TOKENS, LABELS, None)
    assert torch.equal(short, whole(TOKENS[:, :-1], LABELS, tap=(2,)).hidden[2].detach())
    full = teacher_of(filled("mirai-e", "paper"), seed=2)[0].features(TOKENS, LABELS, None)
    assert (short.shape[1], full.shape[1]) == (67, 68)
    torch.testing.assert_close(full[:, :64], short[:, :64], rtol=1e-5, atol=1e-5)
    assert (full[:, 64:67] - short[:, 64:]).abs().amax((1, 2)).min() > 1e-3  # one block sees all of itself
    other = TOKENS.clone()
    other[:, -1] = (other[:, -1] + 1) % 48
    assert torch.equal(official.features(other, LABELS, None), short)


@pytest.mark.parametrize("convention", ["official", "paper"])
@pytest.mark.parametrize("method", ["mirai-e", "mirai-i"])
def test_objective_aligns_cell_by_cell(method: str, convention: str) -> None:
    """Head losses by hand: for every cell, the student's slot and the target's feature are looked up one by one."""
    config = filled(method, convention, normalizer="constant" if convention == "paper" else "valid")
    objective = MiraiObjective(MODEL, config, 16 if method == "mirai-i" else None)
    initialise(objective, 0, std=0.3)
    torch.nn.init.normal_(objective.gpt.output.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    if method == "mirai-e":
        target = teacher_of(config, seed=5)[0].features(TOKENS, LABELS, None)
    else:
        target = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(1))
    total, metrics = objective(TOKENS, LABELS, None, target, 1.0)
    out = objective.gpt(TOKENS[:, :-1], LABELS, tap=(2,))
    assert float(metrics["ntp"]) == pytest.approx(float(next_token_loss(out.logits, TOKENS).detach()), rel=1e-6)
    wanted, _ = brute_force(config, 8, 4)
    cosines = []
    for k, head in enumerate(objective.projectors):
        pairs = [(slot, row) for (slot, h), row in wanted.items() if h == k]
        student = head(out.hidden[2])[:, [slot for slot, _ in pairs]]
        values = F.cosine_similarity(student, target[:, [row for _, row in pairs]], dim=-1)
        cosines.append(float((values.sum() / (2 * (64 if convention == "paper" else len(pairs)))).detach()))
    assert metrics["cosine"].tolist() == pytest.approx(cosines, rel=1e-4)
    assert max(map(abs, cosines)) > 1e-3
    pull = -2.0 * sum(cosines) / (3 if convention == "paper" else 1)
    assert float(total.detach()) == pytest.approx(float(metrics["ntp"]) + pull, rel=1e-5)


def test_codes_are_permuted_once() -> None:
    """The reference's own training script forgets to: its loss is another number than the one on permuted codes."""
    objective = MiraiObjective(MODEL, ForesightConfig())
    state = plain.ruled({k: tuple(v.shape) for k, v in objective.gpt.state_dict().items()}, seed=1)
    objective.gpt.load_state_dict(state)
    losses = {}
    for name, cells in (("permuted", plain_par.raster(8, 4)), ("forgotten", list(range(64)))):
        sequence: Tensor = TOKENS[:, cells]
        logits, _ = plain_par.forward(state, {**plain.TINY, "block_size": 64}, 4, sequence[:, :-1], LABELS)
        losses[name] = float(plain.cross_entropy(logits[:, :64], sequence))
    found = float(objective(TOKENS, LABELS, None)[0].detach())
    assert found == pytest.approx(losses["permuted"], rel=1e-5)
    assert math.isclose(found, losses["forgotten"], rel_tol=1e-3) is False
