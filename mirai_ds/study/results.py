"""Rows of one study as numbers: means over seeds, paired differences with 95 % intervals (Student's t), curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from mirai_ds.config import UserError
from mirai_ds.study.arms import ARMS, BASELINE
from mirai_ds.study.costs import compute_spent
from mirai_ds.study.rows import Rows

Array = np.ndarray[Any, Any]
LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean and half the width of its 95 % interval (NaN for a single value)."""

    mean: float
    half: float
    pairs: int

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out zero."""
        return abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values and the interval around it."""
    from scipy import stats

    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return Estimate(float(array.mean()) if len(array) else math.nan, math.nan, len(array))
    spread = float(stats.sem(array))
    return Estimate(float(array.mean()), float(stats.t.ppf(0.5 + LEVEL / 2, len(array) - 1)) * spread, len(array))


def paired_difference(arm: dict[int, float], baseline: dict[int, float]) -> Estimate:
    """Arm less baseline over the seeds that both have."""
    return estimate([arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())])


def first_reached(positions: Array, values: Array, target: float) -> float:
    """The first position at which the piecewise linear curve is at most `target`; infinity if nowhere.

    positions (n,) rising, values (n,).
    """
    below = np.flatnonzero(values <= target)
    if not len(below):
        return math.inf
    i = int(below[0])
    if i == 0:
        return float(positions[0])
    share = (values[i - 1] - target) / (values[i - 1] - values[i])
    return float(positions[i - 1] + share * (positions[i] - positions[i - 1]))


def speed_up(baseline: tuple[Array, Array], arm: tuple[Array, Array]) -> float:
    """How many times as fast as the baseline's the arm's curve (positions, values) gets to the same value, both ending
    at the same place.

    The value is the worse of the two last ones, which both curves reach: the baseline's end where the arm is better,
    the arm's where it is not.
    """
    target = max(float(baseline[1][-1]), float(arm[1][-1]))
    return first_reached(*baseline, target) / first_reached(*arm, target)


def value_at(positions: Array, values: Array, place: float) -> float:
    """The curve at `place`, linear between its points; NaN beyond its ends."""
    if not positions[0] <= place <= positions[-1]:
        return math.nan
    return float(np.interp(place, positions, values))


class Results:
    """What the rows say of study `name`.  Raises UserError when they hold no baseline to compare with."""

    def __init__(self, rows: Rows, name: str) -> None:
        self.name, self.facts = name, rows.facts.get(name, {})
        self.runs = {(row.arm, row.seed): row for row in rows.runs if row.study == name}
        self.costs: dict[str, dict[str, Any]] = {row.arm: asdict(row) for row in rows.costs if row.study == name}
        curves: dict[tuple[str, int], list[Any]] = {}
        for row in rows.curves:
            if row.study == name:
                curves.setdefault((row.arm, row.seed), []).append(row)
        self._curves = {key: sorted(points, key=lambda row: row.step) for key, points in curves.items()}
        self.arms = [arm.name for arm in ARMS if self.seeds(arm.name)]
        if BASELINE not in self.arms:
            raise UserError(f"study {name}: the rows hold no run of the arm {BASELINE!r}; run it first")
        for key in self.runs:
            if key not in self._curves:
                raise UserError(f"study {name}: arm {key[0]}, seed {key[1]} has a row but no curve")

    def seeds(self, arm: str) -> list[int]:
        """Seeds of an arm's measured runs."""
        return sorted(seed for name, seed in self.runs if name == arm)

    def values(self, arm: str, what: str) -> dict[int, float]:
        """A column of the runs, by seed."""
        return {seed: float(getattr(self.runs[arm, seed], what)) for seed in self.seeds(arm)}

    def steps(self, arm: str) -> Array:
        """The steps (p,) of the curve's points."""
        return np.array([row.step for row in self._curves[arm, self.seeds(arm)[0]]])

    def curve(self, arm: str, seed: int, what: str) -> tuple[Array, Array]:
        """A run's curve: epochs (p,) and losses (p,)."""
        rows = self._curves[arm, seed]
        return np.array([row.epoch for row in rows]), np.array([getattr(row, what) for row in rows])

    def curves(self, arm: str, what: str) -> tuple[Array, Array]:
        """The curves of all seeds: epochs (p,) and losses (seeds, p)."""
        curves = [self.curve(arm, seed, what) for seed in self.seeds(arm)]
        return curves[0][0], np.stack([values for _, values in curves])

    def paired_seeds(self, arm: str) -> list[int]:
        """Seeds that the arm shares with the baseline."""
        return sorted(set(self.seeds(arm)) & set(self.seeds(BASELINE)))

    def curve_differences(self, arm: str, what: str) -> Array:
        """The arm's losses less the baseline's at every point, (seeds, p)."""
        pairs = [(self.curve(arm, s, what)[1], self.curve(BASELINE, s, what)[1]) for s in self.paired_seeds(arm)]
        return np.stack([ours - theirs for ours, theirs in pairs])

    def mean(self, arm: str, what: str) -> Estimate:
        """The mean of a column over seeds."""
        return estimate(list(self.values(arm, what).values()))

    def difference(self, arm: str, what: str, against: str = BASELINE) -> Estimate:
        """The paired difference to another arm."""
        return paired_difference(self.values(arm, what), self.values(against, what))

    def equal_compute(self, arm: str, what: str) -> Estimate:
        """The arm's loss when it has spent the compute of the baseline's whole run, less the baseline's at its end.

        An arm that is cheaper than the baseline has no such point: NaN.
        """
        if arm not in self.costs:
            return Estimate(math.nan, math.nan, 0)
        spent = compute_spent(self.costs[arm], self.steps(arm))
        total = float(self.steps(BASELINE)[-1])
        ours = {s: value_at(spent, self.curve(arm, s, what)[1], total) for s in self.paired_seeds(arm)}
        return paired_difference(ours, {s: float(self.curve(BASELINE, s, what)[1][-1]) for s in ours})

    def speed_up(self, arm: str, what: str) -> Estimate:
        """The speed-up in epochs, over seeds."""
        pairs = [(self.curve(BASELINE, s, what), self.curve(arm, s, what)) for s in self.paired_seeds(arm)]
        return estimate([speed_up(theirs, ours) for theirs, ours in pairs])

    def speed_up_halfway(self, arm: str, what: str) -> Estimate:
        """Epochs that the baseline needs to what the arm has after half of its run, over that half.  Infinite where the
        baseline never gets there."""
        ratios = []
        for seed in self.paired_seeds(arm):
            epochs, values = self.curve(arm, seed, what)
            half = float(epochs[-1]) / 2
            reached = first_reached(*self.curve(BASELINE, seed, what), value_at(epochs, values, half))
            ratios.append(reached / half)
        return estimate(ratios)

    def baseline_epochs(self, arm: str, what: str) -> list[float]:
        """Epochs the baseline needs to reach the arm's last value, seed by seed; infinity: it did not."""
        epochs = []
        for seed in self.paired_seeds(arm):
            target = float(self.curve(arm, seed, what)[1][-1])
            epochs.append(first_reached(*self.curve(BASELINE, seed, what), target))
        return epochs
