"""Models in memory and model folders: what they give equals what the run measured and what the verbs draw."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

import mirai_ds as m
from mirai_ds.checkpoint.weights import load_weights
from mirai_ds.cli.main import main
from mirai_ds.config import load
from mirai_ds.library.export import public_recipe
from mirai_ds.train.build import initial_weights
from mirai_ds.train.teacher import pretrained
from tests.library.foreign import PAGE
from tests.one_line import one_line
from tests.train.conftest import records


def cli(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def model(finished: Path) -> m.ImageModel:
    return m.ImageModel.from_pretrained(finished)


@pytest.fixture(scope="module")
def folder(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run exported as a model's folder, with its heads."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("export") / "run")
    out = run.with_name("digits")
    (run / "evaluations").mkdir()
    scores = {"fid": 12.5, "num_samples": 500, "reference": {"name": "held-out"}, "protocol": {"cfg_scale": 1.5}}
    (run / "evaluations/end.json").write_text(json.dumps(scores))
    said = cli("export", run, "--format", "hf", "--projectors", "--out", out)
    assert said == f"{out}: 43 tensors of ema weights, step 66, and a model card\n"
    return out


def test_the_loss_is_what_the_run_measured(finished: Path, model: m.ImageModel) -> None:
    tokens, labels = model.examples(10_000)
    measured = [line["held_out/ntp_ema"] for line in records(finished) if "held_out/ntp_ema" in line]
    assert model.loss(tokens, labels) == pytest.approx(measured[-1], rel=1e-6)
    raw = m.ImageModel.from_pretrained(finished, weights="raw", step=33)
    at_33 = [
        line["held_out/ntp_raw"] for line in records(finished) if line["step"] == 33 and "held_out/ntp_raw" in line
    ]
    assert raw.loss(tokens, labels) == pytest.approx(at_33[0], rel=1e-6)
    trained_on, _ = model.examples(10_000, held_out=False)
    assert len(trained_on) + len(tokens) == 1797


def test_features_are_the_network_s(model: m.ImageModel) -> None:
    tokens, labels = model.examples(3)
    kept: list[Tensor] = []
    handle = model.gpt.layers[1].register_forward_hook(lambda _, __, out: kept.append(out))
    model.gpt(tokens, labels)
    handle.remove()
    assert torch.allclose(model.features(tokens, labels, slots="all"), kept[0], atol=1e-6)  # block 2, the aligned one
    assert torch.allclose(model.features(tokens, labels), kept[0][:, 1:], atol=1e-6)
    assert torch.allclose(model.features(tokens, labels, 2, "predict"), kept[0][:, :-1], atol=1e-6)
    one_line(lambda: model.features(tokens, labels, 4), "layer 4: the model has blocks 1..3")


def test_alignment_is_the_run_s_rule_by_hand(finished: Path, model: m.ImageModel) -> None:
    """The authors' rule: a head's flat shift, the class slot too, the sum over heads of 2 * -cosine."""
    student = m.ImageModel.from_pretrained(finished, weights="raw")
    tokens, labels = model.examples(4)
    target = model.features(tokens[:, :-1], labels, slots="all")
    loss, cosines = student.alignment(tokens, labels, target)
    states = student.features(tokens[:, :-1], labels, slots="all")
    assert student.projectors is not None
    for k, (head, shift) in enumerate(zip(student.projectors, (0, 1, 8), strict=True)):
        projected = head(states)
        pairs = [(0, 0)] + [(slot, slot + shift) for slot in range(1, 64 - shift)]
        each = [torch.cosine_similarity(projected[:, a], target[:, b], dim=-1).mean() for a, b in pairs]
        assert cosines[k] == pytest.approx(float(torch.stack(each).mean()), abs=1e-5)
    assert loss == pytest.approx(-2 * sum(cosines), abs=1e-5)


def test_samples_are_those_of_the_command(finished: Path, model: m.ImageModel, tmp_path: Path) -> None:
    cli("sample", finished, "--seed", 3, "--cfg", 2.0, "--per-class", 2, "--classes", "4,1", "--out", tmp_path)
    drawn = np.load(tmp_path / "tokens.npz")
    samples = model.sample([4, 1], per_class=2, seed=3, cfg_scale=2.0)
    assert samples.images is not None
    assert np.array_equal(samples.tokens, drawn["tokens"])
    assert samples.labels.tolist() == [4, 4, 1, 1]
    assert np.array_equal(samples.images, drawn["images"])
    samples.save(tmp_path / "sheet.png")
    shown = samples._repr_png_()
    assert shown is not None
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown))), np.asarray(Image.open(tmp_path / "sheet.png")))
    assert np.array_equal(np.asarray(samples.sheet()), np.asarray(Image.open(tmp_path / "grid.png")))


def test_a_model_folder_is_the_model(folder: Path, model: m.ImageModel) -> None:
    again = m.ImageModel.from_pretrained(folder)
    assert (again.step, again.weights, again.config.name) == (66, "ema", "digits-mirai-e")
    assert again.config.model == model.config.model
    assert again.config.foresight == model.config.foresight
    state = model.gpt.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.gpt.state_dict().items())
    first, second = model.sample([7], seed=5), again.sample([7], seed=5)
    assert first.images is not None
    assert second.images is not None
    assert np.array_equal(first.images, second.images)
    tokens, labels = model.examples(2)
    target = model.features(tokens[:, :-1], labels, slots="all")
    assert again.alignment(tokens, labels, target) == model.alignment(tokens, labels, target)
    one_line(lambda: again.examples(2), "does not say what it was trained on")


def test_every_verb_takes_a_model_folder(folder: Path, finished: Path, tmp_path: Path) -> None:
    cli("sample", folder, "--seed", 1, "--per-class", 1, "--out", tmp_path / "a")
    cli("sample", finished, "--seed", 1, "--per-class", 1, "--out", tmp_path / "b")
    assert (tmp_path / "a/grid.png").read_bytes() == (tmp_path / "b/grid.png").read_bytes()
    said = cli("sample", folder, "--num", 4, "--out", tmp_path / "four.npz", "--ranks", 1)
    assert f"4 images of 8 pixels from {folder} (ema weights)" in said
    cli("export", folder, "--out", tmp_path / "x.pt")
    weights = load_weights(tmp_path / "x.pt").gpt
    wanted = load_weights(finished, "ema").gpt
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    config = load(str(finished / "config.yaml"), [f"train.init_from={folder}"])
    given = initial_weights(config, {})
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)
    config = load(str(finished / "config.yaml"), [f"foresight.teacher_weights={folder}", "foresight.warmup_epochs=0"])
    assert all(torch.equal(pretrained(config)[0][name], wanted[name]) for name in wanted)


def test_the_card_says_what_the_run_says(folder: Path, finished: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: mirai_ds\ntags:\n")
    info = json.loads((finished / "checkpoints/step-00000066/info.json").read_text())
    last = [line for line in records(finished) if "held_out/ntp_ema" in line][-1]
    for line in (
        "mirai-e (official convention, 3 heads at block 2, lambda 2, 2, 2)",
        f"| data | sha256 of codes and labels {info['data']} |",
        f"| held_out/ntp_ema | {last['held_out/ntp_ema']:.4f} | 66 |",
        "| end.json | 500 | held-out | cfg_scale 1.5 | fid 12.5 |",
        "| weights | the average (EMA) of the weights, step 66, fp32 |",
    ):
        assert line in card
    assert not any(line.startswith(" |") or "None" in line for line in card.splitlines())
    told = json.loads((folder / "config.json").read_text())
    assert str(finished.parent) not in json.dumps(told)  # no folder of this machine
    assert {"data", "output_dir", "deepspeed"}.isdisjoint(told["recipe"])


def test_names_of_files_lose_their_folders() -> None:
    config = load("digits-mirai-e", ["foresight.teacher_weights=/home/me/b.pt", "train.init_from=/scratch/a.pt"])
    told = public_recipe(config)
    assert (told["foresight"]["teacher_weights"], told["train"]["init_from"]) == ("b.pt", "a.pt")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--format", "hf", "--out", "OUT"], ["OUT", "is there already"]),
        (["--format", "hf", "--weights", "both", "--out", "NEW"], ["--weights both", "say raw or ema"]),
        (["--out", "NEW.npz"], ["ends in .npz", "--format hf"]),
        (["--format", "llamagen", "--out", "NEW.safetensors"], ["writes .pt"]),
    ],
)
def test_what_export_refuses(arguments: list[str], parts: list[str], finished: Path, tmp_path: Path) -> None:
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT" / "mine.txt").write_text("mine")
    given = [str(tmp_path / part) if part.isupper() or part.startswith("NEW") else part for part in arguments]
    result = CliRunner().invoke(main, ["export", str(finished), *given])
    assert result.exit_code == 2
    assert all(part in result.output for part in parts)
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]
    assert (tmp_path / "OUT" / "mine.txt").read_text() == "mine"


def test_a_damaged_folder_is_one_line(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "config.json").write_text('{"model_type": "bert"}')
    one_line(lambda: m.ImageModel.from_pretrained(copy), "is no model of mirai_ds", "model_type: mirai_ds")
    (copy / "config.json").write_text("{")
    one_line(lambda: m.ImageModel.from_pretrained(copy), "config.json: cannot be read")
    shutil.copy(folder / "config.json", copy / "config.json")
    (copy / "model.safetensors").write_bytes(b"torn")
    one_line(lambda: m.ImageModel.from_pretrained(copy), "is not a readable .safetensors file")
    one_line(lambda: load_weights(folder, step=3), "--step 3", "says itself what it holds")


def test_mistakes_are_one_line(model: m.ImageModel) -> None:
    one_line(lambda: model.sample([10]), "class 10: the model has 0..9")
    one_line(lambda: model.sample([1], cfg=2.0), "sampling rules cfg: use cfg_scale, cfg_interval")
    one_line(lambda: model.sample([1], top_p=0.0), "--top-p 0.0: must be in (0, 1]")
    with pytest.raises(AttributeError, match="no attribute 'Model'"):
        m.Model  # type: ignore[attr-defined]  # noqa: B018


def test_the_page_looks_at_the_demo(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits-mirai-e").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    code = PAGE.partition("# look.py\n")[2].partition("```")[0]
    exec(compile(code, "look.py", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("ImageModel(custom of 3 blocks, width 64, 8x8 tokens, 10 classes, runs/digits-mirai-e/")
    assert said[2] == "torch.Size([64, 64, 64])"
    assert Image.open(tmp_path / "sheet.png").size[0] > 8 * 32


def test_what_is_exported_is_there() -> None:
    names = [line.split("`")[1].removeprefix("m.") for line in PAGE.splitlines() if line.startswith("| `m.")]
    assert sorted([*names, "Aligned", "__version__"]) == sorted(m.__all__)
    assert all(getattr(m, name) is not None for name in m.__all__)
