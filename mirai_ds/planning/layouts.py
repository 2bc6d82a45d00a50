"""The tables of docs/layouts.md, as `mirai-ds plan` predicts them:
`python -m mirai_ds.planning.layouts --write`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mirai_ds.planning import devices
from mirai_ds.planning.devices import GIB, fits
from mirai_ds.planning.memory import predict
from mirai_ds.planning.plan import POLICIES, PlanRequest, TrainingPlan, configured, make_plan
from mirai_ds.runtime import markdown

PAGE = Path("docs/layouts.md")
MIRAI_E = ("mirai-e-b", "mirai-e-l", "mirai-e-xl")


class Machine(NamedTuple):
    """A kind of machine, its file, and why that one."""

    name: str
    nodes: int
    gpus: int
    device: str
    file: str
    recipes: tuple[str, ...]
    why: str


NODES = "exact sums, sent once, behind the backward pass"
MACHINES = (
    Machine("CPU box, 2 ranks, 24 GiB", 1, 2, "cpu:24", "cpu", ("digits-mirai-e",), "no streams: nothing overlaps"),
    Machine("1 x 24 GB", 1, 1, "rtx4090", "gpu1-24g", MIRAI_E[:2], "small bucket: memory is for activations"),
    Machine("1 x 24 GB", 1, 1, "rtx4090", "zero2-offload", MIRAI_E[2:], "XL's optimizer does not fit beside it"),
    Machine("1 x 80 GB", 1, 1, "a100-80g", "gpu1-80g", MIRAI_E, "all sizes without recomputation"),
    Machine("1 x H200", 1, 1, "h200-141g", "gpu1-h200", MIRAI_E, "larger micro-batches, fewer copies"),
    Machine("8 x A100-80GB", 1, 8, "a100-80g", "a100x8", MIRAI_E, "the paper's machine; one micro-batch a step"),
    *(Machine(f"{n} x 8 A100-80GB", n, 8, "a100-80g", "nodes-zero1", MIRAI_E, NODES) for n in (2, 4, 8, 16)),
)
# On eight nodes, a fast and a slow network (bytes/s a GPU, one way), and the precision each file is for.
FILES = (("nodes-zero1", "bf16-autocast"), ("nodes-zero1", "bf16"), ("nodes-zero2", "bf16"), ("zero3", "bf16"),
         ("nodes-zero3", "bf16"), ("nodes-zeropp", "bf16"))  # fmt: skip
NETWORKS = {"25 GB/s a GPU": 25e9, "1.6 GB/s a GPU": 1.6e9}


def best(machine: Machine, recipe: str) -> TrainingPlan:
    """The plan with the least recomputation that fits, then the largest micro-batch."""
    request = PlanRequest(recipe, machine.nodes, machine.gpus, machine.device, machine.file)
    device, per_rank = devices.find_device(machine.device), configured(request).train.global_batch_size // request.world
    for policy, _ in POLICIES:
        overrides = (f"train.recompute.policy={policy.split()[0]}",)
        for micro in (m for m in range(per_rank, 0, -1) if per_rank % m == 0):
            tried = dataclasses.replace(request, micro_batch=micro, overrides=overrides)
            if fits(predict(configured(tried), request.world, device=device.kind).peak.total, device, request.world):
                return make_plan(tried, other_choices=False)
    raise AssertionError(f"{recipe} does not fit {machine.name} under {machine.file}")


def machines_table() -> str:
    """A line a machine and recipe."""
    header = "machine | file | recipe | micro batch x accumulation, recompute | GiB of | MFU | step, s | images/s"
    lines = []
    for machine in MACHINES:
        for recipe in machine.recipes:
            plan = best(machine, recipe)
            time = "- | - | - | -"
            if plan.time:
                step = plan.time[2]
                rate = plan.config.train.global_batch_size / step.expected
                mfu = f"{plan.utilisation.mfu:.2f} {plan.utilisation.kind}"
                time = f"{mfu} | {step.expected:.3f} | {rate:,.0f} | {step.compute / step.expected:.0%}"
            lines.append(
                f"{machine.name} | `{machine.file}` | `{recipe}` | {plan.work.micro} x {plan.states.accumulation}, "
                f"{plan.config.train.recompute.policy} | {plan.needed / GIB:.1f} of {plan.device.memory:g} | "
                f"{time} | {machine.why}"
            )
    return markdown.table(f"{header} | efficiency | why", lines, "llllrlrrrl")


def files_table() -> str:
    """GPT-XL on eight nodes under each file, on a fast and on a slow network; 32 images a GPU."""
    header = (
        "network | file | precision | MB in the node, a rank | MB over the network, a node | communication, ms"
        " | not hidden, ms | efficiency | at 512 GPUs"
    )
    lines = []
    known = devices.DEVICES["a100-80g"]
    try:
        for label, network in NETWORKS.items():
            devices.DEVICES["a100-80g"] = dataclasses.replace(known, network=network)
            for file, precision in FILES:
                overrides = (f"train.precision={precision}", "train.global_batch_size=2048")
                plan = make_plan(PlanRequest("mirai-e-xl", 8, 8, "a100-80g", file, overrides=overrides), False)
                here, far = (next(r for r in plan.scaling if r["gpus"] == count) for count in (64, 512))
                near, far_off = sum(row["link_bytes"] for row in plan.sent), here["network_bytes_a_node"]
                left = here["communication_s"] - here["hidden_s"]
                lines.append(
                    f"{label} | `{file}` | {precision} | {near / 1e6:,.0f} | {far_off / 1e6:,.0f} | "
                    f"{here['communication_s'] * 1e3:.0f} | {left * 1e3:.0f} | {here['efficiency']:.1%} | "
                    f"{far['efficiency']:.1%}"
                )
    finally:
        devices.DEVICES["a100-80g"] = known
    return markdown.table(header, lines, "lllrrrrrr")


TABLES = {"machines": machines_table, "files": files_table}


def written(page: str) -> str:
    """The page with every table between its two marks made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: made by mirai_ds.planning.layouts -->", f"<!-- end of {name} -->"
        page = markdown.replaced(page, begin, make(), end, PAGE)
    return page


def main(argv: Iterable[str] | None = None) -> int:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(prog="python -m mirai_ds.planning.layouts", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put them into {PAGE}")
    if parser.parse_args(None if argv is None else list(argv)).write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    for make in TABLES.values():
        print(make(), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
