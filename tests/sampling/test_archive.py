"""`mirai-ds sample --num`: what is in the files, and that neither ranks nor batches nor earlier starts decide it."""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from mirai_ds.checkpoint.gpt_file import read_gpt_file
from mirai_ds.cli.main import main
from mirai_ds.config import ModelConfig
from mirai_ds.model import SamplingRules, gpt_from_weights, sample_tokens
from mirai_ds.model.rules import image_labels
from mirai_ds.runtime.disk import digest_of_file
from mirai_ds.runtime.distributed import World
from mirai_ds.sampling import draw_archive
from mirai_ds.sampling.archive import write_sample_archive
from mirai_ds.tokenizer import PatchCodebook, VQConfig, VQTokenizer
from tests.model import plain_gpt as plain
from tests.one_line import one_line
from tests.sampling.conftest import ALONE, content, request_of


@pytest.fixture(scope="module")
def drawn(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 random images with PNGs."""
    out = tmp_path_factory.mktemp("drawn") / "x.npz"
    said = draw_archive(request_of(tiny, out, png=True), ALONE)
    assert said is not None
    assert f"21 images of 8 pixels from {tiny / 'weights.pt'} (ema weights)" in said
    return out


def test_images_are_those_of_their_numbers(tiny: Path, drawn: Path) -> None:
    """Tokens, labels and pixels from the parts below: the model, the labels' rule, the codebook."""
    config = ModelConfig(size="custom", **plain.TINY)
    gpt = gpt_from_weights(config, read_gpt_file(tiny / "weights.pt", "ema").weights)
    indices = torch.arange(21)
    labels = image_labels("random", range(5), 0, indices)
    tokens = sample_tokens(gpt, labels, indices, SamplingRules(2.0), 0)
    with np.load(drawn.with_name("x.tokens.npz")) as kept:
        assert kept["tokens"].dtype == np.uint16
        assert np.array_equal(kept["tokens"], tokens.numpy())
        assert np.array_equal(kept["labels"], labels.numpy())
    with np.load(drawn) as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], PatchCodebook.load(tiny / "book.npz").decode(tokens))


def test_pictures_show_the_same(drawn: Path) -> None:
    with np.load(drawn) as archive:
        images = archive["arr_0"]
    names = sorted(path.name for path in drawn.with_name("x").iterdir())
    assert names == [f"{i:06d}.png" for i in range(21)]
    for i in (0, 20):
        assert np.array_equal(np.asarray(Image.open(drawn.with_name("x") / names[i])), images[i])
    sheet = np.asarray(Image.open(drawn.with_name("x.sheet.png")))
    assert np.array_equal(sheet[2:66:8, 2:66:8], images[0])  # enlarged to 64 pixels, in a frame of 2
    assert np.array_equal(sheet[2:66:8, 68:132:8], images[1])


def test_the_record_says_the_protocol(tiny: Path, drawn: Path) -> None:
    record = json.loads(drawn.with_name("x.npz.json").read_text())
    wanted = {
        "source": str(tiny / "weights.pt"), "weights": "ema", "num": 21, "policy": "random", "seed": 0,
        "cfg_scale": 2.0, "cfg_interval": -1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "image_size": 8,
        "image_size_eval": 8, "precision": "fp32", "batch": 4, "tokenizer": "patch-codebook",
        "tokenizer_digest": PatchCodebook.load(tiny / "book.npz").digest, "samples_sha256": digest_of_file(drawn),
    }  # fmt: skip
    assert {name: record[name] for name in wanted} == wanted
    assert not drawn.with_name("x.npz.work").exists()


@pytest.mark.parametrize(("world", "batch"), [(1, 3), (1, 32), (3, 4), (2, 5)])
def test_neither_ranks_nor_batch_decide(world: int, batch: int, tiny: Path, drawn: Path, tmp_path: Path) -> None:
    """Ranks one after the other, the main one last: it would wait for the others."""
    request = request_of(tiny, tmp_path / "x.npz", batch=batch, png=True, stall_timeout=1)
    if world > 1:
        with pytest.raises(Exception, match="blocks are missing and nobody has worked on them"):
            draw_archive(request, World(0, 0, world, 2))
    for rank in range(1, world):
        assert draw_archive(request, World(rank, 0, world, 2)) is None
    assert draw_archive(request, World(0, 0, world, 2)) is not None
    found, wanted = content(tmp_path), content(drawn.parent)
    assert found.keys() == wanted.keys()
    assert {n for n in wanted if found[n] != wanted[n]} == (set() if batch == 4 else {"x.npz.json"})


def test_more_images_begin_with_the_same(tiny: Path, drawn: Path, tmp_path: Path) -> None:
    """The last batch of 21 is cut from one that 23 have."""
    draw_archive(request_of(tiny, tmp_path / "y.npz", num=23), ALONE)
    with np.load(tmp_path / "y.npz") as more, np.load(drawn) as fewer:
        assert np.array_equal(more["arr_0"][:21], fewer["arr_0"])


def test_settings_change_what_is_drawn(tiny: Path, drawn: Path, tmp_path: Path) -> None:
    """Each arrives where it should; `raw` and a seed are other images too."""
    changes: list[dict[str, Any]] = [
        {"cfg_scale": 1.0}, {"cfg_interval": 3}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5}, {"seed": 1},
        {"weights": "raw"}, {"precision": "bf16"},
    ]  # fmt: skip
    with np.load(drawn) as archive:
        seen = [archive["arr_0"].tobytes()]
    for number, change in enumerate(changes):
        out = tmp_path / f"{number}.npz"
        draw_archive(request_of(tiny, out, **change), ALONE)
        with np.load(out) as archive:
            seen.append(archive["arr_0"].tobytes())
        record = json.loads(out.with_name(f"{out.name}.json").read_text())
        assert change.items() <= record.items()
    assert len(set(seen)) == len(seen)


def test_balanced_classes(tiny: Path, tmp_path: Path) -> None:
    draw_archive(request_of(tiny, tmp_path / "b.npz", num=12, policy="balanced", classes="3,0,4"), ALONE)
    with np.load(tmp_path / "b.tokens.npz") as kept:
        assert kept["labels"].tolist() == [3, 0, 4] * 4


def test_resized_images(tiny: Path, tmp_path: Path) -> None:
    """8 -> 4 pixels: two pixels' bicubic weights are (-3, 19, 19, -3) / 32 there, without antialias."""
    draw_archive(request_of(tiny, tmp_path / "r.npz", image_size=8, image_size_eval=4), ALONE)
    with np.load(tmp_path / "r.tokens.npz") as kept, np.load(tmp_path / "r.npz") as archive:
        whole = PatchCodebook.load(tiny / "book.npz").decode(torch.from_numpy(kept["tokens"].astype(np.int64)))
        found = archive["arr_0"]
    assert found.shape == (21, 4, 4, 3)
    weights = np.array([-3, 19, 19, -3]) / 32  # of the four pixels around the middle of pixels 3 and 4
    patch = whole[:, 1:5, 3:7].astype(float)  # pixel (1, 2): centres 2.5 and 4.5
    assert np.array_equal(found[:, 1, 2], np.rint(np.einsum("nhwc,h,w->nc", patch, weights, weights)).clip(0, 255))


def test_vq_images_are_resized_before_the_clamp() -> None:
    """As LlamaGen's sampler: interpolate the decoder's output, then trunc(clamp(127.5 x + 128))."""
    sizes = {"channels": 32, "z_channels": 32, "codebook_size": 64, "encoder_blocks": 1, "decoder_blocks": 1}
    config = VQConfig(multipliers=(1, 1, 1), **sizes)
    tokenizer = VQTokenizer.random(config)
    with torch.no_grad():
        tokenizer.model.decoder.conv_out.weight.mul_(30)  # beyond [-1, 1] here and there
    tokens = torch.randint(64, (2, 36), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = tokenizer.model.decode_codes(tokens)
    small = torch.nn.functional.interpolate(x, size=(16, 16), mode="bicubic", align_corners=False, antialias=False)
    wanted = (127.5 * small + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    found = tokenizer.decode(tokens, 16)
    assert np.array_equal(found, wanted)
    assert 0.05 < float((x.abs() > 1).float().mean()) < 0.95
    late = torch.nn.functional.interpolate(x.clamp(-1, 1), size=(16, 16), mode="bicubic")
    assert not np.array_equal(found, (127.5 * late + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())
    assert np.array_equal(tokenizer.decode(tokens, 24), tokenizer.decode(tokens))


def test_neither_threads_nor_batch_decide_a_networks_pixels(tiny: Path, tmp_path: Path) -> None:
    """A VQ network on one and on two threads, its images in batches of 4 and 5."""
    sizes = {"channels": 64, "z_channels": 64, "codebook_size": 48, "encoder_blocks": 1, "decoder_blocks": 2}
    network = VQTokenizer.random(VQConfig(multipliers=(1, 1, 2, 2), **sizes))
    torch.save({"model": network.model.state_dict()}, tmp_path / "vq.pt")
    seen = []
    for number, (batch, world) in enumerate([(4, ALONE), (5, ALONE), (4, World(0, 0, 1, 1))]):
        out = tmp_path / f"{number}.npz"
        draw_archive(request_of(tiny, out, num=10, batch=batch, tokenizer=tmp_path / "vq.pt"), world)
        seen.append(out.read_bytes())
    assert seen[0] == seen[1]
    assert seen[0] == seen[2]


def test_a_released_file(tiny: Path, drawn: Path, tmp_path: Path) -> None:
    """{"model", "optimizer", "steps", "args"} with an argparse.Namespace: the same images."""
    weights = read_gpt_file(tiny / "weights.pt", "ema").weights
    released = {"model": weights, "optimizer": {}, "steps": 7, "args": argparse.Namespace(gpt_model="GPT-B")}
    torch.save(released, tmp_path / "released.pt")
    draw_archive(request_of(tiny, tmp_path / "x.npz", source=tmp_path / "released.pt"), ALONE)
    assert (tmp_path / "x.npz").read_bytes() == drawn.read_bytes()


def test_finished_is_finished(tiny: Path, drawn: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in drawn.parent.rglob("*")}
    draw_archive(request_of(tiny, drawn, png=True), ALONE)
    assert {path: path.stat().st_mtime_ns for path in drawn.parent.rglob("*")} == before
    other = request_of(tiny, drawn, png=True, seed=3)
    one_line(lambda: draw_archive(other, ALONE), "was drawn with seed", "another --out")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"num": 22, "policy": "balanced"}, ["--num 22", "5 classes", "20 or 25"]),
        ({"image_size": 16}, ["--image-size 16", "16 tokens decode to 8", "--image-size-eval"]),
        ({"cuda_graphs": "on"}, ["--cuda-graphs on", "no CUDA"]),
        ({"classes": "0,9"}, ["--classes 0,9", "0..4"]),
        ({"top_p": 0.0}, ["--top-p 0.0"]),
        ({"out": Path("x.zip")}, ["--out x.zip", ".npz"]),
        ({"tokenizer": None}, ["--tokenizer"]),
    ],
)
def test_mistakes(change: dict[str, Any], parts: list[str], tiny: Path, tmp_path: Path) -> None:
    request = request_of(tiny, **{"out": tmp_path / "x.npz", **change})
    one_line(lambda: draw_archive(request, ALONE), *parts)
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_stays(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"mine")
    one_line(lambda: draw_archive(request_of(tiny, tmp_path / "x.npz"), ALONE), "x.npz: is in the way")
    assert (tmp_path / "x.npz").read_bytes() == b"mine"


def test_the_command_line(tiny: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a rank that a launcher started, with the option that the deepspeed command adds."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    call = ["sample", str(tiny / "weights.pt"), "--recipe", str(tiny / "recipe.yaml"), "--out", str(tmp_path / "x.npz"),
            "--local_rank=0", "--cfg", "2", "--tokenizer", str(tiny / "book.npz")]  # fmt: skip
    done = CliRunner().invoke(main, [*call, "--num", "21", "--batch", "4"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "x.npz").read_bytes() == drawn.read_bytes()
    for more, said in (
        (["--png"], "--png: has no meaning without --num"),
        (["--num", "3", "--per-class", "2"], "--per-class: has no meaning with --num"),
        (["--num", "3", "--ranks", "4"], "--ranks 4: this process is rank 0 of 1 already, says torchrun"),
        (["--patience", "9"], "--patience: has no meaning without --num"),
        (["--num", "3", "--patience", "9", "--stall-timeout", "9"], "--patience and --stall-timeout: are the old and"),
    ):
        wrong = CliRunner().invoke(main, [*call, *more])
        assert wrong.exit_code == 2
        assert said in wrong.output


def test_patience_is_the_old_name_of_stall_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, int]] = []
    monkeypatch.setattr("mirai_ds.sampling.draw_archive", lambda r, world: asked.append((r.stall_timeout, world.rank)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    note = "mirai-ds: --patience is now --stall-timeout; the old name still works\n"
    for rank, option, said in (
        ("0", ["--patience", "9"], note), ("1", ["--patience", "9"], ""), ("0", ["--stall-timeout", "8"], ""),
        ("0", [], ""),
    ):  # fmt: skip
        monkeypatch.setenv("RANK", rank)
        done = CliRunner().invoke(main, ["sample", str(tmp_path), "--num", "3", *option], catch_exceptions=False)
        assert (done.exit_code, done.output) == (0, said)
    assert asked == [(9.0, 0), (9.0, 1), (8.0, 0), (300.0, 0)]
    assert "--patience" not in CliRunner().invoke(main, ["sample", "--help"]).output


def test_an_archive_is_what_numpy_would_write(tmp_path: Path) -> None:
    """Batches of any size, none of them asked for before the last is written."""
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    for sizes in ([7], [3, 3, 1]):
        alive: list[int] = []

        def batches(sizes: list[int] = sizes, alive: list[int] = alive) -> Any:
            start = 0
            for size in sizes:
                alive.append(size)
                yield images[start : start + size]
                start += size

        path = tmp_path / f"{len(sizes)}.npz"
        assert write_sample_archive(path, batches(), images.shape) == digest_of_file(path)
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "3.npz").read_bytes()
    theirs = io.BytesIO()
    np.savez(theirs, images)
    with zipfile.ZipFile(theirs) as a, zipfile.ZipFile(tmp_path / "1.npz") as b:
        assert a.namelist() == b.namelist() == ["arr_0.npy"]
        assert a.read("arr_0.npy") == b.read("arr_0.npy")
        assert b.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED
    for wrong in ([images[:3]], [images, images], [images.astype(np.int16)], [images[:, :2]]):
        with pytest.raises(ValueError, match="archive of"):
            write_sample_archive(tmp_path / "w.npz", iter(wrong), images.shape)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.npz", "3.npz"]
