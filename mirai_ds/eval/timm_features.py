"""A timm network's pooled features, for judging images on which ImageNet's Inception says little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirai_ds.config import UserError
from mirai_ds.foresight.encoders import fitting_weights, name_problem
from mirai_ds.runtime.disk import digest_of_file
from mirai_ds.runtime.precision import float32_products


class PooledFeatures:
    """Images -> what the network's classifier would be given, in fp32.

    Whole images are resized to the model's input side (no crop: a judge must see all of an image) with its own
    interpolation, antialiased, then mean and std of its weights' configuration in timm.
    """

    metrics: tuple[str, ...] = ("fid", "pr")  # sFID names a layer of Inception, the Inception Score its 1008 classes
    width: int

    def __init__(self, name: str, path: Path, device: torch.device, tf32: bool = False) -> None:
        """name: timm's, with or without the tag of its weights.  Raises UserError for an unknown name or unfit file.

        No random number is drawn: the caller's generators are as before.
        """
        import timm

        self.name = f"timm:{name}"
        option = f"--features {self.name}"
        problem = name_problem(name)
        if problem is not None:
            raise UserError(f"{option}: {problem}")
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
        published: dict[str, Any] = timm.data.resolve_model_data_config(model)
        channels, self.side = published["input_size"][0], int(published["input_size"][-1])
        if channels != 3:
            raise UserError(f"{option}: takes {channels} channels, images have 3; use another model")
        model.load_state_dict(_fitting(model, path, option))
        self.model = model.to(device).eval().requires_grad_(False)
        self.path, self.device, self.tf32 = path, device, tf32
        self.digest = digest_of_file(path)
        self.interpolation = "bilinear" if published["interpolation"] == "bilinear" else "bicubic"
        self._mean, self._std = ([float(v) for v in published[key]] for key in ("mean", "std"))

    @torch.inference_mode()
    def features(self, images: Tensor) -> tuple[Tensor, None]:
        """uint8 (B, H, W, 3) -> pooled (B, C) fp32 on the device; nothing spatial."""
        x = images.to(self.device).permute(0, 3, 1, 2).float() / 255.0
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self._mean, self._std))
        with torch.autocast(self.device.type, enabled=False), float32_products("tf32" if self.tf32 else "ieee"):
            if x.shape[-2:] != (self.side, self.side):
                size = (self.side, self.side)
                x = F.interpolate(x, size, mode=self.interpolation, antialias=True, align_corners=False).clamp(0, 1)
            return self.model((x - mean) / std), None

    def facts(self) -> dict[str, Any]:
        """What the protocol records: the file, and the preprocessing of the images."""
        return {
            "network": self.name, "file": self.path.name, "sha256": self.digest, "input": self.side,
            "interpolation": self.interpolation, "mean": self._mean, "std": self._std,
            "precision": "tf32" if self.tf32 else "fp32",
        }  # fmt: skip


def _fitting(model: nn.Module, path: Path, option: str) -> dict[str, Tensor]:
    """The file's tensors for all of the model but its classifier.  Raises UserError."""
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    left_over = (*(f"{name}." for name in names), "mask_token")
    return fitting_weights(model, path, lambda problem: UserError(f"{option}: {path}: {problem}"), left_over)
