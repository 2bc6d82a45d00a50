"""FLOPs against the paper's figures, and against PyTorch's own counter on real small models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mirai_ds.cli.main import main
from mirai_ds.config import ForesightConfig, ModelConfig, RecomputeConfig, load
from mirai_ds.config.encoder_config import ENCODERS, EncoderConfig
from mirai_ds.engine.recompute import block_runner
from mirai_ds.foresight import MiraiObjective
from mirai_ds.foresight.encoders import encoder_plan
from mirai_ds.model import GPTTrunk
from mirai_ds.planning.costs import Costs, costs_of, costs_of_sizes
from mirai_ds.planning.flops import (
    encoder_flops,
    forward_flops,
    head_flops,
    known_encoder,
    recomputed_flops,
    training_flops,
    training_parts,
)


def paper(size: str, method: str) -> Costs:
    return costs_of_sizes([size], [method], 256, 256)[0]


def test_table_13_as_the_paper_counts() -> None:
    base, inside, ema = (paper("GPT-B", method) for method in ("none", "mirai-i", "mirai-e"))
    assert base.paper_total == 6 * 110_888_448 * 256
    assert f"{base.paper_total:.5e}" == "1.70325e+11"
    assert inside.paper["heads"] == 6 * 7_344_896 * 256
    assert f"{inside.paper['heads']:.4e}" == "1.1282e+10"
    assert f"{inside.paper_total:.5e}" == "1.81606e+11"
    assert f"{inside.paper_overhead:.2%}" == "6.62%"
    assert f"{ema.paper['heads']:.4e}" == "3.3845e+10"
    assert f"{ema.paper_total:.4e}" == "2.3477e+11"
    assert f"{ema.paper_overhead:.1%}" == "37.8%"
    assert f"{ema.printed_overhead:.1%}" == "38.2%"  # of 2.35 and 1.70, as printed


@pytest.mark.parametrize(
    ("size", "method", "overhead"),
    [
        ("GPT-B", "mirai-i", "33.8%"), ("GPT-L", "mirai-i", "33.2%"), ("GPT-XL", "mirai-i", "14.8%"),
        ("GPT-L", "mirai-e", "28.1%"), ("GPT-XL", "mirai-e", "25.3%"),
    ],
)  # fmt: skip
def test_overheads_with_the_encoder(size: str, method: str, overhead: str) -> None:
    assert f"{paper(size, method).with_encoder:.1%}" == overhead


def test_dinov2_costs_more_than_the_heads() -> None:
    foresight = ForesightConfig(method="mirai-i", encoder=EncoderConfig(name="dinov2-b"))
    vit = known_encoder(foresight, ModelConfig())
    assert vit is not None
    assert f"{encoder_flops(vit):.3g}" == "4.63e+10"
    assert f"{encoder_flops(vit) / (6 * 110_888_448 * 256):.1%}" == "27.2%"


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_encoders_by_formula_are_timms(name: str) -> None:
    """Width, depth, tokens and parameters of the real networks (on the meta device); layer scales make 0.1 %."""
    foresight = ForesightConfig(method="mirai-i", encoder=EncoderConfig(name=name))
    vit = known_encoder(foresight, ModelConfig())
    assert vit is not None
    assert foresight.encoder is not None
    plan, side = encoder_plan(foresight.encoder, 16)
    kept = list(plan.blocks)[: vit.depth]  # type: ignore[union-attr]
    dropped = list(plan.blocks)[vit.depth :]  # type: ignore[union-attr]
    exact = sum(p.numel() for p in plan.parameters()) - sum(p.numel() for b in dropped for p in b.parameters())
    assert vit.parameters == pytest.approx(exact, rel=2e-3)
    assert (vit.width, vit.depth, vit.image) == (plan.num_features, foresight.encoder.layer or len(kept), side)
    assert vit.tokens == 256 + plan.num_prefix_tokens  # type: ignore[operator]


TINY = ModelConfig(
    size="custom", dim=32, n_layer=3, n_head=2, vocab_size=50, num_classes=5, block_size=16, ffn_multiple_of=32,
    token_dropout=0, resid_dropout=0, ffn_dropout=0,
)  # fmt: skip


def counted(work: Any) -> int:
    """Attention as plain products: the counter does not know the CPU's fused one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def foresight(method: str, **fields: Any) -> ForesightConfig:
    config = ForesightConfig(method=method, projector_dim=24, **fields)  # type: ignore[arg-type]
    config.fill_from_model(TINY)
    return config


def objective_flops(config: ForesightConfig, aligned: bool, feature_dim: int, model: ModelConfig = TINY) -> int:
    torch.manual_seed(0)
    objective = MiraiObjective(model, config.model_copy(update={"kernel": "reference"}), feature_dim)
    tokens, labels = torch.randint(0, 50, (1, 16)), torch.tensor([2])
    rows = model.slots + (config.method == "mirai-e")
    target = torch.randn(1, rows, feature_dim) if aligned else None
    if config.method == "mtp":
        target = tokens
    return counted(lambda: objective(tokens, labels, None, target, 1.0)[0].backward())


@pytest.mark.parametrize(("method", "dim"), [("none", 32), ("mirai-e", 32), ("mirai-i", 20)])
def test_a_step_is_what_pytorch_counts(method: str, dim: int) -> None:
    """Forward and backward of GPT and heads."""
    config = foresight(method)
    aligned = method != "none"
    parts = training_parts(TINY, config, dim, aligned)
    parts.pop("teacher forward", None)
    assert objective_flops(config, aligned, dim) == sum(parts.values())


@pytest.mark.parametrize(
    ("method", "fields"), [("mtp", {}), ("mtp", {"head": "mlp"}), ("mirai-e", {"head": "transformer"})]
)
@pytest.mark.parametrize("par_tokens", [None, 4])
def test_other_heads_and_par_are_what_pytorch_counts(
    method: str, fields: dict[str, Any], par_tokens: int | None
) -> None:
    """mtp's logits at every slot; PAR's 3 learnable tokens among 19 slots, of which 16 have logits."""
    model = ModelConfig(**{**TINY.model_dump(), "par_tokens": par_tokens})
    config = foresight(method, **fields)
    parts = training_parts(model, config, 32, True)
    teacher = parts.pop("teacher forward", None)
    assert objective_flops(config, True, 32, model) == sum(parts.values())
    if teacher is not None:
        with torch.no_grad():
            trunk = GPTTrunk(model, config.teacher_layer)
            found = counted(lambda: trunk.features(torch.randint(0, 50, (1, 15)), torch.tensor([1])))
        assert teacher == found


@pytest.mark.parametrize("recipe", ["mtp-2d-k9", "mirai-e-transformer-head", "mirai-e-par-b"])
def test_recipes_by_the_papers_way(recipe: str) -> None:
    """6 N S with the heads there are; mtp's eight run through the unembedding once more each; PAR has 259 slots."""
    heads, slots = {
        "mtp-2d-k9": (8 * (7_678_464 + 16384 * 768), 256), "mirai-e-transformer-head": (3 * 7_678_464, 256),
        "mirai-e-par-b": (3 * 7_344_896, 259),
    }[recipe]  # fmt: skip
    row = costs_of(load(recipe))
    assert row.paper["heads"] == 6 * heads * slots
    assert row.paper["gpt"] == 6 * (110_888_448 + (3 * 768 if slots == 259 else 0)) * slots
    assert row.parameters == row.paper["gpt"] / 6 / slots + (8 * 7_678_464 if recipe == "mtp-2d-k9" else heads)


def test_the_teacher_is_what_pytorch_counts() -> None:
    config = foresight("mirai-e", teacher_sees_last_token=True, class_slot=False)
    trunk = GPTTrunk(TINY, config.teacher_layer)
    with torch.no_grad():
        found = counted(lambda: trunk.features(torch.randint(0, 50, (1, 16)), torch.tensor([1])))
    assert found == forward_flops(TINY, 17, config.teacher_layer or 0, logits=False)
    assert training_parts(TINY, config, 32, True)["teacher forward"] == found


def test_recomputed_blocks_are_what_pytorch_counts() -> None:
    """All of a second forward pass but each block's last product, of which backward needs no result."""
    steps = []
    for policy in ("none", "full"):
        objective = MiraiObjective(TINY, foresight("none"), None)
        objective.gpt.run_block = block_runner(RecomputeConfig(policy=policy))
        tokens, labels = torch.randint(0, 50, (1, 16)), torch.tensor([2])
        steps.append(counted(lambda o=objective: o(tokens, labels, None, None, 1.0)[0].backward()))  # noqa: B023
    last = 2 * TINY.ffn_hidden * TINY.width * 16
    assert steps[1] - steps[0] == recomputed_flops(TINY, 3) - 3 * last


def test_an_encoder_is_what_pytorch_counts() -> None:
    """timm's test_vit by its description, on real tensors."""
    import timm

    from mirai_ds.planning.costs import encoder_shape

    config = ForesightConfig(method="mirai-i", encoder=EncoderConfig(name="test_vit"))
    vit = encoder_shape(config, TINY)
    assert vit is not None
    network = timm.create_model("test_vit", num_classes=0, img_size=vit.image).eval()
    with torch.no_grad():
        found = counted(lambda: network.forward_features(torch.randn(1, 3, vit.image, vit.image)))
    assert found == encoder_flops(vit)
    assert vit.parameters == sum(p.numel() for p in network.parameters())


def test_what_the_log_reports_is_unchanged() -> None:
    """Model FLOPs without the encoder: the training log's meaning."""
    config = ForesightConfig(method="mirai-i", encoder=EncoderConfig(name="dinov2-b"))
    config.fill_from_model(ModelConfig())
    parts = training_parts(ModelConfig(), config, 768, True, known_encoder(config, ModelConfig()))
    assert training_flops(ModelConfig(), config, 768, True) == sum(parts.values()) - parts["encoder forward"]
    assert parts["heads forward"] == head_flops(ModelConfig(), config, 768, 256)


def test_the_command() -> None:
    done = CliRunner().invoke(main, ["flops"])
    assert done.exit_code == 0, done.output
    assert "2.3477e+11" in done.output
    assert "+38.2%" in done.output
    assert "+33.8%" in done.output
    record = json.loads(CliRunner().invoke(main, ["flops", "--size", "GPT-XL", "--method", "mirai-e", "--json"]).output)
    (row,) = record["rows"]
    assert row["parameters"] == 774_699_520 + 3 * 9_442_560
    assert row["done"]["total"] == row["done"]["forward"] + row["done"]["backward"]
    assert row["step_total"] == 256 * row["done"]["total"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "GPT-Q"], ["model.size", "GPT-Q"]),
        (["no-such-recipe"], ["no-such-recipe"]),
        (["digits-baseline", "--size", "GPT-B"], ["--size"]),
        (["--block-size", "200"], ["model.block_size = 200", "196 or 225"]),
    ],
)
def test_mistakes(arguments: list[str], words: list[str]) -> None:
    done = CliRunner().invoke(main, ["flops", *arguments])
    assert done.exit_code == 2
    assert len(done.output.strip().splitlines()) == 1
    assert all(word in done.output for word in words)
