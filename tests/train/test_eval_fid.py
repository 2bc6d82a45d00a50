"""Metrics of generated images during training: the values are those of the tools, training does not notice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mirai_ds.checkpoint.store import folder_of, list_steps, read_info
from mirai_ds.checkpoint.weights import load_weights
from mirai_ds.config import CheckpointConfig, load
from mirai_ds.data import load_dataset
from mirai_ds.eval.features import evaluate_features, extract_features, reference_of
from mirai_ds.eval.timm_features import PooledFeatures
from mirai_ds.model import gpt_from_weights, sample_tokens
from mirai_ds.model.rules import image_labels, rules_of
from tests.fault.faulty_ranks import curve, run_ranks, tensors
from tests.one_line import one_line

SETTINGS = ["train.max_steps=8", "eval.loss.every_steps=null", "eval.loss.at_end=false", "sampling.every_steps=null",
            "sampling.at_end=false"]  # fmt: skip
torch.set_num_threads(1)  # as the ranks: sums over threads are in another order

IMAGES = 130  # three batches of features, the last one not full


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "resnet10t.pth"
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), path)
    return path


def fid(network: Path, **more: Any) -> list[str]:
    given = {"at_end": "true", "num_samples": IMAGES, "features": "timm:resnet10t", "features_weights": network,
             "reference_images": 140, **more}  # fmt: skip
    return [f"eval.fid.{name}={value}" for name, value in given.items()]


def test_values_are_the_tools_and_training_does_not_notice(network: Path, tmp_path: Path) -> None:
    plain = run_ranks(tmp_path / "plain", settings=SETTINGS)
    assert plain.codes == [0, 0], plain.out[-3000:]
    # 1437 images, batches of 32: four steps are 4 / 44 of an epoch
    measured = run_ranks(tmp_path / "run", settings=[*SETTINGS, *fid(network, every_epochs=4 / 44)])
    assert measured.codes == [0, 0], measured.out[-3000:]
    records = curve(tmp_path / "run")
    assert [r for r in records if "loss/total" in r] == curve(tmp_path / "plain")
    assert tensors(tmp_path / "run", 8) == tensors(tmp_path / "plain", 8)
    found = [r for r in records if "quality/frechet_distance" in r]
    assert [r["step"] for r in found] == [4, 8]  # at the end it had just been done
    assert set(found[0]) == {"step", "epoch", "quality/frechet_distance", "quality/precision", "quality/recall"}
    assert found[0]["quality/frechet_distance"] != found[1]["quality/frechet_distance"]
    with Image.open(tmp_path / "run" / "quality" / "step-00000008.png") as grid:
        assert grid.size == (8 * 66 + 2, 8 * (66 + 17) + 2)  # 64 digits of 64 pixels with frames and names
    for name, value in by_the_tools(tmp_path / "run", network).items():
        assert found[1][f"quality/{name}"] == pytest.approx(value, rel=1e-9)


def by_the_tools(run: Path, network: Path) -> dict[str, float]:
    """The same from the checkpoint, in one process; batches as two ranks make them, so that sums are the same."""
    loaded = load_weights(run, "ema", None, None)
    gpt, config = gpt_from_weights(loaded.config.model, loaded.gpt), loaded.config
    everything = torch.arange(IMAGES)
    labels = image_labels("random", range(10), 0, everything)
    tokens = torch.zeros(IMAGES, 64, dtype=torch.int64)
    for rank in range(2):
        mine = everything[rank::2]
        tokens[mine] = sample_tokens(gpt, labels[mine], mine, rules_of(config.sampling), 0)
    source = load_dataset(config.data, config.model, "cpu").train
    judge = PooledFeatures("resnet10t", network, torch.device("cpu"))
    chosen = np.linspace(0, len(source) - 1, 140).round().astype(np.int64)
    reference = reference_of(extract_features(source.decode(source.first_view(chosen)), judge))
    return evaluate_features(source.decode(tokens), reference, judge)


def test_a_reference_of_ones_own_and_fewer_images_than_ranks(network: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", arr_0=rng.integers(0, 256, (66, 8, 8, 3), dtype=np.uint8))
    settings = [*SETTINGS, "train.max_steps=1", "train.global_batch_size=30",
                *fid(network, num_samples=2, reference=tmp_path / "real.npz", metrics="[fid]")]  # fmt: skip
    values = []
    for world in (1, 3):
        ended = run_ranks(tmp_path / f"run{world}", settings=settings, world=world)
        assert ended.codes == [0] * world, ended.out[-3000:]
        values.append(curve(tmp_path / f"run{world}")[-1]["quality/frechet_distance"])
    assert values[1] == pytest.approx(values[0], rel=1e-4)
    judge = PooledFeatures("resnet10t", network, torch.device("cpu"))
    with np.load(tmp_path / "real.npz") as real:
        noise = extract_features(real["arr_0"], judge)
    assert values[0] > 10 * evaluate_features(rng.integers(0, 256, (66, 8, 8, 3), dtype=np.uint8),
                                              reference_of(noise), judge, ["fid"])["frechet_distance"]  # fmt: skip


def test_the_distance_chooses_the_checkpoint_that_stays(network: Path, tmp_path: Path) -> None:
    """It is measured at every checkpoint, the last one too, without an interval of its own; a start that goes on knows
    the best one of before.  The learning rate is so high that images get worse."""
    rules = [*SETTINGS, *fid(network, at_end="false", num_samples=20, reference_images=20, metrics="[fid]"),
             "checkpoint.every_steps=2", "checkpoint.keep_last=1", "checkpoint.keep_best=1", "ema.decay=0.5",
             "checkpoint.best_metric=eval.fid", "optimizer.lr=0.2"]  # fmt: skip
    for steps, *more in (["5"], ["7", "--resume", "auto"]):
        ended = run_ranks(tmp_path / "run", *more, settings=[*rules, f"train.max_steps={steps}"])
        assert ended.codes == [0, 0], ended.out[-3000:]
    name = "quality/frechet_distance"
    measured = {r["step"]: r[name] for r in curve(tmp_path / "run") if name in r}
    assert sorted(measured) == [2, 4, 5, 6, 7]
    best = min(measured, key=measured.__getitem__)
    assert best < 7
    assert list_steps(tmp_path / "run") == [best, 7]
    assert read_info(folder_of(tmp_path / "run", best)).metrics == {name: measured[best]}


def test_rules_that_cannot_choose() -> None:
    """A distance that nothing measures, or that is measured after the save."""
    given = ["checkpoint.every_steps=2", "checkpoint.keep_best=1", "checkpoint.best_metric=eval.fid"]
    hooks = "hooks=[log, checkpoint, eval-fid, stop]"
    weights = "eval.fid.features_weights=net.pth"
    for settings, said in (
        (given, "eval.fid.features_weights = null: give the file"),
        ([*given, weights, "eval.fid.metrics=[pr]"], "eval.fid.metrics = ['pr']: checkpoint.best_metric"),
        ([*given, weights, hooks], "needs eval-fid, and checkpoint after it"),
        ([*given[:2], "checkpoint.best_metric=eval.fit", "eval.loss.every_steps=2"], "did you mean 'eval.fid'?"),
    ):
        one_line(lambda settings=settings: load("digits-baseline", settings), said)
    assert load("digits-baseline", [*given, weights]).checkpoint.judged_by_fid
    scored = CheckpointConfig(best_metric="eval.fid")
    assert scored.score({"quality/frechet_distance": 2.0, "held_out/ntp_ema": 1.0}) == 2.0
    assert scored.score({"quality/fid": math.nan}) is None
    assert CheckpointConfig().score({"quality/fid": 2.0}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features_weights": "null"}, "eval.fid.features_weights = null: give the file with the weights of"),
        ({"features_weights": "/no/such.pth"}, "no such file"),
        ({"features": "timm:no_such_network"}, "no_such_network"),
        ({"features": "clip"}, "eval.fid.features = 'clip'"),
        ({"metrics": "[fid, sfid]"}, "'sfid' is not defined with timm:resnet10t"),
        ({"reference": "/no/such.npz"}, "/no/such.npz"),
    ],
)
def test_mistakes_are_heard_of_before_the_first_step(
    change: dict[str, str], message: str, network: Path, tmp_path: Path
) -> None:
    world = 2 if "metrics" in change else 1
    ended = run_ranks(tmp_path / "run", settings=[*SETTINGS, *fid(network, **change)], world=world)
    assert 2 in ended.codes
    said = [line for line in ended.out.splitlines() if line.startswith("mirai-ds: error: ")]
    assert any(message in line for line in said), ended.out
    assert "Traceback" not in ended.out
    assert not list_steps(tmp_path / "run")
