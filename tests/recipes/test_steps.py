"""Every recipe builds at full size, and takes steps at reduced width with what distinguishes it at work."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mirai_ds.checkpoint.llamagen import write_llamagen
from mirai_ds.config import RunConfig, load
from mirai_ds.config.sizes import heads_parameters, parameter_count
from mirai_ds.data import DataOrder, load_dataset
from mirai_ds.foresight import (
    EmaTeacher,
    EncoderTeacher,
    MiraiObjective,
    alignment_active,
    alignment_multiplier,
    offsets,
)
from mirai_ds.foresight.heads import TransformerHead
from mirai_ds.model import GPT, initialise
from mirai_ds.train.teacher import build_teacher
from tests.recipes.test_catalogue import ALIGNED, PAPER

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other

TWINS = ["mirai-e-b@paper", "mirai-i-k9@paper", "mtp-2d-k4@paper"]
VOCABULARY, SAMPLES = 13, 8

# Exact counts, none computed by the package: LlamaGen's sizes; REPA's MLP D -> 2048 -> 2048 -> C, of which the middle
# has 4,196,352 (768 -> 1024: 1,574,912 before and 2,098,176 after it); the transformer head.
GPT_SIZES = {"GPT-B": 110_888_448, "GPT-L": 342_910_976, "GPT-XL": 774_699_520}
PAR_EXTRA = 3 * 768  # n - 1 learnable tokens
MLP = {
    (768, 768): 7_344_896, (768, 1024): 7_869_440, (1024, 768): 7_869_184, (1024, 1024): 8_393_728,
    (1280, 1024): 8_918_016, (1280, 1280): 9_442_560,
}  # fmt: skip
TRANSFORMER = 7_678_464
WIDTHS = {"dinov2-b": 768, "dinov2-l": 1024, "dinov3-b": 768, "mae-b": 768, "mae-l": 1024}


@pytest.mark.parametrize("name", PAPER)
def test_full_size(name: str) -> None:
    config = load(name)
    f, model = config.foresight, config.model
    width = WIDTHS[f.encoder.name] if f.encoder else model.width
    with torch.device("meta"):
        objective = MiraiObjective(model, f, width)
    count = sum(p.numel() for p in objective.parameters())
    one = 0 if not f.active else TRANSFORMER if f.head == "transformer" else MLP[model.width, width]
    par = PAR_EXTRA if model.par_tokens else 0
    assert count == GPT_SIZES[model.size] + par + f.heads * one
    assert count == parameter_count(model) + heads_parameters(f, model.width, width)
    if f.active:
        assert objective.index.shape == (model.slots, f.heads)


def test_encoders_are_as_wide_as_said() -> None:
    for name, width in WIDTHS.items():
        from mirai_ds.config.encoder_config import ENCODERS

        with torch.device("meta"):
            encoder = timm.create_model(ENCODERS[name].timm_name, pretrained=False, num_classes=0)
        assert encoder.num_features == width


# --- reduced width -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set for 16 and 36 tokens with images, an encoder's weights, and a pretrained network."""
    folder = tmp_path_factory.mktemp("reduced")
    rng = np.random.default_rng(0)
    for tokens in (16, 36):
        side = 16 * math.isqrt(tokens)
        np.savez(
            folder / f"{tokens}.npz", codes=rng.integers(0, VOCABULARY, (SAMPLES, tokens)),
            labels=rng.integers(0, 5, SAMPLES), images=rng.integers(0, 256, (SAMPLES, side, side, 3), dtype=np.uint8),
        )  # fmt: skip
    torch.manual_seed(0)
    encoder = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=64)
    with torch.no_grad():
        for parameter in encoder.parameters():  # timm's biases and tables start at zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_file(encoder.state_dict(), folder / "encoder.safetensors")
    config = reduced("llamagen-b", folder)
    gpt = GPT(config.model)
    initialise(gpt, 7, std=0.3)
    write_llamagen(folder / "pretrained.pt", gpt.state_dict(), ema={k: v + 0.01 for k, v in gpt.state_dict().items()})
    return folder


def reduced(name: str, folder: Path) -> RunConfig:
    """The recipe at width 16 and on 4x4 tokens (6x6 for 24x24); depth, layers, heads and schedules stay."""
    full = load(name)
    tokens = 36 if full.model.grid == 24 else 16
    changes = [
        "model.size=custom", "model.dim=16", f"model.n_layer={full.model.depth}", "model.n_head=2",
        f"model.vocab_size={VOCABULARY}", "model.num_classes=5", f"model.block_size={tokens}",
        "model.ffn_multiple_of=16", "foresight.projector_dim=24", "train.global_batch_size=4", "train.precision=fp32",
        f"data={{source: npz, path: {folder}/{tokens}.npz, held_out_fraction: 0}}", "optimizer.lr=1e-3",
    ]  # fmt: skip
    encoder = full.foresight.encoder
    if encoder is not None:  # test_vit: 6 blocks on as many patches as there are tokens
        changes += ["foresight.encoder.name=test_vit", "foresight.encoder.pretrained=false",
                    f"foresight.encoder.weights={folder}/encoder.safetensors"]  # fmt: skip
        if encoder.layer is not None:
            changes += ["foresight.encoder.layer=4", "foresight.encoder.final_norm=false"]
        if encoder.block_causal is not None:
            changes.append(f"foresight.encoder.block_causal={max(1, encoder.block_causal * tokens // 256)}")
    if full.foresight.teacher_weights is not None:
        changes.append(f"foresight.teacher_weights={folder}/pretrained.pt")
    return load(name, changes)


class Steps:
    """A recipe's objective, teacher and AdamW in plain PyTorch, and what was seen of them."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.teacher, self.digest, _ = build_teacher(config, torch.device("cpu"))
        self.objective = MiraiObjective(config.model, config.foresight, getattr(self.teacher, "feature_dim", None))
        initialise(self.objective, config.seed)
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=config.optimizer.lr)
        source = load_dataset(config.data, config.model, "cpu").train
        indices, _ = DataOrder(len(source), config.train.global_batch_size, config.seed).batch(0, 0, 4)
        images = config.foresight.method == "mirai-i"
        self.tokens, self.labels, self.images = source.gather(indices, torch.zeros(4, dtype=torch.int64), images)
        self.taps: list[tuple[int, ...]] = []
        self.objective.gpt.register_forward_pre_hook(lambda _, args: self.taps.append(args[3]))

    def step(self, epoch: float) -> tuple[float, dict[str, Tensor]]:
        """One update on the same batch, dropout off, with the lambda of `epoch`: total loss and metrics before it."""
        f, target, teacher = self.config.foresight, None, self.teacher
        multiplier = alignment_multiplier(f, epoch, self.config.train.epochs)
        if alignment_active(f, epoch):
            assert teacher is not None
            if isinstance(teacher, EmaTeacher) and not teacher.frozen:
                state = self.objective.gpt.state_dict()
                teacher.load((name, state[name]) for name in teacher.names)
            target = teacher.features(self.tokens, self.labels, self.images)
        loss, metrics = self.objective(self.tokens, self.labels, None, target, multiplier)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach()), metrics


# One of each kind in every run; the rest with the long tests.
QUICK = [
    "llamagen-b", "mirai-e-b", "mirai-e-layer8-to-6", "mirai-e-k9", "mirai-e-right-below", "mirai-e-warmup0",
    "mirai-e-1d-k4", "mirai-e-transformer-head", "mirai-e-static-k3", "mirai-e-lambda-cosine", "mirai-e-b-384",
    "mirai-i-block16", "mirai-i-mae-b", "mirai-i-k3", "mirai-i-l", "mtp-1d-k3", "mtp-2d-k9", "mirai-e-xl", *TWINS,
]  # fmt: skip


def in_turn(names: list[str]) -> list[Any]:
    return [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.matrix]) for n in names]


@pytest.mark.parametrize("name", in_turn([*PAPER, *TWINS]))
def test_two_steps(name: str, place: Path) -> None:
    config = reduced(name, place)
    f, run = config.foresight, Steps(config)
    # While the output matrix is zero every token costs ln V.
    before, metrics = run.step(0.0)
    if not f.active:
        assert before == pytest.approx(math.log(VOCABULARY), rel=1e-5)
        after, _ = run.step(1.0)
        assert after < before - 1e-3
        return
    warmup = f.warmup_epochs or 0.0
    if warmup > 0:
        assert before == pytest.approx(math.log(VOCABULARY), rel=1e-5)
        assert set(metrics) == {"ntp"}
        assert all(p.grad is None for p in run.objective.projectors.parameters())
        before, metrics = run.step(warmup)
    multiplier = alignment_multiplier(f, warmup, config.train.epochs)
    assert before == pytest.approx(float(metrics["ntp"]) + multiplier * float(metrics["alignment"]), rel=1e-5)
    per_head = metrics["entropy" if f.method == "mtp" else "cosine"]
    assert per_head.shape == (len(offsets(f)),)
    weighted = torch.tensor(f.weights) * (per_head if f.method == "mtp" else -per_head)
    total = weighted.sum() if f.heads_reduction == "sum" else weighted.mean()
    assert float(metrics["alignment"]) == pytest.approx(float(total), rel=1e-4, abs=1e-6)
    if f.method == "mtp":
        assert per_head.tolist() == pytest.approx([math.log(VOCABULARY)] * f.heads, rel=0.02)
    for _ in range(3):
        after, later = run.step(warmup)
    assert after < before - 1e-3
    assert float(later["alignment"]) < float(metrics["alignment"])
    assert all(p.grad is not None and bool(p.grad.any()) for p in run.objective.projectors.parameters())
    check_what_is_at_work(run)


def check_what_is_at_work(run: Steps) -> None:
    """Layers, heads and teacher are those of the recipe."""
    f, teacher = run.config.foresight, run.teacher
    assert run.taps[-1] == (f.layer,)
    assert {isinstance(head, TransformerHead) for head in run.objective.projectors} == {f.head == "transformer"}
    if isinstance(teacher, EmaTeacher):
        assert len(teacher.trunk.layers) == f.teacher_layer
        own = run.objective.gpt.state_dict()["tok_embeddings.weight"]
        assert teacher.frozen is (f.teacher_weights is not None)
        assert teacher.frozen is (float((teacher.trunk.tok_embeddings.weight - own).abs().max()) > 0.1)
    if isinstance(teacher, EncoderTeacher):
        assert f.encoder is not None
        seen = patches_that_change(teacher, run.images)
        block = f.encoder.block_causal or len(seen)
        first = (len(seen) - 1) // block * block  # of the last block
        assert seen == [patch >= first for patch in range(len(seen))]
        assert len(teacher.encoder.blocks) == (f.encoder.layer or 6)  # type: ignore[arg-type]


def patches_that_change(teacher: EncoderTeacher, images: Tensor | None) -> list[bool]:
    """Of each patch, whether its feature changes with the image's last patch."""
    assert images is not None
    other = images.clone()
    other[:, :, -16:, -16:] = 255 - other[:, :, -16:, -16:]
    before, after = (teacher.features(torch.empty(0), torch.empty(0), pixels) for pixels in (images, other))
    return (before != after).any(-1).any(0).tolist()


SCHEDULES = {
    "mirai-e-b": {14.9: 0, 15: 1, 149.9: 1, 150: 0.5, 299: 0.5},
    "mirai-e-b-80": {14.9: 0, 15: 1, 79.9: 1},
    "mirai-e-lambda-const": {15: 1, 299: 1},
    "mirai-e-lambda-3step": {15: 1, 99.9: 1, 100: 0.5, 199.9: 0.5, 200: 0.25},
    "mirai-e-lambda-cosine": {15: 0.99384417, 75: 0.85355339, 150: 0.5, 300: 0},  # (1 + cos(pi e / 300)) / 2
    "mirai-i-b": {0: 1, 299: 1},
    "mirai-i-lambda-step": {0: 1, 149.9: 1, 150: 0.5},
    "mirai-i-lambda-3step": {0: 1, 100: 0.5, 200: 0.25},
    "mirai-i-lambda-cosine": {0: 1, 150: 0.5, 300: 0},
    "mirai-e-warmup0": {0: 1},
    "mirai-e-warmup5": {4.9: 0, 5: 1},
    "mirai-e-warmup30": {29.9: 0, 30: 1},
    "mirai-e-static-k9": {0: 1, 79: 1},
    "mtp-2d-k4": {0: 1, 79: 1},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_lambda_at_the_right_epochs(name: str) -> None:
    config = load(name)
    multiplier = functools.partial(alignment_multiplier, config.foresight, total_epochs=config.train.epochs)
    found = {epoch: multiplier(epoch) for epoch in SCHEDULES[name]}
    assert found == pytest.approx(SCHEDULES[name], abs=1e-8)


def test_the_steps_move_the_trunk_below_the_layer_only(place: Path) -> None:
    """Alignment's gradient ends at the aligned block; that of later tokens begins at the last."""
    for name, reached in (("mirai-e-layer4", 4), ("mirai-i-layer10", 10), ("mtp-1d-k4", 12)):
        run = Steps(reduced(name, place))
        target = run.teacher.features(run.tokens, run.labels, run.images)  # type: ignore[union-attr]
        if isinstance(run.teacher, EmaTeacher):
            target = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            run.objective.gpt.output.weight.normal_(generator=torch.Generator().manual_seed(0))
        gradients = []
        for weight in (0.0, 1.0):
            run.objective.zero_grad()
            run.objective(run.tokens, run.labels, None, target, weight)[0].backward()
            gradients.append({n: p.grad.clone() for n, p in run.objective.gpt.named_parameters()})  # type: ignore
        changed = [
            any(bool((gradients[0][n] != gradients[1][n]).any()) for n in gradients[0] if n.startswith(f"layers.{i}."))
            for i in range(12)
        ]
        assert changed == [i < reached for i in range(12)], name


def test_an_untrained_head_is_no_part_of_a_baseline(place: Path) -> None:
    objective = Steps(reduced("llamagen-b", place)).objective
    assert isinstance(objective.projectors, nn.ModuleList)
    assert len(objective.projectors) == 0


def test_some_are_aligned() -> None:
    assert len(ALIGNED) >= 60
