"""The eval section: what is measured beside the training loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mirai_ds.config.errors import ConfigError
from mirai_ds.config.model_config import Section

Weights = Literal["raw", "ema"]


class LossEvalConfig(Section):
    """Held-out next-token loss during training."""

    every_steps: int | None = Field(None, ge=1, description="measure at every multiple; default at the end only")
    at_end: bool = Field(True, description="measure after the last step")
    batch_size: int = Field(64, ge=1, description="images a rank evaluates at once")
    max_samples: int | None = Field(None, ge=1, description="held-out images at most; default all")
    weights: list[Weights] = Field(["raw", "ema"], description="which weights are measured")
    patience: int | None = Field(
        None, ge=1, description="finish early after so many measurements in a row above the lowest; default never"
    )


class FidConfig(Section):
    """During training, images from the weights (by `sampling`'s rules) are compared with real ones."""

    every_epochs: float | None = Field(None, gt=0, description="measure every so many epochs; default never")
    at_end: bool = Field(False, description="measure after the last step")
    num_samples: int = Field(5000, ge=2, description="images drawn for a measurement")
    features: str = Field(
        "inception", pattern=r"^(inception|timm:.+)$", description="what judges: inception, timm:NAME"
    )
    features_weights: str | None = Field(None, description="file with that network's weights")
    reference: str | None = Field(
        None, description="an .npz, a folder or a store of real images; default the training images"
    )
    reference_images: int = Field(10000, ge=2, description="without a reference: training images, evenly chosen")
    metrics: list[Literal["fid", "sfid", "is", "pr"]] | None = Field(None, description="default all that apply")
    policy: Literal["random", "balanced"] = Field("random", description="labels drawn: random, or each class as often")
    weights: Weights = Field("ema", description="which weights draw")
    seed: int = Field(0, ge=0, lt=2**31, description="of labels and draws, the same at every measurement")

    @property
    def active(self) -> bool:
        """Whether anything is measured."""
        return self.at_end or self.every_epochs is not None

    @model_validator(mode="after")
    def _check(self) -> FidConfig:
        if self.active:
            self.check_network()
        return self

    def check_network(self) -> None:
        """Raises ConfigError where nothing can judge."""
        if self.features_weights is None:
            problem = f"give the file with the weights of eval.fid.features = {self.features!r}"
            raise ConfigError("eval.fid.features_weights", None, problem)


class ClassifierConfig(Section):
    """At the end, let a classifier trained on real training images judge generated ones (small images only)."""

    enabled: bool = Field(False, description="train a small classifier on real images, and let it judge generated ones")
    per_class: int = Field(50, ge=1, description="images drawn of each class")


class EvalConfig(Section):
    """What is measured beside the training loss.  Nothing of it changes what is learned."""

    loss: LossEvalConfig = LossEvalConfig()
    fid: FidConfig = FidConfig()
    classifier: ClassifierConfig = ClassifierConfig()
