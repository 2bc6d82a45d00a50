"""Every file that `export` writes is read by every verb that takes one, as the weights that it holds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from mirai_ds.checkpoint.gpt_file import read_gpt_file
from mirai_ds.checkpoint.llamagen import write_llamagen
from mirai_ds.checkpoint.weights import load_weights
from mirai_ds.cli.main import main
from mirai_ds.config import SIZES, ModelConfig, RunConfig
from mirai_ds.config.model_config import Size
from mirai_ds.runtime.disk import replacing
from mirai_ds.runtime.weight_files import write_safetensors
from mirai_ds.tokenizer import PatchCodebook
from mirai_ds.train.build import initial_weights
from mirai_ds.train.teacher import pretrained
from tests.model import plain_gpt as plain
from tests.one_line import one_line

KINDS = {"raw": ("raw",), "ema": ("ema",), "both": ("raw", "ema"), None: ("raw", "ema")}
MODEL = ModelConfig(size="custom", **plain.TINY)


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    result = cli(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return sorted(found) == sorted(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.fixture(params=["x.pt", "x.safetensors"])
def suffix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS, ids=str)
def exported(request: pytest.FixtureRequest, suffix: str, tiny: Path, tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """A file of a format and choice of weights, and which it must hold."""
    out = tmp_path / suffix
    choice = [] if request.param is None else ["--weights", request.param]
    said = done("export", tiny / "weights.pt", "--recipe", tiny / "recipe.yaml", "--out", out, *choice)
    assert f"of {request.param or 'both'} weights, step 7" in said
    return out, KINDS[request.param]


def test_every_verb_reads_every_export(exported: tuple[Path, tuple[str, ...]], tiny: Path, tmp_path: Path) -> None:
    file, held = exported
    sets = {kind: read_gpt_file(tiny / "weights.pt", kind).weights for kind in ("raw", "ema")}  # type: ignore[arg-type]
    default = "ema" if "ema" in held else "raw"
    np.savez(tmp_path / "t.npz", tokens=np.arange(32).reshape(2, 16) % 48)
    for kind in ("raw", "ema", None):
        choice = [] if kind is None else ["--weights", kind]
        verbs: dict[str, list[object]] = {
            "grid": ["sample", file, "--per-class", 1, "--classes", "0,3", "--out", tmp_path / "grid"],
            "num": ["sample", file, "--num", 3, "--tokenizer", tiny / "book.npz", "--out", tmp_path / f"{kind}.npz"],
            "map": ["map", file, "--image", tmp_path / "t.npz", "--method", "pca", "--out", tmp_path / "m.png"],
            "export": ["export", file, "--out", tmp_path / f"again-{kind}.pt"],
        }
        for verb, arguments in verbs.items():
            result = cli(*arguments, *choice)
            if kind not in (*held, None):
                assert (verb, result.exit_code) == (verb, 2)
                assert f"has no {kind!r} weights, only {held[0]!r}" in result.output
                continue
            assert result.exit_code == 0, (verb, result.output)
            if verb == "export":
                again = tmp_path / f"again-{kind}.pt"
                for one in held if kind is None else [kind]:
                    assert same(read_gpt_file(again, one).weights, sets[one])
            else:
                assert f"{kind or default} weights" in result.output or f"({kind or default})" in result.output
    loaded = load_weights(file)
    assert (loaded.kind, loaded.held, loaded.step, loaded.config.model) == (default, held, 7, MODEL)
    assert same(loaded.gpt, sets[default])
    initial = RunConfig.model_validate({"model": MODEL.model_dump(), "train": {"init_from": str(file)}})
    assert same(initial_weights(initial, {}), sets[held[0]])
    frozen = {"method": "mirai-e", "teacher_weights": str(file)}
    weights, origin = pretrained(RunConfig.model_validate({"model": MODEL.model_dump(), "foresight": frozen}))
    assert same(weights, sets[default])
    assert origin == f"{file} ({default} weights)"


def test_images_of_an_export_are_those_of_what_it_came_from(tiny: Path, tmp_path: Path) -> None:
    choice = ["--per-class", 1, "--classes", "0,3", "--cfg", 2]
    done("sample", tiny / "weights.pt", "--recipe", tiny / "recipe.yaml", *choice, "--tokenizer", tiny / "book.npz",
         "--out", tmp_path / "a")  # fmt: skip
    done("export", tiny / "weights.pt", "--recipe", tiny / "recipe.yaml", "--out", tmp_path / "x.safetensors")
    done("sample", tmp_path / "x.safetensors", *choice, "--tokenizer", tiny / "book.npz", "--out", tmp_path / "b")
    a, b = (np.load(tmp_path / name / "tokens.npz") for name in "ab")
    assert np.array_equal(a["tokens"], b["tokens"])
    assert np.array_equal(a["images"], b["images"])


def test_what_a_file_says_of_its_model_is_not_overruled(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    done("export", tiny / "weights.pt", "--recipe", tiny / "recipe.yaml", "--out", file)
    text = (tiny / "recipe.yaml").read_text()
    (tmp_path / "r.yaml").write_text(text.replace("n_head: 4", "n_head: 2"))
    one_line(lambda: load_weights(file, recipe=str(tmp_path / "r.yaml")), "n_head = 4", "has 2", "model.n_head")
    one_line(lambda: load_weights(file, block_size=64), "16 tokens an image, not 64", "--block-size")
    one_line(lambda: load_weights(file, step=3), "--step 3", "is a file")
    one_line(lambda: load_weights(tmp_path, recipe="digits-baseline"), "--recipe digits-baseline", "is a run")
    heads = RunConfig.model_validate({"model": {**MODEL.model_dump(), "n_head": 2}, "train": {"init_from": str(file)}})
    one_line(lambda: initial_weights(heads, {}), "n_head = 4")


@pytest.fixture
def released(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of which only shapes tell, of a size that has a name."""
    monkeypatch.setitem(SIZES, "GPT-T", Size(64, 3, 4))
    sets = {name: read_gpt_file(tiny / "weights.pt", kind).weights for name, kind in (("model", "raw"), ("ema", "ema"))}  # type: ignore[arg-type]
    torch.save(sets, tmp_path / "released.pt")
    return tmp_path / "released.pt"


def test_a_released_file_has_no_data(released: Path, tmp_path: Path) -> None:
    """The digits, which a recipe trains on that names nothing else, are not its, also where their codes would fit."""
    said = done("sample", released, "--block-size", 16, "--per-class", 1, "--classes", "0", "--out", tmp_path / "o")
    assert "(ema weights)" in said
    assert "no pictures: a weights file does not say what shows its tokens; give --tokenizer FILE" in said
    assert np.load(tmp_path / "o" / "tokens.npz")["tokens"].shape == (1, 16)
    num = cli("sample", released, "--num", 2, "--block-size", 16, "--out", tmp_path / "x.npz")
    assert num.exit_code == 2
    assert "--num: a weights file does not say what shows its tokens" in num.output
    held = cli("map", released, "--block-size", 64, "--out", tmp_path / "m.png")
    assert held.exit_code == 2
    assert "no held-out samples at hand" in held.output
    told = read_gpt_file(Path(done("export", released, "--out", tmp_path / "clean.pt").split(": ")[0])).model
    assert (told["size"], told["n_head"], told["vocab_size"]) == ("GPT-T", 4, 48)
    assert "block_size" not in told  # nobody has said
    assert load_weights(tmp_path / "clean.pt", block_size=64).config.model.block_size == 64


def test_a_tokenizer_that_does_not_fit_is_refused_before_drawing(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PatchCodebook(np.zeros((17, 2, 2, 3), np.uint8)).save(tmp_path / "book.npz")
    monkeypatch.setattr("mirai_ds.sampling.grid.draw_in_batches", lambda *a: pytest.fail("drew"))
    wrong = cli("sample", released, "--block-size", 16, "--tokenizer", tmp_path / "book.npz", "--out", tmp_path / "o")
    assert wrong.exit_code == 2
    assert "--tokenizer: has 17 codes, the model 48" in wrong.output
    (tmp_path / "r.yaml").write_text(
        f"model: {{size: custom, {', '.join(f'{k}: {v}' for k, v in plain.TINY.items())}}}\n"
    )
    leaked = cli("sample", released, "--recipe", tmp_path / "r.yaml", "--out", tmp_path / "o")
    assert leaked.exit_code == 2
    assert "the data's codebook: has 17 codes, the model 48" in leaked.output
    assert not (tmp_path / "o").exists()


def test_raw_only_and_both(tiny: Path, tmp_path: Path) -> None:
    write_llamagen(tmp_path / "raw.pt", read_gpt_file(tiny / "weights.pt").weights)
    both = cli("export", tmp_path / "raw.pt", "--recipe", tiny / "recipe.yaml", "--weights", "both", "--out", "x.pt")
    assert both.exit_code == 2
    assert "--weights both:" in both.output
    assert "has 'raw' weights only" in both.output


def test_heads_are_kept_where_they_are_asked_for(tiny: Path, tmp_path: Path) -> None:
    gpt, heads = read_gpt_file(tiny / "weights.pt").weights, plain.ruled(plain.head_shapes(0, 64, 8, 64), seed=3)
    torch.save({"module": {**gpt, **heads}}, tmp_path / "h.pt")
    for more, wanted in (([], gpt), (["--projectors"], {**gpt, **heads})):
        done("export", tmp_path / "h.pt", "--recipe", tiny / "recipe.yaml", "--out", tmp_path / "x.pt", *more)
        assert same(read_gpt_file(tmp_path / "x.pt").weights, wanted)
    initial = RunConfig.model_validate({"model": MODEL.model_dump(), "train": {"init_from": str(tmp_path / "x.pt")}})
    assert same(initial_weights(initial, heads), {**gpt, **heads})
    assert same(initial_weights(initial, {}), {**gpt, **heads})  # a run without heads takes none of them
    narrow = plain.ruled(plain.head_shapes(0, 64, 48, 64), seed=3)
    one_line(
        lambda: initial_weights(initial, narrow), "alignment heads are not this run's", "(8, 64) there and (48, 64)"
    )


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
        write_llamagen(tmp_path / "b.safetensors", {"a": torch.zeros(2)})
        write_llamagen(tmp_path / "c.pt", {"a": torch.zeros(2)})
        with replacing(tmp_path / "d") as part:
            part.write_text("d")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}
