"""Which token each head looks at: the authors' flat shifts slot for slot, the paper's grid, borders, any grid."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from mirai_ds.config import ConfigError, ForesightConfig, ModelConfig
from mirai_ds.foresight import decoded_targets, index_table, offsets, slot_counts

SHIFTS = (0, 1, 16, 17, 2, 18, 34, 33, 32)  # the authors' code, by head, on their 16 grid
EVIDENT = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0))  # the same as (down, right)


def official(method: str, heads: int, **changes: Any) -> ForesightConfig:
    return ForesightConfig(**{"method": method, "convention": "official", "num_heads": heads, **changes})


def paper(method: str, heads: int, **changes: Any) -> ForesightConfig:
    return ForesightConfig(**{"method": method, "convention": "paper", "num_heads": heads, **changes})


def flat_rule(method: str, shift: int, cells: int) -> Tensor:
    """(N,) rows of the target by the authors' pairing, -1 for none.

    E: student slots {0} and 1..N-1-o against teacher slots {0} and 1+o..N-1.
    I: student slots 1..L against patches 1+o..L+o (counted from 1), L = min(N-1, P-o); slot 0 dropped.
    """
    rows = torch.full((cells,), -1, dtype=torch.int64)
    if method == "mirai-e":
        rows[0] = 0
        for slot in range(1, cells - shift):
            rows[slot] = slot + shift
    else:
        for slot in range(1, min(cells - 1, cells - shift) + 1):
            rows[slot] = slot + shift - 1
    return rows


@pytest.mark.parametrize("method", ["mirai-e", "mirai-i"])
def test_official_shifts_on_the_16_grid(method: str) -> None:
    table = index_table(official(method, 9), 16)
    assert table.shape == (256, 9)
    assert table.dtype == torch.int64
    for k, shift in enumerate(SHIFTS):
        assert torch.equal(table[:, k], flat_rule(method, shift, 256)), k


@pytest.mark.parametrize(("method", "counts"), [("mirai-e", [256, 255, 240]), ("mirai-i", [255, 255, 240])])
def test_official_survivors_at_k_3(method: str, counts: list[int]) -> None:
    config = official(method, 3)
    assert slot_counts(config, index_table(config, 16)).tolist() == counts


@pytest.mark.parametrize("grid", [4, 7, 8, 16, 24])
@pytest.mark.parametrize("method", ["mirai-e", "mirai-i"])
def test_official_takes_one_grid_row_as_one_row_down(method: str, grid: int) -> None:
    table = index_table(official(method, 9), grid)
    for k, (down, right) in enumerate(EVIDENT):
        assert torch.equal(table[:, k], flat_rule(method, down * grid + right, grid * grid)), k


@pytest.mark.parametrize("method", ["mirai-e", "mirai-i"])
def test_literal_shifts_on_the_24_grid(method: str) -> None:
    literal, evident = (index_table(official(method, 9, flat_stride=stride), 24) for stride in (16, None))
    for k, shift in enumerate(SHIFTS):
        assert torch.equal(literal[:, k], flat_rule(method, shift, 576)), k
    assert not torch.equal(literal, evident)
    assert torch.equal(index_table(official(method, 9, flat_stride=16), 16), index_table(official(method, 9), 16))


# Valid pairs of all heads under `mask`, of N * K.
MASKED = {
    16: {1: 256, 2: 496, 3: 736, 4: 961, 5: 1185, 9: 2025},
    24: {1: 576, 2: 1128, 3: 1680, 4: 2209, 5: 2737, 9: 4761},
}


@pytest.mark.parametrize("method", ["mirai-e", "mirai-i"])
@pytest.mark.parametrize(("grid", "heads"), [(grid, heads) for grid, counts in MASKED.items() for heads in counts])
def test_valid_pairs_under_mask(method: str, grid: int, heads: int) -> None:
    config = paper(method, heads)
    table = index_table(config, grid)
    assert int((table >= 0).sum()) == MASKED[grid][heads]
    assert slot_counts(config, table).sum() == MASKED[grid][heads]
    constant = paper(method, heads, normalizer="constant")
    assert slot_counts(constant, table).tolist() == [float(grid * grid)] * heads


def test_heads_by_distance() -> None:
    order = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (2, 2)]
    for heads in range(1, 10):
        assert offsets(paper("mirai-e", heads)) == order[:heads]
        assert offsets(official("mirai-e", heads)) == list(EVIDENT[:heads])
    distances = [dr**2 + dc**2 for dr, dc in order]
    assert distances == sorted(distances)
    quadrant = sorted((r * r + c * c, r, c) for r in range(9) for c in range(9))
    assert [(r, c) for _, r, c in quadrant[:9]] == order
    for heads, same in [(1, True), (2, True), (3, True), (4, True), (5, True), (6, False), (7, False), (9, True)]:
        assert (set(order[:heads]) == set(EVIDENT[:heads])) == same, heads


def test_paper_slot_n_predicts_cell_n_and_the_teacher_holds_it_one_slot_later() -> None:
    """Student slot s has seen x_1..x_s and predicts cell s (from 0); teacher slot s + 1 holds that cell's token."""
    table = index_table(paper("mirai-e", 4), 4)
    assert table[:, 0].tolist() == list(range(1, 17))
    assert table[0].tolist() == [1, 2, 5, 6]
    assert table[3].tolist() == [4, -1, 8, -1]  # last column: nothing to the right
    assert table[12].tolist() == [13, 14, -1, -1]  # last row: nothing below
    assert table[15].tolist() == [16, -1, -1, -1]
    patches = index_table(paper("mirai-i", 4), 4)
    assert torch.equal(patches, torch.where(table > 0, table - 1, -1))


def test_teacher_without_the_last_token() -> None:
    with_last = index_table(paper("mirai-e", 4), 4)
    without = index_table(paper("mirai-e", 4, teacher_sees_last_token=False), 4)
    assert int((with_last == 16).sum()) == 4
    assert torch.equal(without, torch.where(with_last == 16, -1, with_last))


def test_clamp_repeats_the_border() -> None:
    table = index_table(paper("mirai-i", 9, border="clamp"), 4)
    cells = {offset: table[:, k] for k, offset in enumerate(offsets(paper("mirai-i", 9)))}
    assert cells[0, 1].tolist() == [1, 2, 3, 3, 5, 6, 7, 7, 9, 10, 11, 11, 13, 14, 15, 15]
    assert cells[2, 0].tolist() == [8, 9, 10, 11, 12, 13, 14, 15, 12, 13, 14, 15, 12, 13, 14, 15]
    assert cells[2, 2].tolist() == [10, 11, 11, 11, 14, 15, 15, 15, 14, 15, 15, 15, 14, 15, 15, 15]


def test_wrap_runs_into_the_next_row() -> None:
    """The authors' "right" of a row's last cell is the next row's first: 15 of 254 pairs on their grid."""
    wrapped = index_table(official("mirai-e", 2), 16)[1:, 1]
    masked = index_table(official("mirai-e", 2, border="mask"), 16)[1:, 1]
    assert int((wrapped >= 0).sum()) == 254
    assert int(((wrapped >= 0) & (masked < 0)).sum()) == 15
    assert torch.equal(wrapped[masked >= 0], masked[masked >= 0])


def test_one_dimensional_layout() -> None:
    for border in ("mask", "wrap", "clamp"):
        table = index_table(paper("mirai-i", 3, layout="1d", border=border), 4)
        for k in range(3):
            assert table[:, k].tolist() == [*range(k, 16), *[-1] * k], border
    assert offsets(paper("mirai-i", 3, layout="1d")) == [(0, 0), (0, 1), (0, 2)]


def test_class_slot_only_where_asked() -> None:
    with_class = index_table(official("mirai-e", 3), 16)
    without = index_table(official("mirai-e", 3, class_slot=False), 16)
    assert with_class[0].tolist() == [0, 0, 0]
    assert without[0].tolist() == [-1, -1, -1]
    assert torch.equal(with_class[1:], without[1:])


def test_several_heads_of_an_encoder_on_the_papers_convention() -> None:
    """Slot s (from 0) predicts cell s: its heads look at patch s, the one to its right and the one below."""
    table = index_table(paper("mirai-i", 3), 4)
    assert table[:, 0].tolist() == list(range(16))
    assert table[:, 1].tolist() == [1, 2, 3, -1, 5, 6, 7, -1, 9, 10, 11, -1, 13, 14, 15, -1]
    assert table[:, 2].tolist() == [*range(4, 16), -1, -1, -1, -1]
    assert torch.equal(index_table(paper("mirai-i", 2), 4), table[:, :2])
    assert slot_counts(paper("mirai-i", 3), table).tolist() == [16, 12, 12]


def custom(method: str, convention: str, pairs: list[list[int]], **changes: Any) -> ForesightConfig:
    config = ForesightConfig(**{"method": method, "convention": convention, "offsets": pairs, **changes})
    config.fill_from_model(ModelConfig(size="custom", dim=8, n_layer=1, n_head=1, block_size=16))
    return config


RIGHT_AND_FAR = [[0, 1], [3, 2]]


def test_explicit_offsets_fill_the_heads() -> None:
    config = custom("mirai-i", "paper", RIGHT_AND_FAR)
    assert (config.heads, config.weights, config.head_order) == (2, [2.0, 2.0], None)
    assert offsets(config) == [(0, 1), (3, 2)]
    assert ForesightConfig(**config.model_dump()) == config
    assert custom("mirai-e", "official", [[0, 1]]).heads == 1  # not the method's 3
    many = [[down, right] for down in range(4) for right in range(4)]
    assert offsets(custom("mirai-i", "paper", many, num_heads=16)) == [(r // 4, r % 4) for r in range(16)]


# (border, method) -> the two columns on a 4x4 grid, slots: predict; mirai-e's rows are one later (slot 0 is the class)
EXPLICIT = {
    "mask": (
        [1, 2, 3, -1, 5, 6, 7, -1, 9, 10, 11, -1, 13, 14, 15, -1],
        [14, 15, *[-1] * 14],
    ),
    "wrap": (  # flat shifts 1 and 3 * 4 + 2
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, -1],
        [14, 15, *[-1] * 14],
    ),
    "clamp": (
        [1, 2, 3, 3, 5, 6, 7, 7, 9, 10, 11, 11, 13, 14, 15, 15],
        [14, 15, 15, 15] * 4,
    ),
}


@pytest.mark.parametrize("border", EXPLICIT)
def test_explicit_offsets_by_value(border: str) -> None:
    wanted = torch.tensor(EXPLICIT[border]).T
    patches = index_table(custom("mirai-i", "paper", RIGHT_AND_FAR, border=border), 4)
    assert torch.equal(patches, wanted)
    slots = index_table(custom("mirai-e", "paper", RIGHT_AND_FAR, border=border), 4)
    assert torch.equal(slots, torch.where(wanted < 0, -1, wanted + 1))


def test_explicit_offsets_on_the_official_convention() -> None:
    """The authors' pairing at flat shift down * grid + right, or down * flat_stride + right."""
    pairs = [[1, 3], [0, 1], [2, 2]]
    for method in ("mirai-e", "mirai-i"):
        for stride in (None, 5):
            table = index_table(custom(method, "official", pairs, flat_stride=stride), 4)
            for k, (down, right) in enumerate(pairs):
                assert torch.equal(table[:, k], flat_rule(method, down * (stride or 4) + right, 16)), (method, k)
    usual = [[down, right] for down, right in EVIDENT]
    assert torch.equal(index_table(custom("mirai-e", "official", usual), 4), index_table(official("mirai-e", 9), 4))


def test_explicit_offsets_without_a_target() -> None:
    """The class slot, which every head has in the authors' code, is no target."""
    config = custom("mirai-e", "official", [[0, 0], [3, 3]])
    with pytest.raises(ConfigError, match=r"foresight.offsets = .*head 2 has no target on a 4x4 grid; remove \[3, 3\]"):
        index_table(config, 4)
    assert int((index_table(custom("mirai-i", "paper", [[3, 3]]), 4) >= 0).sum()) == 1


def test_a_head_without_any_target_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"foresight.num_heads = 9: head \d has no target on a 2x2 grid"):
        index_table(paper("mirai-i", 9), 2)


CASES = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["mirai-e", "mirai-i"]),
        "num_heads": st.integers(1, 9),
        "head_order": st.sampled_from(["official", "nearest"]),
        "slots": st.sampled_from(["input", "predict"]),
        "border": st.sampled_from(["mask", "wrap", "clamp"]),
        "layout": st.sampled_from(["2d", "1d"]),
        "teacher_sees_last_token": st.booleans(),
        "class_slot": st.booleans(),
        "flat_stride": st.sampled_from([None, 5, 16]),
    }
)


def brute_force(case: dict[str, Any], grid: int) -> dict[tuple[int, int], int]:
    """(slot, head) -> row of the target, by writing every token down with its place and looking for it."""
    cells = grid * grid
    place = {(r, c): r * grid + c for r in range(grid) for c in range(grid)}  # cell numbers from 0
    if case["method"] == "mirai-i":
        rows = {cell: cell for cell in range(cells)}
    else:  # slot 0 is the class, slot p holds token p (from 1)
        rows = {cell: cell + 1 for cell in range(cells if case["teacher_sees_last_token"] else cells - 1)}
    by_distance = sorted(((r, c) for r in range(3) for c in range(3)), key=lambda o: (math.hypot(*o), o))
    order = EVIDENT if case["head_order"] == "official" else by_distance
    found = {}
    for head in range(case["num_heads"]):
        for (r, c), cell in place.items():
            slot = cell + 1 if case["slots"] == "input" else cell
            if slot >= cells:  # x_N is no input
                continue
            if case["layout"] == "1d":
                target = cell + head
            elif case["border"] == "wrap":
                target = cell + order[head][0] * (case["flat_stride"] or grid) + order[head][1]
            else:
                place_of = (r + order[head][0], c + order[head][1])
                if case["border"] == "clamp":
                    place_of = (min(place_of[0], grid - 1), min(place_of[1], grid - 1))
                target = place.get(place_of, -1)
            if target in rows:
                found[slot, head] = rows[target]
        if case["class_slot"]:
            found[0, head] = 0
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=CASES, grid=st.integers(4, 24))
def test_any_choice_equals_brute_force(case: dict[str, Any], grid: int) -> None:
    if case["border"] != "wrap" or case["layout"] == "1d":
        case = {**case, "flat_stride": None}
    if case["method"] == "mirai-i" or case["slots"] == "predict":
        case = {**case, "class_slot": False}
    config = ForesightConfig(**case)
    wanted = brute_force(case, grid)
    if {head for (slot, head) in wanted if slot or not case["class_slot"]} != set(range(case["num_heads"])):
        with pytest.raises(ConfigError, match="has no target"):
            index_table(config, grid)
        return
    table = index_table(config, grid)
    assert table.shape == (grid * grid, case["num_heads"])
    assert {(s, k): int(table[s, k]) for s, k in (table >= 0).nonzero().tolist()} == wanted
    assert int(table.min()) >= -1
    assert slot_counts(config, table).tolist() == [
        float(sum(1 for _, head in wanted if head == k)) for k in range(case["num_heads"])
    ]


# --- down-left neighbours, and Eq. 8 to the letter --------------------------------------------------------------------

# (border) -> targets of the offset [1, -1] on a 4x4 grid, one patch a cell.
DOWN_LEFT = {
    "mask": [-1, 4, 5, 6, -1, 8, 9, 10, -1, 12, 13, 14, -1, -1, -1, -1],
    "wrap": [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, -1, -1, -1],  # the authors' flat shift, by 3
    "clamp": [4, 4, 5, 6, 8, 8, 9, 10, 12, 12, 13, 14, 12, 12, 13, 14],
}


@pytest.mark.parametrize("border", DOWN_LEFT)
def test_a_later_cell_to_the_left(border: str) -> None:
    table = index_table(custom("mirai-i", "paper", [[0, 0], [1, -1]], border=border), 4)
    assert table[:, 0].tolist() == list(range(16))
    assert table[:, 1].tolist() == DOWN_LEFT[border]


@pytest.mark.parametrize("grid", [4, 5, 8])
@pytest.mark.parametrize("heads", [1, 3, 4, 9])
def test_the_nearest_later_cells_of_each_cell(grid: int, heads: int) -> None:
    """Eq. 8 to the letter: no cell that is later lies nearer than one that a head looks at; no cell is taken twice."""
    table = index_table(paper("mirai-i", heads, border="nearest"), grid)
    for cell in range(grid * grid):
        taken = [row for row in table[cell].tolist() if row >= 0]
        assert taken[0] == cell
        assert len(set(taken)) == len(taken) == min(heads, grid * grid - cell)
        apart = [math.dist(divmod(row, grid), divmod(cell, grid)) for row in taken]
        assert apart == sorted(math.dist(divmod(row, grid), divmod(cell, grid)) for row in range(cell, grid**2))[:heads]


def test_the_nearest_later_cells_by_value() -> None:
    """At the right edge the cell below comes second, and down-left third; ties go to the upper cell, then the right."""
    table = index_table(paper("mirai-i", 4, border="nearest"), 4)
    assert table[5].tolist() == [5, 6, 9, 10]
    assert table[7].tolist() == [7, 11, 10, 15]  # down, down-left, then two down
    assert table[13].tolist() == [13, 14, 15, -1]
    assert table[15].tolist() == [15, -1, -1, -1]
    assert offsets(paper("mirai-i", 9, border="nearest")) == [
        (0, 0), (0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (1, 2), (1, -2)
    ]  # fmt: skip
    teacher = index_table(paper("mirai-e", 3, border="nearest"), 4)
    assert teacher.tolist() == [[row + 1 if row >= 0 else -1 for row in rows[:3]] for rows in table.tolist()]


def test_the_nearest_later_cells_in_regions() -> None:
    """PAR reads four cells at once, one a region: what is later follows its order, and nothing is decoded already."""
    config = paper("mirai-i", 3, border="nearest")
    assert decoded_targets(config, 4, par_tokens=4) == [(0, count) for _, count in decoded_targets(config, 4, 4)]
    table = index_table(config, 4, par_tokens=4)
    assert table[0].tolist() == [0, 1, 4]  # the first cell: right and below are read later


def test_what_nearest_does_not_go_with() -> None:
    for changes in ({"layout": "1d"}, {"offsets": [[0, 1]], "num_heads": None}, {"head_order": "official"}):
        with pytest.raises(ValidationError, match="finds and orders neighbours itself"):
            paper("mirai-i", 3, **{"border": "nearest", **changes})
