"""The two networks a study trains once: Mirai-I's encoder (masked patches, classes) and the judge of samples.

Both are functions of the training images and a seed: on one machine with one number of threads the same weights come
out, whose digest is stored with the rows.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirai_ds.config import EncoderConfig
from mirai_ds.config.load import load
from mirai_ds.data import DataOrder, TokenSource, load_dataset
from mirai_ds.foresight import encoder_input, untrained_encoder
from mirai_ds.runtime.disk import replacing
from mirai_ds.runtime.weight_files import read_safetensors_file, write_safetensors
from mirai_ds.study.arms import ENCODER, Study, data_overrides, encoder_file, judge_file
from mirai_ds.study.images import Pixels
from mirai_ds.train.teacher import digest_of_tensors

Array = np.ndarray[Any, Any]
SEED = 0
BATCH = 64
ENCODER_RATE, JUDGE_RATE = 3e-3, 2e-3
MASKED = 0.6  # of the patches
GREY = 128  # what masked pixels are set to
PROBED = 1000  # held-out images of the numbers about the encoder


# --- the encoder ----------------------------------------------------------------------------------------------------


class MaskedPatches(nn.Module):
    """A bidirectional ViT that names the codes of masked patches (BEiT's task with the study's own tokens) and, by the
    mean of its patch features, the image's class.

    Pixels are masked before they are resized: afterwards a neighbour would show them.
    """

    def __init__(self, grid: int, codes: int, classes: int) -> None:
        super().__init__()
        config = EncoderConfig(name=ENCODER)
        self.grid = grid
        self.encoder, self.size = untrained_encoder(config, grid)
        self.prefix = int(self.encoder.num_prefix_tokens)  # type: ignore[arg-type]
        width = int(self.encoder.num_features)  # type: ignore[arg-type]
        self.codes, self.classes = nn.Linear(width, codes), nn.Linear(width, classes)
        self._initialise(width)
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def _initialise(self, width: int) -> None:
        """timm's 0.02 is for wide models and long training: unit variances through every product instead, and places as
        loud as pixels, or a few hundred steps do not find them."""
        for name, parameter in self.named_parameters():
            if name == "encoder.pos_embed":
                parameter.normal_()
            elif parameter.dim() >= 2:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5 if parameter.dim() == 4 else width**-0.5)

    def features(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) uint8 -> (B, g * g, C): what Mirai-I sees."""
        x = encoder_input(images, self.mean, self.std, self.size)  # type: ignore[arg-type]
        return self.encoder.forward_features(x)[:, self.prefix :]  # type: ignore[operator]

    def forward(self, images: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (m, V) of the m masked patches and (B, classes); masked (B, g * g) bool."""
        side = images.shape[-1] // self.grid
        pixels = masked.view(-1, 1, self.grid, self.grid).repeat_interleave(side, 2).repeat_interleave(side, 3)
        features = self.features(images.masked_fill(pixels, GREY))
        return self.codes(features[masked]), self.classes(features.mean(1))


def pretrain_encoder(study: Study, folder: Path) -> dict[str, float | str]:
    """Write the encoder's weights; returns their digest and how good they are on held-out images."""
    config = load(study.recipe, data_overrides(study, folder))
    data = load_dataset(config.data, config.model)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = MaskedPatches(config.model.grid, config.model.vocab_size, config.model.num_classes).train()
    order = DataOrder(len(data.train), BATCH, SEED)
    draws = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=ENCODER_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(study.encoder_steps):
        for group in optimizer.param_groups:
            group["lr"] = ENCODER_RATE * min(1.0, (step + 1) / 20) * decayed(step, study.encoder_steps)
        indices, _ = order.batch(step)
        tokens, labels, images = data.train.gather(indices, torch.zeros_like(indices), images=True)
        assert images is not None
        masked = torch.rand(tokens.shape, generator=draws) < MASKED
        codes, classes = model(images, masked)
        loss = F.cross_entropy(codes, tokens[masked]) + F.cross_entropy(classes, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    weights = {name: value.detach().contiguous() for name, value in model.encoder.state_dict().items()}
    write_weights(encoder_file(folder), weights)
    return {"encoder": ENCODER, "encoder_digest": digest_of_tensors(weights), **_about(model.eval(), data.held_out)}


@torch.no_grad()
def _about(model: MaskedPatches, held_out: TokenSource) -> dict[str, float]:
    """Share of masked codes and, of whole images, of classes that the pretrained network names."""
    indices = torch.arange(min(PROBED, len(held_out)))
    tokens, labels, images = held_out.gather(indices, torch.zeros_like(indices), images=True)
    assert images is not None
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(SEED + 1)) < MASKED
    codes, classes = [], []
    for part in indices.split(BATCH):
        codes.append(model(images[part], masked[part])[0].argmax(-1) == tokens[part][masked[part]])
        classes.append(model(images[part], torch.zeros_like(masked[part]))[1].argmax(-1) == labels[part])
    named, told = (float(torch.cat(one).float().mean()) for one in (codes, classes))
    return {"encoder_masked_accuracy": named, "encoder_class_accuracy": told}


def decayed(step: int, steps: int) -> float:
    """A cosine that falls from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Writes a .safetensors file, whole or not at all."""
    with replacing(path) as part:
        write_safetensors(part, weights)


# --- the judge ------------------------------------------------------------------------------------------------------


class Judge(nn.Module):
    """A small convolutional classifier of grey images; its features are the 64 numbers before the last layer."""

    def __init__(self, side: int, classes: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(32 * (side // 4) ** 2, 64), nn.ReLU(),
        )  # fmt: skip
        self.last = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, H, W) -> features (B, 64), logits (B, classes)."""
        features = self.convolutions(images[:, None].float() / 255.0 - 0.5)
        return features, self.last(features)


def train_judge(study: Study, folder: Path, train: Pixels, test: Pixels) -> dict[str, float | str]:
    """Write the judge's weights; returns their digest and its accuracy on real test images."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        judge = Judge(train.images.shape[1], int(train.labels.max()) + 1)
    images, labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
    order = DataOrder(len(labels), BATCH, SEED)
    steps = study.judge_epochs * order.steps_per_epoch
    optimizer = torch.optim.Adam(judge.parameters(), lr=JUDGE_RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = JUDGE_RATE * decayed(step, steps)
        indices, _ = order.batch(step)
        loss = F.cross_entropy(judge(images[indices])[1], labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = {name: value.detach() for name, value in judge.state_dict().items()}
    write_weights(judge_file(folder), weights)
    return {"judge_digest": digest_of_tensors(weights), "judge_accuracy": float(judged(judge, test)[1].mean())}


def open_judge(folder: Path) -> Judge:
    """The study's judge."""
    weights = read_safetensors_file(judge_file(folder))
    flat, classes = weights["convolutions.7.weight"].shape[1], weights["last.weight"].shape[0]
    judge = Judge(4 * math.isqrt(flat // 32), classes)
    judge.load_state_dict(weights)
    return judge.eval()


@torch.no_grad()
def judged(judge: Judge, pixels: Pixels) -> tuple[Array, Array]:
    """features (n, 64) fp32 of grey images, and whether each is recognised (n,) bool."""
    outputs = [judge(part) for part in torch.from_numpy(np.ascontiguousarray(pixels.images)).split(500)]
    features = torch.cat([one[0] for one in outputs]).numpy()
    return features, torch.cat([one[1] for one in outputs]).argmax(-1).numpy() == pixels.labels
