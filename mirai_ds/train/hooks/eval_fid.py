"""How far generated images are from real ones, during training: the metrics of `mirai-ds evaluate` as curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mirai_ds.config import ConfigError, FidConfig, UserError
from mirai_ds.data import TokenSource
from mirai_ds.data.meaning import class_names
from mirai_ds.eval.features import (
    FeatureNetwork,
    Features,
    Reference,
    allowed_metrics,
    check_metrics,
    extract_features,
    reference_of,
    score,
)
from mirai_ds.eval.image_sources import ImageSource
from mirai_ds.eval.metrics.inception import InceptionFeatures
from mirai_ds.eval.reference_file import open_reference
from mirai_ds.eval.timm_features import PooledFeatures
from mirai_ds.model.rules import image_labels
from mirai_ds.tracking.pictures import labelled_grid, save_png
from mirai_ds.train.agree import on_every_rank
from mirai_ds.train.hooks.log import Sinks
from mirai_ds.train.hooks.sample import draw_samples
from mirai_ds.train.loop import Hook
from mirai_ds.train.session import Session
from mirai_ds.train.step import StepRecord

Array = np.ndarray[Any, Any]
BATCH = 64
SHOWN = 64  # images of the picture


class EvalFidHook(Hook):
    """`eval-fid`: quality/fid and the other metrics in metrics.jsonl and the trackers, a grid of the first images.

    Labels and random numbers are those of `mirai-ds sample --num` with the same seed and policy.  The ranks share the
    images, and training is not touched: no random number is drawn, no weight changed, no precision switch left turned.
    """

    def __init__(self, sinks: Sinks) -> None:
        self.sinks = sinks
        self._done = -1
        self._network: FeatureNetwork | None = None
        self._reference: Reference | None = None

    def check(self, session: Session) -> None:
        """Load the network and see the real images once, so that a mistake is heard of before hours of training."""
        config = session.config.eval.fid
        if not config.active and not session.config.checkpoint.judged_by_fid:
            return
        network = on_every_rank(lambda: _network(config, session.device))
        reference = _reference(config, session, network)
        _check(config, network, reference)
        self._network, self._reference = network, reference

    def needs_sync(self, session: Session) -> bool:
        """At the interval; where it judges checkpoints, whenever one is saved too."""
        epochs, saves = session.config.eval.fid.every_epochs, session.config.checkpoint
        last = session.step == session.total_steps
        if saves.judged_by_fid and (saves.due(session.step) or (last and saves.at_end)):
            return True
        return epochs is not None and session.step % max(1, round(epochs * session.order.steps_per_epoch)) == 0

    def after_step(self, session: Session, record: StepRecord) -> None:
        """Measure at the interval."""
        if self.needs_sync(session):
            self._measure(session)

    def on_rewind(self, session: Session) -> None:
        """What was measured later counts no more."""
        self._done = -1

    def on_end(self, session: Session) -> None:
        """Measure the final weights unless that was just done."""
        if session.config.eval.fid.at_end and self._done != session.step:
            self._measure(session)

    def _measure(self, session: Session) -> None:
        self._done = session.step
        config, source = session.config.eval.fid, session.dataset.train
        classes = range(session.config.model.num_classes)
        labels = image_labels(config.policy, classes, config.seed, torch.arange(config.num_samples))
        tokens = draw_samples(session, labels, config.weights, config.seed)
        assert self._network is not None
        features = shared_features(session, config.num_samples, lambda part: source.decode(tokens[part]), self._network)
        values: dict[str, float] = {}
        if session.is_main:
            assert self._reference is not None
            values = score(features, self._reference, self._network, config.metrics).values
            self._show(session, source.decode(tokens[:SHOWN]), class_names(source.meaning, labels[:SHOWN]))
        values = session.control.gather({f"quality/{name}": value for name, value in values.items()})[0]
        session.progress.measured |= values
        self.sinks.scalars(values, session)

    def _show(self, session: Session, images: Array, names: list[str]) -> None:
        grid = labelled_grid(images, columns=8, captions=names)
        save_png(session.run / "quality" / f"step-{session.step:08d}.png", grid)
        self.sinks.image("quality/grid", grid, session)


def shared_features(
    session: Session, count: int, images: Callable[[Tensor], Array], network: FeatureNetwork
) -> Features:
    """Features of `count` images, each computed by one rank: images(indices (B,) int64) -> uint8 (B, H, W, 3).
    The same on every rank.  Collective."""
    mine = torch.arange(session.world.rank, count, session.world.size)
    return _spread((images(part) for part in mine.split(BATCH)), mine, count, session, network)


def _file_features(session: Session, source: ImageSource, network: FeatureNetwork) -> Features:
    """The same of a file or folder: every rank reads all of it and takes every n-th batch."""
    rank, size = session.world.rank, session.world.size
    mine = torch.cat([torch.arange(0), *torch.arange(source.count).split(BATCH)[rank::size]])
    batches = (batch for i, batch in enumerate(source.batches(BATCH)) if i % size == rank)
    return _spread(batches, mine, source.count, session, network)


def _spread(batches: Iterable[Array], mine: Tensor, count: int, session: Session, network: FeatureNetwork) -> Features:
    def alive() -> Iterator[Array]:
        for batch in batches:
            session.beat("evaluating")
            yield batch

    features = extract_features(alive(), network, BATCH) if len(mine) else None
    mine_wide = [0 if rows is None else rows.shape[1] for rows in features or ()]
    widths = next(filter(None, session.control.gather(mine_wide)))  # a rank without an image has to be told

    def whole(rows: Array | None, width: int) -> Array:
        out = torch.zeros(count, width)
        if rows is not None:
            out[mine] = torch.from_numpy(rows)
        dist.all_reduce(out, group=session.control.group)  # of each row one rank's is not zero: exact
        return out.numpy()

    pooled = whole(features and features.pooled, widths[0])
    return Features(pooled, whole(features and features.spatial, widths[1]) if widths[1] else None)


def _network(config: FidConfig, device: torch.device) -> FeatureNetwork:
    path = Path(config.features_weights or "")
    if config.features == "inception":
        return InceptionFeatures(path, device)
    return PooledFeatures(config.features.removeprefix("timm:"), path, device)


def _reference(config: FidConfig, session: Session, network: FeatureNetwork) -> Reference:
    """The statistics stored in a file, for Inception, and else those of its images, or of training images."""
    source = session.dataset.train
    if source.decoder is None:
        problem = "the data has no codebook or tokenizer to turn tokens into images; set data.tokenizer"
        raise ConfigError("eval.fid.every_epochs", config.every_epochs, problem)
    if config.reference is None:
        return reference_of(_training_features(config, session, source, network))
    side = source.decoder.downsampling * session.config.model.grid
    file = on_every_rank(lambda: open_reference(Path(config.reference or ""), (side, side)))
    images = None if file.images is None else _file_features(session, file.images, network)
    computed = Reference(None, None, None) if images is None else reference_of(images)
    if not isinstance(network, InceptionFeatures):
        return computed
    return Reference(file.pooled or computed.pooled, file.spatial or computed.spatial, computed.images)


def _training_features(config: FidConfig, session: Session, source: TokenSource, network: FeatureNetwork) -> Features:
    """As the tokens show them, so that the distance is the model's and not the tokenizer's."""
    count = min(config.reference_images, len(source))
    chosen = np.linspace(0, len(source) - 1, count).round().astype(np.int64)
    return shared_features(session, count, lambda part: source.decode(source.first_view(chosen[part])), network)


def _check(config: FidConfig, network: FeatureNetwork, reference: Reference) -> None:
    check_metrics(config.metrics or ["fid"], network)
    for metric in config.metrics or []:
        if metric not in allowed_metrics(reference, network):
            raise UserError(
                f"eval.fid.metrics: {metric!r} needs more than eval.fid.reference = {config.reference!r} has"
            )
