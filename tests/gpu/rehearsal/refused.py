"""A captured step that is refused, examined and made again; run by test_captured.py on a fake GPU, printing JSON.

python -m tests.gpu.rehearsal.refused
"""

from __future__ import annotations

import json
import os

import torch

from mirai_ds.benchmarks.sessions import random_session
from mirai_ds.config import build
from mirai_ds.engine.start import start_process_group
from mirai_ds.foresight import Teacher
from mirai_ds.runtime.distributed import World
from mirai_ds.runtime.launch import free_port
from mirai_ds.train import step as step_module
from mirai_ds.train.nonfinite import confirm_step
from mirai_ds.train.session import Session
from tests.gpu.rehearsal.steps import digest
from tests.gpu.rehearsal.test_steps import case

STEPS, REFUSED, FORGOTTEN = 10, 5, 7  # 0-based: the third replay is refused, later all graphs are forgotten


class AskingTeacher(Teacher):
    """An encoder that says it can be captured, and reads from the device in each step."""

    reads_images, capturable, feature_dim = True, True, 8

    def __init__(self, section: object, grid: int, device: torch.device) -> None:
        self.cells = grid * grid

    def features(self, tokens: torch.Tensor, labels: torch.Tensor, images: torch.Tensor | None) -> torch.Tensor:
        """Features (B, cells, 8) whose scale the host decides upon."""
        scale = 1.0 + float(labels.sum() > 0)
        return torch.full((len(tokens), self.cells, 8), scale, device=tokens.device)


def take(session: Session, refuse: bool) -> dict[str, object]:
    """A step as the loop takes it, then the question what became of it."""
    multiplier = step_module.alignment_multiplier
    if refuse:
        step_module.alignment_multiplier = lambda *_: float("nan")
    try:
        record = step_module.train_step(session, session.step)
    finally:
        step_module.alignment_multiplier = multiplier
    session.count_step()
    again = confirm_step(session, record)
    return {"loss": float(again.metrics["loss"]), "norm": float(again.grad_norm), "made again": again is not record}


def main() -> None:
    """A run with a refusal and without one: what each step gave, and the state at the end."""
    os.environ["MASTER_PORT"] = str(free_port())
    world, device = World(0, 0, 1, 1), torch.device("cuda", 0)
    start_process_group(world, 5)
    settings = case(precision="bf16-autocast", zero={"overlap_comm": True})
    settings["train"]["cuda_graph"] = "auto"
    settings["foresight"]["schedule"] = {"kind": "cosine", "final": 0.1}  # the multiplier is an input of the graph
    results = {}
    for name, refuse in (("refused", True), ("undisturbed", False)):
        with random_session(build(settings), world, device, STEPS) as session:
            steps = []
            for number in range(STEPS):
                if number == FORGOTTEN:
                    session.graphs.forget()
                steps.append(take(session, refuse and number == REFUSED))
            results[name] = {"steps": steps, "state": digest(session), "plain": session.graphs.problem}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
