"""Commands that are not training, on a fake GPU: stores, scores and a study's costs equal the CPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mirai_ds.tokenizer import VQ16, VQTokenizer
from tests.gpu.rehearsal.conftest import FakeGpu
from tests.gpu.rehearsal.environment import ROOT

pytestmark = pytest.mark.rehearsal
ON_CPU = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def on_cpu(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "mirai_ds", *arguments], env=ON_CPU, cwd=ROOT, check=True, capture_output=True,
        timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve noisy images of 20 pixels in two classes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(12):
        where = folder / f"class{number % 2}"
        where.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(where / f"{number:02d}.png")
    return folder


def test_extraction_writes_the_cpus_store(fake_gpu: FakeGpu, images: Path, tmp_path: Path) -> None:
    """Two processes, a GPU each, and the same codes, by a small tokenizer with random weights."""
    weights = tmp_path / "vq.pt"
    torch.save({"model": VQTokenizer.random(replace(VQ16, channels=32)).model.state_dict()}, weights)
    command = ["extract", "codes", "--images", str(images), "--tokenizer", str(weights), "--size", "16",
               "--block", "4"]  # fmt: skip
    on_cpu(*command, "--out", str(tmp_path / "cpu"))
    records = tmp_path / "records"
    records.mkdir()
    env = {"MIRAI_FAKE_RECORDS": str(records)}
    fake_gpu("-m", "mirai_ds", *command, "--out", str(tmp_path / "gpu"), gpus=2, env=env)
    used = [json.loads(path.read_text(encoding="utf-8"))["launches"] for path in records.glob("*.json")]
    assert sorted(device for launches in used for device in launches) == ["0", "1"]
    stores = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*.npy")} for name in ("cpu", "gpu")]
    assert len(stores[0]) > 0
    assert stores[0] == stores[1]


def test_scores_are_the_cpus(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    """Frechet distance, precision and recall by a small network with random weights."""
    import timm

    torch.manual_seed(0)
    weights, rng = tmp_path / "weights.pth", np.random.default_rng(0)
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), weights)
    files = []
    for name in ("samples", "reference"):
        files.append(str(tmp_path / f"{name}.npz"))
        np.savez(files[-1], arr_0=rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8))
    command = ["evaluate", *files, "--features", f"timm:resnet10t:{weights}", "--exact-pr"]
    on_cpu(*command, "--json", str(tmp_path / "cpu.json"), "--device", "cpu")
    fake_gpu("-m", "mirai_ds", *command, "--json", str(tmp_path / "gpu.json"), "--device", "cuda")
    cpu, gpu = (json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in ("cpu", "gpu"))
    assert gpu["protocol"] != cpu["protocol"]  # it says which device
    assert cpu["frechet_distance"] > 0
    for score in ("frechet_distance", "precision", "recall"):
        assert gpu[score] == pytest.approx(cpu[score], rel=1e-4)


def test_a_study_measures_and_trains_on_the_gpu(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    """What a step of its arms costs, and what it would run; a run of it is `mirai-ds train`'s."""
    records = tmp_path / "records"
    records.mkdir()
    done = fake_gpu(
        "-m", "mirai_ds", "study", "plan", "digits", "--arms", "e-official", "--seeds", "1", "--folder",
        str(tmp_path / "study"), env={"MIRAI_FAKE_RECORDS": str(records)},
    )  # fmt: skip
    assert "2 runs" in done.stdout
    assert "hours of GPU time" in done.stdout
    facts = json.loads((tmp_path / "study" / "facts.json").read_text(encoding="utf-8"))
    assert "(fake)" in facts["device"]
    costs = json.loads((tmp_path / "study" / "costs.json").read_text(encoding="utf-8"))
    assert costs["e-official"]["step_ms"] > 0
    assert len(list(records.glob("*.json"))) == 1
