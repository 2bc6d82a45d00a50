"""From a folder of photographs to training, as a user does it: extract codebook, codes and images, then E and I."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch

from tests.extract.conftest import cut_photographs
from tests.train.conftest import numbers, small_train
from tests.warm_start import Done, warm_mirai_ds


class Shop(NamedTuple):
    """What the commands made."""

    photos: Path
    codes: Path
    images: Path
    encoder: Path


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    root = tmp_path_factory.mktemp("shop")
    photos = cut_photographs(root / "photos", each=40)
    (photos / "flower" / "broken.jpg").write_bytes(b"not a picture")
    book, codes, images = root / "book.npz", root / "codes", root / "images"
    commands = (
        ("codebook", "--images", photos, "--size", "32", "--patch", "4", "--codes", "64", "--out", book),
        ("codes", "--images", photos, "--tokenizer", book, "--size", "32", "--out", codes, "--processes", "2",
         "--block", "16"),
        ("images", "--images", photos, "--size", "32", "--out", images, "--block", "32"),
    )  # fmt: skip
    said = []
    for command in commands:
        done = warm_mirai_ds("extract", *map(str, command))
        assert done.code == 0, done.out + done.err
        said.append(done.out.strip().splitlines()[-1])
    assert said[0].startswith(f"{book}: 64 patches of 4x4x3 from 80 images (1 more could not be read), ")
    assert said[1] == (
        f"{codes}: 80 images x 10 views x 64 tokens; 1 could not be read, 0 were converted: see problems.jsonl"
    )
    assert "80 images" in said[2]
    assert "1 could not be read" in said[2]
    torch.manual_seed(0)
    weights = root / "encoder.pth"
    torch.save(timm.create_model("test_vit", num_classes=0, img_size=128).state_dict(), weights)
    return Shop(photos, codes, images, weights)


def train(shop: Shop, run: Path, foresight: str, *more: str, options: tuple[str, ...] = ()) -> Done:
    settings = [
        "model={size: custom, dim: 32, n_layer: 3, n_head: 2, vocab_size: 64, num_classes: 2, block_size: 64}",
        f"data={{source: store, path: {shop.codes}}}", f"foresight={{{foresight}}}", "train.global_batch_size=16",
        "train.max_steps=8", "logging.every_steps=1", "checkpoint.at_end=false", "eval.classifier.enabled=false",
        "eval.loss.at_end=false", "eval.loss.every_steps=null", *more,
    ]  # fmt: skip
    return small_train(run, *options, recipe="digits-baseline", overrides=settings)


def mirai_i(shop: Shop) -> str:
    return f"method: mirai-i, projector_dim: 32, encoder: {{name: test_vit, weights: {shop.encoder}}}"


@pytest.fixture(scope="session")
def with_image_store(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "packed"
    done = train(shop, run, mirai_i(shop), f"data.images={shop.images}", "data.workers=1", "sampling.at_end=true")
    assert done.code == 0, done.out[-2000:] + done.err[-3000:]
    return run


def test_mirai_i_trains_from_stores(with_image_store: Path) -> None:
    found = numbers(with_image_store)
    assert [r["step"] for r in found] == list(range(1, 9))
    cosine = [r["cosine/head1_down0_right0"] for r in found]
    assert cosine[-1] - cosine[0] > 0.03
    assert found[-1]["loss/ntp"] < found[0]["loss/ntp"]
    assert list((with_image_store / "samples").glob("*.png"))  # the store brings its codebook


def test_a_store_without_images_is_one_line(shop: Shop, tmp_path: Path) -> None:
    done = train(shop, tmp_path / "run", mirai_i(shop))
    assert done.code == 2
    assert done.err.startswith("mirai-ds: error: ")
    assert "data.images = null: foresight.method = 'mirai-i' watches images; give an image store" in done.err
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.exhaustive
def test_original_files_give_the_same_run(shop: Shop, with_image_store: Path, tmp_path: Path) -> None:
    """No worker, the JPEGs themselves: the same numbers to the last digit."""
    done = train(shop, tmp_path / "run", mirai_i(shop), f"data.images={shop.photos}", "data.workers=0")
    assert done.code == 0, done.err[-3000:]
    wanted = numbers(with_image_store)
    assert numbers(tmp_path / "run") == wanted


@pytest.mark.matrix
def test_a_file_lost_during_training_stops_every_rank_with_one_line(shop: Shop, tmp_path: Path) -> None:
    """Also where only the second rank meets it."""
    copy = tmp_path / "photos"
    copy.mkdir()
    for path in shop.photos.iterdir():
        (copy / path.name).mkdir()
        for file in path.iterdir():
            os.link(file, copy / path.name / file.name)
    for place, file in enumerate(sorted((copy / "china").iterdir())):
        if place not in (0, 39):  # those are looked for at the start
            file.unlink()
    done = train(shop, tmp_path / "run", mirai_i(shop), f"data.images={copy}", "data.workers=1")
    assert done.code != 0
    said = [line for line in done.err.splitlines() if line.startswith("mirai-ds: error:")]
    assert said
    assert all("cannot be opened (No such file" in line for line in said)
    assert "Traceback" not in done.err


@pytest.mark.exhaustive
def test_mirai_e_trains_from_a_store_and_samples_are_shown(shop: Shop, tmp_path: Path) -> None:
    run = tmp_path / "run"
    method = "method: mirai-e, projector_dim: 32, warmup_epochs: 0.5"
    done = train(shop, run, method, "data.held_out_fraction=0.2", "eval.loss.at_end=true", "checkpoint.at_end=true")
    assert done.code == 0, done.err[-3000:]
    found = numbers(run)
    assert found[-1]["held_out/ntp_raw"] < 4.2  # ln 64 = 4.16 untrained; with 8 steps hardly less
    assert "cosine/head3_down1_right0" in found[-2] | found[-1]
    drawn = warm_mirai_ds("sample", str(run), "--per-class", "2")
    assert drawn.code == 0, drawn.err
    assert drawn.out.strip().endswith("tokens.npz and grid.png")
