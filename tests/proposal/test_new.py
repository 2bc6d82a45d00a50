"""A recipe for a folder of images: what is chosen and why, odd folders, and the commands, given as they are printed."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mirai_ds.config import RunConfig, load
from mirai_ds.planning.devices import GIB, Device
from mirai_ds.planning.memory import predict
from mirai_ds.proposal.choices import WIDTHS, choose_batch, choose_view, choose_width
from mirai_ds.proposal.folder import FolderFacts, look
from mirai_ds.proposal.machine import Machine, largest_micro_batch, seconds_a_step
from mirai_ds.proposal.new import new_run
from mirai_ds.tokenizer import PatchCodebook
from tests.extract.conftest import cut_photographs
from tests.one_line import one_line
from tests.warm_start import warm_mirai_ds

LAPTOP = Machine(1, Device("cpu:8", 8.0))
SERVER = Machine(8, Device("A card", 79.0))
PHOTO = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray = PHOTO, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pieces of photographs, 40 to 200 pixels a side, in two classes."""
    return cut_photographs(tmp_path_factory.mktemp("photos") / "my photos", each=20)


def new(images: Path, name: str = "mine", size: int | None = 16, **more: Any) -> str:
    settings = {"tokenizer": None, "hours": None, "steps": 6, "machine": LAPTOP, **more}
    return new_run(name, images, size=size, **settings)


def facts(count: int, side: int, classes: int = 2, grey: bool = False) -> FolderFacts:
    names = [str(i) for i in range(classes)]
    each = [count // classes] * classes
    return FolderFacts(Path("p"), count, names, each, 3, 0, 0, [(side, side + 9)] * 3, grey)


def test_a_folder_to_a_sheet_by_the_printed_commands(photos: Path, here: Path) -> None:
    """Four of them with `new` itself, as they stand in the output."""
    done = warm_mirai_ds("new", "mine", "--images", str(photos), "--size", "16", "--steps", "6", cwd=here)
    assert done.code == 0, done.out + done.err
    commands = [line.strip() for line in done.out.splitlines() if line.startswith("  mirai-ds ")]
    assert [shlex.split(line)[1] for line in commands] == ["extract", "train", "sample", "evaluate"]
    for line in commands[:3]:
        ended = warm_mirai_ds(*shlex.split(line)[1:], cwd=here, env={"OMP_NUM_THREADS": "1"})
        assert ended.code == 0, line + ended.out + ended.err
    config = load(str(here / "mine.yaml"))
    assert (config.train.global_batch_size, config.model.block_size, config.model.num_classes) == (4, 16, 2)
    assert (here / "runs/mine/outcome").read_text() == "finished at step 6\n"
    with np.load(here / "samples/mine.npz") as drawn:
        assert drawn["arr_0"].shape == (1000, 16, 16, 3)
    with Image.open(here / "samples/mine.sheet.png") as sheet:  # 100 images of 16 pixels four times as large, captions
        assert sheet.size == (10 * 66 + 2, 10 * (66 + 17) + 2)
    assert not list(photos.glob("*.npz"))


def test_what_the_recipe_says(photos: Path, here: Path) -> None:
    said = new(photos)
    text = (here / "mine.yaml").read_text()
    config = load("mine.yaml")
    book = PatchCodebook.load(here / "mine.codebook.npz")
    # 40 images of 4 x 4 patches: 640, enough for 20 codes by 32 patches each; the power of two below is 16.
    assert (book.vocab_size, book.downsampling, book.channels) == (16, 4, 3)
    model = config.model
    assert (model.vocab_size, model.num_classes, model.block_size, model.width, model.depth) == (16, 2, 16, 128, 6)
    assert (config.data.path, config.data.held_out_fraction) == ("stores/mine", 0.1)
    # 36 training images in batches of 4: nine steps an epoch.
    assert config.train.epochs == pytest.approx(6 / 9)
    assert "# 6 steps of 4 images, 9 an epoch" in text
    assert config.train.micro_batch_size == 4
    assert (config.checkpoint.keep_best, config.checkpoint.best_metric) == (1, "held_out/ntp_ema")
    assert config.name == "mine"
    assert "40 in 2 classes of 20" in said
    assert f"--images '{photos}'" in said
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert comments[0].startswith("# Mirai-E on ")
    assert sum(f"# {what}:" in text for what in ("tokens", "train", "sample")) == 3


def test_names_that_yaml_would_take_for_something_else(photos: Path, here: Path) -> None:
    for name in ("2026-01-31", "12", "null", "1e3"):
        new(photos, name)
        assert load(f"{name}.yaml").name == name


def test_nothing_is_overwritten(photos: Path, here: Path) -> None:
    new(photos)
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    one_line(lambda: new(photos, steps=9), "mine.yaml: is there already", "choose another name")
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before
    (here / "mine.yaml").unlink()
    one_line(lambda: new(photos), "mine.codebook.npz: is there already")
    (here / "run").mkdir()
    (here / "a.yaml").symlink_to(here / "run" / "nowhere")
    one_line(lambda: new(photos, "a"), "a.yaml: is there already")
    (here / "runs" / "b").mkdir(parents=True)
    (here / "runs" / "b" / "metrics.jsonl").touch()
    one_line(lambda: new(photos, "b"), "runs/b: already holds a run")
    for name in ("../up", "", "a b", "-x"):
        one_line(lambda name=name: new(photos, name), "is no name of a run")
    assert not (here / "run" / "nowhere").exists()


def test_odd_folders_are_answered_in_one_line(here: Path) -> None:
    images = here / "images"
    one_line(lambda: new(images), "no such folder")
    images.mkdir()
    (images / "notes.txt").write_text("no image")
    one_line(lambda: new(images), "no class folders and no images")
    save(images / "1.png")
    one_line(lambda: new(images), "holds one image that can be read", "two")
    (images / "1.png").write_bytes(b"broken")
    one_line(lambda: new(images), "not one of 1 images can be read; 1.png:")
    save(images / "1.png", np.full((9, 9, 3), 7, np.uint8))
    shutil.copy(images / "1.png", images / "2.png")
    one_line(lambda: new(images, size=8), "one plain colour")
    (images / "a").mkdir()
    save(images / "a" / "1.png")
    (images / "a" / "again").symlink_to(images)
    one_line(lambda: new(images), "leads back to", "remove the link")
    assert sorted(path.name for path in here.iterdir()) == ["images"]


def test_a_flat_folder_of_all_kinds(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No classes, several sizes, grey and colour, a broken one, no images, an animation's ending, turned ones."""
    images = here / "images"
    for n in range(30):
        save(images / f"{n}.png", np.roll(PHOTO, n, axis=1)[: 20 + n])
    save(images / "grey.png", PHOTO[..., 0])
    turned = Image.Exif()
    turned[0x0112] = 6
    save(images / "turned.jpg", exif=turned)
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    (images / "notes.txt").write_text("no image")
    (images / ".DS_Store").write_bytes(b"x")
    said = new(images)
    config = load("mine.yaml")
    assert (config.model.num_classes, config.sampling.cfg_scale) == (1, 1.0)  # one class: nothing to guide
    assert "33 in one class" in said
    assert "1 of 33 looked at cannot be read" in said
    assert "1 of 33 photographs, by their tag" in said
    assert "--upright" in said
    # 33 names less the broken one, less a tenth held out, by twos
    assert "14 an epoch" in (here / "mine.yaml").read_text()


def test_grey_images_and_idx_files(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(4):
        save(here / "grey" / "a" / f"{n}.png", np.roll(PHOTO[..., 0], n, axis=0))
    said = new(here / "grey")
    assert "--crops one " in said
    assert PatchCodebook.load(here / "mine.codebook.npz").channels == 1
    config = load("mine.yaml")
    # Four images: none is held out, so nothing is measured on them and no checkpoint is the best.
    assert (config.data.held_out_fraction, config.eval.loss.every_steps, config.checkpoint.keep_best) == (0, None, 0)
    fashion = Path("/usr/share/datasets/fashion-mnist")
    if fashion.is_dir():
        found, images = look(fashion)
        assert (found.count, len(found.classes), found.short_side, found.grey) == (60_000, 10, 28, True)
        assert len(images.names) == 60_000


@pytest.mark.parametrize(("count", "side", "grey", "gpu", "wanted"), [
    # (side, patch, crops, codes): never larger than the images; ten crops want a tenth more pixels
    (400, 300, False, False, (32, 4, "ten", 512)), (400, 300, False, True, (64, 4, "ten", 512)),
    (400, 35, False, False, (32, 4, "ten", 512)), (400, 34, False, False, (32, 4, "flip", 512)),
    (60_000, 28, True, False, (28, 4, "one", 512)), (100, 9, True, False, (8, 2, "one", 32)),
    (100, 3, False, False, (8, 2, "flip", 32)), (2, 300, False, False, (32, 4, "ten", 16)),
])  # fmt: skip
def test_views(count: int, side: int, grey: bool, gpu: bool, wanted: tuple[int, int, str, int]) -> None:
    assert astuple(choose_view(facts(count, side, grey=grey), None, None, gpu)) == wanted


def test_the_users_tokenizer_decides(photos: Path, here: Path) -> None:
    rng = np.random.default_rng(0)
    book = PatchCodebook(rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8))
    book.save(here / "own.npz")
    view = choose_view(facts(400, 300), book, None, False)
    assert (view.side, view.patch, view.codes) == (256, 8, None)
    said = new(photos, tokenizer=here / "own.npz")
    assert (load("mine.yaml").model.vocab_size, load("mine.yaml").model.block_size) == (9, 4)
    assert not (here / "mine.codebook.npz").exists()
    assert f"--tokenizer {here}/own.npz --size 16" in said
    one_line(lambda: new(photos, "b", size=20, tokenizer=here / "own.npz"), "--size 20: must be a multiple of 8")
    assert not (here / "b.yaml").exists()


def test_widths_and_batches_follow_the_number_of_images() -> None:
    view = choose_view(facts(400, 300), None, 32, False)  # 64 tokens
    # The first widths have 1.2, 6.5, 26 and 86 million parameters in their blocks.
    for count, wanted in ((400, 128), (100_000, 128), (102_000, 256), (500_000, 512), (1_400_000, 768)):
        assert WIDTHS[choose_width(facts(count, 300), view)].dim == wanted
    # An eighth of nine tenths: 45, 2250, 2250 and 112.
    for count, wide, ranks, wanted in ((400, False, 1, 32), (20_000, False, 1, 64), (20_000, True, 1, 256),
                                       (1000, False, 3, 48), (2, False, 1, 1)):  # fmt: skip
        assert choose_batch(facts(count, 300), wide, ranks) == wanted


def test_the_length_follows_the_budget(photos: Path, here: Path) -> None:
    """Nine steps an epoch: four fifths of an hour at 1.6 s are 1800 steps, or 200 epochs; nobody gets more than 300."""
    said = new(photos, "a", steps=None, hours=1.0, pace=lambda config, machine: 1.6)
    assert load("a.yaml").train.epochs == 200
    assert "1.6 s a step, measured here" in said
    new(photos, "b", steps=None, hours=10.0, pace=lambda config, machine: 1.6)
    assert load("b.yaml").train.epochs == 300
    assert "  warmup_epochs: 15.0 " in (here / "b.yaml").read_text()


def test_less_time_and_less_memory_make_smaller_models(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images that deserve a width of 256: at three epochs in the time it stays, below it goes down."""
    monkeypatch.setattr("mirai_ds.proposal.new.choose_width", lambda facts, view: 1)
    images = cut_photographs(here / "p", each=20)

    def seconds(epochs: float) -> Any:
        return lambda config, machine: 0.8 * 3600 / (9 * epochs) if config.model.width == 256 else 1.0

    new(images, "a", steps=None, hours=1.0, pace=seconds(3.1))
    assert load("a.yaml").model.width == 256
    new(images, "b", steps=None, hours=1.0, pace=seconds(2.9))
    assert load("b.yaml").model.width == 128
    small = load("b.yaml")
    room = Machine(1, Device("cpu:1.2", 1.2))
    assert largest_micro_batch(load("a.yaml"), room) is None
    one_line(lambda: new(images, "c", machine=Machine(1, Device("cpu:0.5", 0.5))), "not one image fits")
    assert largest_micro_batch(small, LAPTOP) == 4
    assert not (here / "c.yaml").exists()


def test_the_micro_batch_is_the_planners(photos: Path, here: Path) -> None:
    """On eight cards each has an eighth of the batch; where less fits, the largest divisor that does."""
    new(photos, machine=SERVER)
    data = yaml.safe_load((here / "mine.yaml").read_text())
    assert (data["train"]["precision"], data["deepspeed"]) == ("bf16-autocast", "zero2")
    assert (data["train"]["global_batch_size"], data["train"]["micro_batch_size"]) == (8, 1)
    config = load("mine.yaml", ["train.global_batch_size=512", "train.micro_batch_size=null", "model.dim=512",
                                "model.n_head=8"])  # fmt: skip

    def needs(micro: int) -> float:
        one: RunConfig = config.model_copy(
            update={"train": config.train.model_copy(update={"micro_batch_size": micro})}
        )
        return predict(one, 8).peak.total

    tight = (needs(16) * 1.05 + GIB) / 0.95 / GIB + 0.01  # the allowances of a GPU with others, and its margin
    assert largest_micro_batch(config, Machine(8, Device("A card", tight))) == 16
    assert largest_micro_batch(config, SERVER) == 64
    few = load("mine.yaml", ["train.global_batch_size=1", "train.micro_batch_size=null"])
    assert largest_micro_batch(few, SERVER) == 1


def test_a_step_is_timed(photos: Path, here: Path) -> None:
    new(photos)
    assert 0 < seconds_a_step(load("mine.yaml"), LAPTOP) < 600
