"""How a step scales to more GPUs: rows, and the assumptions they rest on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mirai_ds.planning.cluster import PCIE_HOP, PROTOCOLS, ClusterShape, Compute, StepTime, step_time
from mirai_ds.planning.collectives import Collective, collectives
from mirai_ds.planning.devices import LINK_EFFICIENCY
from mirai_ds.planning.states import StateMemory

if TYPE_CHECKING:
    from rich.console import RenderableType

SCALES = (8, 64, 512)
Row = dict[str, float]


def sent_rows(cluster: ClusterShape, sent: Sequence[Collective]) -> list[dict[str, Any]]:
    """One row a collective: bytes of a step, calls, seconds, behind what it hides."""
    return [
        {
            "name": c.name, "sent_bytes": c.sent, "link_bytes": cluster.over_links(c),
            "network_bytes_a_node": cluster.over_network(c), "calls": c.calls, "ranks": c.ranks,
            "seconds": cluster.seconds(c) if cluster.known else None, "hides_behind": c.hides,
        }
        for c in sent
    ]  # fmt: skip


def scaling_rows(
    cluster: ClusterShape,
    states: StateMemory,
    teacher: float,
    compute: Callable[[float, int], Compute],
    batch: int,
    grows: bool,
) -> list[Row]:
    """More ranks of the same nodes.  grows: every rank keeps its images and the global batch grows; else the global
    batch stays, and each rank's share of a micro-batch shrinks.  compute: of a share of a rank's images, in
    so many micro-batches."""
    own = batch / cluster.world
    counts = {cluster.world, *SCALES} if grows else {cluster.world, *(8 * n for n in (1, 2, 4, 8, 16))}
    rows = []
    for count in sorted(counts):
        if not grows and batch % count:
            continue
        gpus = min(count, cluster.gpus)
        bigger = ClusterShape(cluster.device, -(-count // gpus), gpus)
        rounds = states.accumulation if grows else max(1, batch // count // states.work.micro)
        sent = collectives(StateMemory(states.work, states.zero, count, rounds), teacher)
        time = step_time(bigger, sent, compute(1.0 if grows else batch / count / own, rounds))
        rows.append({
            "gpus": count, "nodes": bigger.nodes, "global_batch": count * own if grows else float(batch),
            "sent_bytes": sum(c.sent for c in sent), "network_bytes_a_node": sum(map(bigger.over_network, sent)),
            "compute_s": time.compute, "communication_s": time.communication, "hidden_s": time.hidden,
            "step_s": time.expected, **_efficiency(time),
            "images_per_s": (count * own if grows else batch) / time.expected,
        })  # fmt: skip
    return rows


def _efficiency(time: StepTime) -> Row:
    return {
        "efficiency": time.compute / time.expected, "efficiency_low": time.compute / time.exposed,
        "efficiency_high": time.compute / time.overlapped,
    }  # fmt: skip


def assumptions(cluster: ClusterShape, mfu: float) -> list[str]:
    """What the rows rest on, one sentence each."""
    d = cluster.device
    return [
        f"matrix products run at MFU {mfu:.3g} whatever a rank's batch; a step without communication has efficiency 1",
        f"links: {d.link / 1e9:g} GB/s within a node, {d.network / 1e9:g} GB/s a GPU between nodes, one way, at "
        f"{LINK_EFFICIENCY:.0%} (the network is an assumption); nodes are not slowed by others' traffic",
        "NCCL's rings go over all GPUs of a node before they leave it, one ring a port: a byte crosses the network "
        "once a node and pass",
        f"latencies are NCCL's own: {_latencies()}, {PCIE_HOP * 1e6:g} us a hop over PCIe; each call takes the faster, "
        "an all-reduce a tree where that is faster than a ring",
        "gradients hide behind the backward pass (stages 1 to 3 with overlap_comm; not on stage 0, nor on stage 1 in "
        "bf16), but for the last bucket; ZeRO-3's gathers behind the block before; parameters after the update and the "
        "teacher behind nothing",
        "what overlaps does not slow matrix products (on a GPU it takes some of their multiprocessors); ranks are "
        "equally fast; reading data keeps up",
    ]


def _latencies() -> str:
    return "; ".join(
        f"{name} {p.start * 1e6:g} us a call, {p.ring[0] * 1e6:g} a hop over NVLink, "
        f"{p.ring[1] * 1e6:g} over the network"
        for name, p in PROTOCOLS.items()
    )


def sent_table(rows: Sequence[dict[str, Any]]) -> RenderableType:
    """A table of `sent_rows` for a terminal."""
    from rich.table import Table

    table = Table(
        "a step sends", "calls", "MB a rank, in its node", "MB a node, over the network", "ms", "hides behind", box=None
    )
    for row in rows:
        seconds = "-" if row["seconds"] is None else f"{row['seconds'] * 1e3:.2f}"
        near, far = row["link_bytes"] / 1e6, row["network_bytes_a_node"] / 1e6
        table.add_row(row["name"], f"{row['calls']:.0f}", f"{near:,.0f}", f"{far:,.0f}", seconds, row["hides_behind"])
    for column in table.columns[1:5]:
        column.justify = "right"
    return table


def scaling_table(rows: Sequence[Row], title: str) -> RenderableType:
    """A table of `scaling_rows` for a terminal."""
    from rich.table import Table

    table = Table("GPUs", "nodes", "global batch", "compute", "communication", "of it hidden", "step", "efficiency",
                  "if all / nothing hid", "images/s", box=None, title=title, title_justify="left")  # fmt: skip
    for row in rows:
        times = [f"{row[key] * 1e3:.1f} ms" for key in ("compute_s", "communication_s", "hidden_s", "step_s")]
        table.add_row(
            f"{row['gpus']:.0f}", f"{row['nodes']:.0f}", f"{row['global_batch']:.0f}", *times,
            f"{row['efficiency']:.1%}", f"{row['efficiency_high']:.0%} / {row['efficiency_low']:.0%}",
            f"{row['images_per_s']:,.0f}",
        )  # fmt: skip
    return table
