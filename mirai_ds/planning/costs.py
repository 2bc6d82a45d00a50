"""FLOPs of recipes as the paper counts them and as they are done; `mirai-ds flops`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mirai_ds.config import ForesightConfig, ModelConfig, RunConfig, build
from mirai_ds.config.foresight_config import TEACHERS
from mirai_ds.config.own import is_own
from mirai_ds.config.sizes import heads_parameters, parameter_count
from mirai_ds.planning.flops import ViT, known_encoder, paper_parts, training_parts

if TYPE_CHECKING:
    from rich.console import RenderableType


def encoder_shape(foresight: ForesightConfig, model: ModelConfig) -> ViT | None:
    """The encoder of a Mirai-I run, by formula where it is one of the paper's, else as timm describes it; None for
    other methods, and for an encoder of the user's own, whose cost nobody here knows."""
    if foresight.teacher != "encoder" or foresight.encoder is None or is_own(foresight.encoder.name):
        return None
    return known_encoder(foresight, model) or _described_by_timm(foresight, model)


def _described_by_timm(foresight: ForesightConfig, model: ModelConfig) -> ViT:
    from mirai_ds.foresight.encoders import encoder_plan

    encoder = foresight.encoder
    assert encoder is not None
    vit, image = encoder_plan(encoder, model.grid)
    plan: Any = vit  # timm's attributes
    depth = encoder.layer or len(plan.blocks)
    above = sum(p.numel() for block in plan.blocks[depth:] for p in block.parameters())
    patches = model.grid**2
    return ViT(
        int(plan.num_features), depth, int(plan.blocks[0].mlp.fc1.out_features),
        int(plan.patch_embed.proj.weight.shape[-1]), patches + int(plan.num_prefix_tokens), patches, image,
        sum(p.numel() for p in plan.parameters()) - above,
    )  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """FLOPs of training one image with one recipe.  paper: Table 13's count by part; parts: what is really done."""

    name: str
    size: str
    method: str
    parameters: int
    batch: int
    paper: dict[str, float]
    parts: dict[str, float]

    @property
    def paper_total(self) -> float:
        """FLOPs of an image by Table 13's count."""
        return sum(self.paper.values())

    @property
    def paper_overhead(self) -> float:
        """The overhead over the plain GPT by the paper's count."""
        return self.paper_total / self.paper["gpt"] - 1

    @property
    def printed_overhead(self) -> float:
        """The same from the figures rounded to three digits, as Table 13's 38.2 % is."""
        return _rounded(self.paper_total) / _rounded(self.paper["gpt"]) - 1

    @property
    def with_encoder(self) -> float:
        """The paper's overhead with the encoder's forward pass added, which the paper leaves out."""
        return (self.paper_total + self.parts.get("encoder forward", 0.0)) / self.paper["gpt"] - 1

    @property
    def total(self) -> float:
        """FLOPs of an image that are really done."""
        return sum(self.parts.values())

    @property
    def forward(self) -> float:
        """FLOPs of all forward passes: GPT, heads, teacher, encoder."""
        return sum(value for name, value in self.parts.items() if name.endswith("forward"))

    @property
    def backward(self) -> float:
        """FLOPs of the backward passes of GPT and heads."""
        return self.total - self.forward

    @property
    def overhead(self) -> float:
        """The overhead over the plain GPT by what is done."""
        return self.total / (self.parts["gpt forward"] + self.parts["gpt backward"]) - 1


def _rounded(value: float) -> float:
    return float(f"{value:.2e}")


def costs_of(config: RunConfig, name: str | None = None) -> Costs:
    """Of an aligned step.  Raises ConfigError for an encoder that timm does not know."""
    model, foresight = config.model, config.foresight
    vit = encoder_shape(foresight, model)
    feature_dim = vit.width if vit else model.width
    heads = heads_parameters(foresight, model.width, feature_dim)
    return Costs(
        name or config.name, model.size, foresight.method, parameter_count(model) + heads,
        config.train.global_batch_size, paper_parts(model, foresight, feature_dim),
        training_parts(model, foresight, feature_dim, foresight.active, vit),
    )  # fmt: skip


def costs_of_sizes(sizes: Sequence[str], methods: Sequence[str], block_size: int, batch: int) -> list[Costs]:
    """Every size with every method as the paper trains it: Mirai-I watches DINOv2-B with GPT-B, DINOv2-L with larger
    models.  Raises UserError for unknown names."""
    costs = []
    for size in sizes:
        for method in methods:
            foresight: dict[str, Any] = {"method": method}
            if TEACHERS.get(method) == "encoder":
                foresight["encoder"] = {"name": "dinov2-b" if size == "GPT-B" else "dinov2-l"}
            config = build({
                "model": {"size": size, "block_size": block_size}, "foresight": foresight,
                "train": {"global_batch_size": batch},
                "data": {"source": "npz", "path": "unread.npz"},
            })  # fmt: skip
            costs.append(costs_of(config, f"{size} {'baseline' if method == 'none' else method}"))
    return costs


def costs_json(rows: Sequence[Costs]) -> dict[str, Any]:
    """Stable keys; FLOPs are of one image unless the key says step."""
    return {
        "rows": [
            {
                "name": row.name, "size": row.size, "method": row.method, "parameters": row.parameters,
                "paper": row.paper | {
                    "total": row.paper_total, "overhead": row.paper_overhead,
                    "overhead_of_rounded": row.printed_overhead, "overhead_with_encoder": row.with_encoder,
                },
                "done": row.parts | {
                    "forward": row.forward, "backward": row.backward, "total": row.total, "overhead": row.overhead,
                },
                "global_batch_size": row.batch, "step_total": row.total * row.batch,
            }
            for row in rows
        ],
        "notes": list(NOTES),
    }  # fmt: skip


NOTES = (
    "paper: 6 N S with all N parameters, embedding tables included, no encoder (Table 13's way); of rounded: from "
    "figures rounded to three digits, which is how Table 13's 38.2 % arises (2.35 / 1.70); + encoder: its forward "
    "pass added",
    "done: matrix products that are done, attention included, embedding look-ups not; recomputation left out; a "
    "multiply-add is two",
    "the paper's 9.4 and 3.6 times less compute to one FID: `mirai-ds table 13`",
)


def render(rows: Sequence[Costs]) -> list[RenderableType]:
    """Tables of both counts for a terminal."""
    from rich.table import Table
    from rich.text import Text

    paper = Table(title="as the paper counts, FLOPs an image", box=None, title_justify="left")
    done = Table(title="as done, FLOPs", box=None, title_justify="left")
    heads = ("", "parameters", "gpt", "heads", "teacher", "total", "overhead", "of rounded", "+ encoder")
    for column in heads:
        paper.add_column(column, justify="left" if not column else "right")
    for column in ("", "gpt", "heads", "teacher", "encoder", "forward", "backward", "an image", "overhead", "a step"):
        done.add_column(column, justify="left" if not column else "right")
    for row in rows:
        p, d = row.paper, row.parts
        paper.add_row(
            Text(row.name), f"{row.parameters:,}", *[_flops(p.get(k, 0.0)) for k in ("gpt", "heads", "teacher")],
            f"{row.paper_total:.4e}", *map(_percent, (row.paper_overhead, row.printed_overhead, row.with_encoder)),
        )  # fmt: skip
        sums = {k: sum(v for n, v in d.items() if n.startswith(k)) for k in ("gpt", "heads", "teacher", "encoder")}
        done.add_row(
            Text(row.name), *map(_flops, sums.values()), _flops(row.forward), _flops(row.backward),
            f"{row.total:.4e}", _percent(row.overhead), f"{row.total * row.batch:.3e} ({row.batch})",
        )  # fmt: skip
    return [paper, Text(), done, Text(), *(Text(f"note: {note}") for note in NOTES)]


def _flops(value: float) -> str:
    return f"{value:.3e}" if value else "-"


def _percent(value: float) -> str:
    return f"{value:+.1%}" if value else "-"
