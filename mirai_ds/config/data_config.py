"""The data section, and what the configuration knows of each kind of data."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field, model_validator

from mirai_ds.config.errors import ConfigError
from mirai_ds.config.model_config import Section
from mirai_ds.config.own import check_name


class SourceTraits(NamedTuple):
    """What the configuration must know of a kind of data.

    path: what `data.path` is (None: there is none).  whole: a training set as it stands, of which nothing is held out
    unless asked for.  parts: its images and tokenizer are files of their own.  images: how many, if always the same.
    holds: a file in it, where it is a folder that has been finished.
    """

    path: str | None
    whole: bool = False
    parts: bool = False
    images: int | None = None
    holds: str = ""


SOURCES = {
    "digits": SourceTraits(None, images=1797),
    "npz": SourceTraits("the .npz file"),
    "store": SourceTraits("the store's folder", whole=True, parts=True, holds="manifest.json"),
}


class DataConfig(Section):
    """Where the tokens come from.  `digits` ships with scikit-learn; `npz` is a file of codes and labels; `store` is a
    token store made by `mirai-ds extract`; `package.module:function` is your own."""

    source: str = Field("digits", description="digits (ship with scikit-learn), npz, store, or package.module:function")
    path: str | None = Field(
        None, description="the .npz file, or the store's folder; what your own function makes of it"
    )
    held_out_fraction: float | None = Field(None, ge=0, lt=1, description="default 0.1; of a store 0")
    split_seed: int = Field(0, ge=0, description="decides which samples are held out")
    held_out_path: str | None = Field(None, description="held-out samples of their own, e.g. a store of the val set")
    more_views: list[str] = Field([], description="store: further stores of the same images; views of all are drawn")
    images: str | None = Field(None, description="store: pixels for mirai-i, an image store or the original folder")
    tokenizer: str | None = Field(None, description="store: the tokenizer's file, to show tokens as pictures")
    stage: str | None = Field(
        None, description="store: a folder on each node's own disk, or a variable's such as $TMPDIR, to copy stores to"
    )
    workers: int | None = Field(None, ge=0, description="reading processes a rank; default 0, with images up to 8")
    prefetch: int = Field(2, ge=1, description="micro-batches each worker reads ahead")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        check_name(self.source, SOURCES, "data.source")
        traits = SOURCES.get(self.source)
        if traits is not None and traits.path is None:
            for name in ("path", "held_out_path"):
                if getattr(self, name):
                    problem = f"digits come with scikit-learn; remove {name} or use source: npz or store"
                    raise ConfigError(f"data.{name}", getattr(self, name), problem)
        elif traits is not None and not self.path:
            raise ConfigError("data.path", self.path, f"give {traits.path}: data.source = {self.source!r} needs one")
        for name in ("images", "tokenizer", "more_views"):
            if getattr(self, name) and traits is not None and not traits.parts:
                raise ConfigError(f"data.{name}", getattr(self, name), "is for source: store; remove it")
        if self.stage is not None and (traits is None or not traits.parts):
            raise ConfigError("data.stage", self.stage, "is for source: store; remove it")
        if self.stage is not None and not self.stage.startswith(("/", "$")):
            raise ConfigError("data.stage", self.stage, "give a whole path, such as /local, or a variable's: $TMPDIR")
        if self.held_out_path and self.held_out_fraction:
            problem = f"held-out samples come from data.held_out_path = {self.held_out_path!r}; remove one of them"
            raise ConfigError("data.held_out_fraction", self.held_out_fraction, problem)
        if self.held_out_fraction is None:
            whole = (traits is not None and traits.whole) or self.held_out_path
            self.__dict__["held_out_fraction"] = 0.0 if whole else 0.1
        return self
