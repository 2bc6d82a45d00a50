"""What `mirai-ds plan` says of the configurations that the slice of step times measures, as rows beside them."""

from __future__ import annotations

import argparse
import json
import sys

from mirai_ds.config import UserError
from mirai_ds.planning.devices import DEVICES
from mirai_ds.planning.plan import PlanRequest, make_plan
from tests.gpu.check.native_rows import Row, one
from tests.gpu.check.slices import SIZES

RECIPES = {"none": "llamagen-{}", "E": "mirai-e-{}", "I": "mirai-i-{}"}
ARMS = {"compiled, ZeRO-0": ("zero0", "blocks"), "as shipped": ("zero2", "none")}


def device_of(card: str) -> str:
    """The planner's name of a card, by its family; raises UserError where there is none."""
    words = card.lower().replace(" ", "").replace("-", "")
    for name in DEVICES:
        if name.partition("-")[0] in words:
            return name
    raise UserError(f"plan knows no {card}")


def rows(device: str) -> list[Row]:
    """Memory and seconds of every size, method and arm."""
    found = []
    for size, batch in SIZES:
        for method, recipe in RECIPES.items():
            for arm, (file, compiled) in ARMS.items():
                settings = (f"train.global_batch_size={batch}", "train.grad_accum_steps=1",
                            "train.precision=bf16-autocast", f"train.compile={compiled}")  # fmt: skip
                name = recipe.format(size.removeprefix("GPT-").lower())
                plan = make_plan(PlanRequest(name, 1, 1, device, file, overrides=settings), other_choices=False)
                about = {"model": size, "method": method, "batch": str(batch), "precision": "bf16-autocast",
                         "variant": arm}  # fmt: skip
                memory = f"{plan.memory.peak.total / 1e9:.2f}"
                found.append(one("plan", "planned peak memory", memory, "GB", **about))
                if plan.time:
                    found.append(one("plan", "planned step", f"{1e3 * plan.time[2].expected:.4g}", "ms", **about))
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the rows for the card that is here, or for a device of the planner."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check.planned", description=__doc__)
    parser.add_argument("--device", choices=list(DEVICES), help="default: what torch sees")
    args = parser.parse_args(argv)
    if args.device is None:
        import torch

        args.device = device_of(torch.cuda.get_device_name(0))
    print("\n".join(map(json.dumps, rows(args.device))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
