"""Rows of a study that nobody ran: two arms, three seeds, curves of three points."""

from __future__ import annotations

from mirai_ds.study.rows import CostRow, CurveRow, Rows, RunRow

LOSSES = {"baseline": (3.0, 2.2, 1.2), "e-official": (3.0, 2.0, 1.0)}
FACTS = {
    "date": "2026-01-02", "device": "a processor", "versions": {"torch": "2", "deepspeed": "0.19.8", "timm": "1"},
    "judge_accuracy": 0.9, "judge_digest": "0123456789abcdef", "reference_images": 100.0, "frechet_real": 0.5,
    "precision_real": 0.9, "recall_real": 0.8,
}  # fmt: skip


def rows_by_hand() -> Rows:
    """Seed s adds s / 8 to every loss."""
    runs, curves = [], []
    for arm, losses in LOSSES.items():
        for seed in range(3):
            shift = seed / 8
            last = losses[-1] + shift
            runs.append(
                RunRow("digits", arm, seed, 40, last + 0.01, last, 5.0 + shift, 0.7, 0.6, 0.5, 0.2, 0.1, 0.8, 0.6)
            )
            curves += [
                CurveRow("digits", arm, seed, 20 * k, 1.0 * k, loss + shift + 0.01, loss + shift)
                for k, loss in enumerate(losses)
            ]
    costs = [
        CostRow("digits", "baseline", 100.0, 1.0, 1.0, 1.0, 1.0, 0.0),
        CostRow("digits", "e-official", 200.0, 2.0, 1.9, 2.1, 1.4, 20.0),
    ]
    return Rows(runs, curves, costs, {"digits": FACTS})
