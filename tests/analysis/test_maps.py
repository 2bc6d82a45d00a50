"""Token maps: which slot, which number, which colours; on files and on a run that was trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from mirai_ds.analysis.maps import colours, half_width, of_different_classes, smoothness
from mirai_ds.cli.main import main
from mirai_ds.config import ModelConfig, load
from mirai_ds.data import load_dataset
from mirai_ds.model import GPT, gpt_from_weights, token_features
from tests.train.conftest import small_train

MODEL = {
    "size": "custom", "dim": 32, "n_layer": 3, "n_head": 2, "vocab_size": 20, "num_classes": 5, "block_size": 16,
    "ffn_multiple_of": 32,
}  # fmt: skip


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    gpt = GPT(ModelConfig(**MODEL))  # type: ignore[arg-type]
    return {name: torch.randn_like(p) * (0.1 if p.dim() > 1 else 1.0) for name, p in gpt.named_parameters()}


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["map", *map(str, arguments)])


def test_features_are_the_residual_stream_of_the_slot_that_holds_the_token() -> None:
    """Against hooks on the blocks themselves, with all N tokens given."""
    gpt = gpt_from_weights(ModelConfig(**MODEL), weights())  # type: ignore[arg-type]
    tokens, labels = torch.randint(0, 20, (3, 16)), torch.tensor([0, 4, 5])
    seen: list[torch.Tensor] = []
    handle = gpt.layers[1].register_forward_hook(lambda *a: seen.append(a[2]))
    gpt(tokens, labels)
    handle.remove()
    assert torch.allclose(token_features(gpt, tokens, labels, 2), seen[0][:, 1:], atol=1e-6)
    assert torch.allclose(token_features(gpt, tokens, labels, 2, "predict"), seen[0][:, :-1], atol=1e-6)
    later = tokens.clone()
    later[:, 9] = (later[:, 9] + 1) % 20  # the tenth token: no earlier slot may see it, its own must
    changed = (token_features(gpt, later, labels, 2) - token_features(gpt, tokens, labels, 2)).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False] * 9 + [True] * 7


@pytest.mark.parametrize("slots", ["input", "predict"])
def test_par_features_stand_at_their_cells(slots: str) -> None:
    """PAR on a 4x4 grid, 2x2 regions: the sequence goes by place in a region, then by region.  One token changes: the
    features that change are those of the slots that see it, PAR's rule written out for cells."""
    gpt = gpt_from_weights(ModelConfig(**MODEL, par_tokens=4), par_weights())  # type: ignore[arg-type]
    tokens, labels = torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(3)), torch.tensor([0, 5])
    before = token_features(gpt, tokens, labels, 2, slots)
    sequence = [8 * (p // 2) // 2 + p % 2 + 8 * (r // 2) + 2 * (r % 2) for p in range(4) for r in range(4)]
    assert sequence == [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]

    def sees(q: int, other: int) -> bool:
        """Whether the slot that holds (predicts) the q-th token has the other-th before it."""
        if slots == "input":  # the first four one by one, then the whole group of four
            return other <= q if q < 4 else other // 4 <= q // 4
        return other < q if q < 4 else other // 4 < q // 4

    for changed in range(16):
        later = tokens.clone()
        later[:, sequence[changed]] = (later[:, sequence[changed]] + 1) % 20
        moved = (token_features(gpt, later, labels, 2, slots) - before).abs().amax((0, 2)) > 0
        wanted = [sees(sequence.index(cell), changed) for cell in range(16)]
        assert moved.tolist() == wanted, changed


def par_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    gpt = GPT(ModelConfig(**MODEL, par_tokens=4))  # type: ignore[arg-type]
    return {name: torch.randn_like(p) * (0.1 if p.dim() > 1 else 1.0) for name, p in gpt.named_parameters()}


def test_smoothness_is_its_definition() -> None:
    """Neighbours and all pairs, written out."""
    features = torch.randn(5, 9, 4, generator=torch.Generator().manual_seed(1))
    found = smoothness(features)
    unit = (features / features.norm(dim=-1, keepdim=True)).double()
    near, far = [], []
    for image in unit:
        grid = image.view(3, 3, 4)
        pairs = [float(grid[r, c] @ grid[r, c + 1]) for r in range(3) for c in range(2)]
        pairs += [float(grid[r, c] @ grid[r + 1, c]) for r in range(2) for c in range(3)]
        near.append(np.mean(pairs))
        far.append(np.mean([float(image[i] @ image[j]) for i in range(9) for j in range(9) if i != j]))
    difference = np.subtract(near, far)
    assert found.neighbours == pytest.approx(np.mean(near), abs=1e-6)
    assert found.random_pairs == pytest.approx(np.mean(far), abs=1e-6)
    assert found.difference == pytest.approx(difference.mean(), abs=1e-6)
    assert found.ci95 == pytest.approx(1.959964 * difference.std(ddof=1) / math.sqrt(5), abs=1e-6)
    assert math.isnan(half_width(np.ones(1)))


def test_smoothness_tells_smooth_from_rough() -> None:
    """Of random features 0; of a slow wave near 1 less its own mean; the same features shuffled are rough."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.randn(20, 64, 32, generator=generator)
    assert abs(smoothness(rough).difference) < 3 * smoothness(rough).ci95 / 1.96
    angle = torch.arange(8)[:, None] * 0.3 + torch.arange(8)[None] * 0.2
    wave = torch.stack([angle.cos(), angle.sin()], -1).view(1, 64, 2)
    found = smoothness(wave)
    assert found.neighbours == pytest.approx((math.cos(0.3) + math.cos(0.2)) / 2, abs=1e-6)
    assert found.difference > 0.2
    shuffled = wave[:, torch.randperm(64, generator=generator)]
    assert abs(smoothness(shuffled).difference) < found.difference / 2
    assert smoothness(shuffled).random_pairs == pytest.approx(found.random_pairs, abs=1e-6)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_colours_keep_groups_together_and_repeat(method: Any) -> None:
    """Two groups of directions in four images: within a group colours are near, across groups far, in all of them.

    Of fewer cells t-SNE makes what scikit-learn's version and the seed want.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 24, generator=generator) * 3
    group = torch.tensor([[0] * 18 + [1] * 18, [1] * 18 + [0] * 18]).repeat(2, 1)
    features = centres[group] + 0.1 * torch.randn(4, 36, 24, generator=generator)
    found = colours(features, method, seed=0)
    assert found.shape == (4, 6, 6, 3)
    assert found.min() >= 0
    assert found.max() <= 1
    flat = found.reshape(144, 3)
    mask = group.flatten().numpy() == 0
    between = np.linalg.norm(flat[mask].mean(0) - flat[~mask].mean(0))
    within = max(flat[mask].std(0).max(), flat[~mask].std(0).max())
    assert between > within
    assert np.array_equal(found, colours(features, method, seed=0))
    assert np.allclose(found, colours(features * 8, method, seed=0), atol=1e-4)  # directions, not lengths


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two weights files in LlamaGen's layout, a recipe, tokens with pixels."""
    torch.save({"model": weights(0), "ema": weights(1)}, tmp_path / "a.pt")
    torch.save({"model": weights(1)}, tmp_path / "b.pt")
    (tmp_path / "r.yaml").write_text(json.dumps({"model": MODEL, "data": {"source": "npz", "path": "nowhere.npz"}}))
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "t.npz", tokens=rng.integers(0, 20, (3, 16)), labels=np.array([1, 2, 3]),
        images=rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8),
    )  # fmt: skip
    return tmp_path


def test_files_given_tokens(files: Path) -> None:
    """Two files side by side; a file's average is the other's raw weights, so their numbers agree."""
    common = ("--recipe", files / "r.yaml", "--image", files / "t.npz", "--layer", 2, "--method", "pca", "--json")
    done = cli(files / "a.pt", files / "b.pt", *common, "--out", files / "out.png")
    assert done.exit_code == 0, done.output
    record = json.loads(done.output)
    first, second = record["runs"]
    assert (first["images"], first["layer"], record["shown"]) == (3, 2, ["t.npz 0", "t.npz 1", "t.npz 2"])
    assert record == {"picture": str(files / "out.png"), **json.loads((files / "out.json").read_text())}
    gpt = gpt_from_weights(ModelConfig(**MODEL), weights(1))  # type: ignore[arg-type]
    tokens = torch.from_numpy(np.load(files / "t.npz")["tokens"])
    wanted = smoothness(token_features(gpt, tokens, torch.tensor([1, 2, 3]), 2))
    assert second["smoothness"] == pytest.approx(wanted.difference, abs=1e-6)
    assert second["over_first"] == pytest.approx(second["smoothness"] - first["smoothness"], abs=1e-9)
    ema = json.loads(cli(files / "a.pt", *common, "--weights", "ema", "--out", files / "e.png").output)
    assert ema["runs"][0]["smoothness"] == second["smoothness"]
    from PIL import Image

    with Image.open(files / "out.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # maps and images, not an empty canvas


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "{0}/none.npz"], ["none.npz", "no such file"]),
        (["--image", "0"], ["nowhere.npz"]),
        (["--image", "{0}/t.npz", "--layer", "4"], ["--layer = 4", "3 blocks"]),
        (["--image", "{0}/r.yaml"], ["--tokenizer"]),
        (["--image", "{0}/wide.npz"], ["25 tokens an image", "16 of 0 to 19"]),
        ([], ["nowhere.npz", "--image FILE.npz"]),
        (["--image", "{0}/t.npz", "--label", "9"], ["--label 9"]),
    ],
)
def test_mistakes(files: Path, arguments: list[str], words: list[str]) -> None:
    np.savez(files / "wide.npz", tokens=np.zeros((2, 25), int))
    told = [argument.format(files) for argument in arguments]
    done = cli(files / "a.pt", "--recipe", files / "r.yaml", "--out", files / "x.png", *told)
    assert done.exit_code == 2, done.output
    assert len(done.output.strip().splitlines()) == 1
    assert all(word in done.output for word in words), done.output
    assert not (files / "x.png").exists()


def test_different_classes_are_shown() -> None:
    """The first of each class, in the order of the samples; with fewer classes the second of each too."""
    assert of_different_classes(np.array([0, 0, 0, 2, 1, 2, 3, 4]), 4) == [0, 3, 4, 6]
    assert of_different_classes(np.array([1, 1, 1, 0, 0]), 4) == [0, 1, 3, 4]
    assert of_different_classes(np.array([5, 5]), 4) == [0, 1]
    data = load_dataset(load("digits-baseline").data, load("digits-baseline").model).held_out
    classes = data.labels[of_different_classes(data.labels, 10)]
    assert sorted(classes.tolist()) == list(range(10))


@pytest.mark.matrix
def test_a_run_and_its_export(tmp_path: Path) -> None:
    """Held-out digits through a trained run; its export gives the same number."""
    run = tmp_path / "run"
    tiny = ["model.dim=32", "model.n_layer=3", "model.n_head=2", "train.max_steps=8", "foresight.warmup_epochs=0",
            "foresight.projector_dim=32", "checkpoint.at_end=true", "eval.classifier.enabled=false",
            "sampling.at_end=false", "launch.cpu_ranks=1"]  # fmt: skip
    assert small_train(run, overrides=tiny).code == 0
    done = cli(run, "--image", 0, "--image", 7, "--num", 40, "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.output)
    assert record["picture"] == str(run / "maps" / "layer-02-tsne.png")
    assert [name.split(",")[0] for name in record["shown"]] == ["held out 0", "held out 7"]
    assert record["runs"][0]["images"] == 40
    export = CliRunner().invoke(main, ["export", str(run), "--weights", "ema", "--out", str(tmp_path / "e.pt")])
    assert export.exit_code == 0, export.output
    again = cli(tmp_path / "e.pt", "--recipe", run / "config.yaml", "--num", 40, "--out", tmp_path / "e.png", "--json")
    row = json.loads(again.output)["runs"][0]
    assert row["smoothness"] == pytest.approx(record["runs"][0]["smoothness"], abs=1e-6)
    # Beside each other: the step is the run's, the recipe the file's.
    options = ("--recipe", run / "config.yaml", "--step", 8, "--num", 40, "--out", tmp_path / "b.png", "--json")
    both = json.loads(cli(run, tmp_path / "e.pt", *options).output)["runs"]
    assert [(one["step"], one["weights"]) for one in both] == [(8, "ema"), (8, "ema")]
    assert both[1]["over_first"] == pytest.approx(0, abs=1e-6)
    assert "--recipe" in cli(run, "--recipe", run / "config.yaml").output
