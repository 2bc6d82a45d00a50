"""Parameters and floating-point operations that the paper's tables print, counted here: Tables 4, 6, 8, 9 and 13."""

from __future__ import annotations

from mirai_ds.config import RunConfig
from mirai_ds.config.sizes import heads_parameters, parameter_count
from mirai_ds.paper.published import Row, published
from mirai_ds.planning.costs import Costs, costs_of, encoder_shape
from mirai_ds.planning.flops import encoder_parameters


def printed_parameters(row: Row) -> str | None:
    """The parameters of a row as printed: of the model, the encoder or a head."""
    return row.parameters or row.encoder_parameters or row.head_parameters


def counted_parameters(row: Row, config: RunConfig) -> int:
    """The same of the row's recipe: of the GPT, of the whole encoder, or of one head."""
    if row.encoder_parameters and config.foresight.encoder is not None:
        return encoder_parameters(config.foresight.encoder.timm_name)
    if row.head_parameters:
        vit = encoder_shape(config.foresight, config.model)
        target = vit.width if vit else config.model.width
        return heads_parameters(config.foresight, config.model.width, target) // config.foresight.heads
    return parameter_count(config.model)


def millions(count: int) -> str:
    """`110.9M`, with two digits below ten as the paper has them."""
    value = count / 1e6
    return f"{value:.2f}M" if value < 10 else f"{value:.1f}M"


FLOPS_HEADINGS = ["FLOPs an image, paper", "here", "overhead, paper", "here"]


def flops_cells(row: Row, config: RunConfig) -> list[str]:
    """Table 13's numbers, and what they are here, counted as the paper counts."""
    costs = costs_of(config)
    printed = f"{row.overhead_percent:+.1f} %" if row.overhead_percent is not None else "-"
    ours = f"{100 * costs.paper_overhead:+.1f} %" if costs.paper_overhead else "-"
    return [f"{row.flops:.2e}", f"{costs.paper_total:.3e}", printed, ours]


def less_compute(costs: Costs, base: float, epochs: float, warmup: float = 0.0, encoder: bool = False) -> float:
    """Compute of `base` epochs of plain LlamaGen over that of a run's `epochs`, counted as the paper counts.

    warmup: epochs of the run without alignment, which cost what plain ones do; the paper counts none.  encoder: with
    its forward passes, which the paper leaves out.
    """
    overhead = costs.with_encoder if encoder else costs.paper_overhead
    return base / (epochs + (epochs - warmup) * overhead)


def convergence_notes(configs: dict[str, RunConfig]) -> list[str]:
    """What the paper says of epochs and compute to one FID, and what follows from the counts here, by row label."""
    data, notes = published().convergence, []
    base = data.epochs_to_the_same_fid["LlamaGen-B"]
    for label, printed in data.less_compute.items():
        epochs = data.epochs_to_the_same_fid[label]
        config = configs[label]
        costs, warmup = costs_of(config), config.foresight.warmup_epochs or 0.0
        told = (
            f"{label}: the FID of LlamaGen-B after {base:g} epochs at epoch {epochs:g}, {data.fewer_epochs[label]:g} "
            f"times fewer; {printed:g} times less compute, {less_compute(costs, base, epochs):.1f} as counted here"
        )
        if config.foresight.encoder is not None:
            told += f", {less_compute(costs, base, epochs, encoder=True):.1f} with the encoder's forward passes"
        if warmup:
            told += f", {less_compute(costs, base, epochs, warmup):.1f} where the warm-up costs no alignment"
        notes.append(told)
    return [*notes, "38.2 % is the overhead of the rounded figures, 2.35 over 1.70; 1.81e11 is 1.816e11 cut off"]
