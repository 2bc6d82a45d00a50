"""The commands as a user gives them: help, mistakes in one line, several processes, kills of a whole process group."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mirai_ds.cli.main import main
from mirai_ds.data.stores import open_token_store
from mirai_ds.tokenizer import VQ16, VQTokenizer
from tests.extract.conftest import content
from tests.extract.test_llamagen import write_folder
from tests.warm_start import warm_mirai_ds


@pytest.mark.parametrize("verb", ["", "codes", "images", "codebook", "import-llamagen"])
def test_help_has_an_example_and_needs_nothing(verb: str) -> None:
    code = (
        "import sys, mirai_ds.cli.main as c\n"
        f"try: c.main(['extract', *{[verb] if verb else []}, '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'pydantic', 'numpy', 'PIL', 'sklearn'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert ("Example:" in out) == bool(verb)


def test_mistakes_are_one_line(photos: Path, codebook: Path, tmp_path: Path) -> None:
    common = ["--images", str(photos), "--size", "16", "--out", str(tmp_path / "s")]
    cases = {
        ("codes", *common, "--tokenizer", "none.pt"): "none.pt: no such file",
        ("codes", *common[2:], "--images", "nowhere", "--tokenizer", str(codebook)): "nowhere: no such folder",
        ("codes", *common, "--size", "18", "--tokenizer", str(codebook)): "18",
        ("images", *common, "--quality", "80"): "--quality 80: webp is lossless",
        ("codebook", *common, "--patch", "5"): "a codebook file ends in .npz",
        ("codebook", *common[:4], "--patch", "5", "--out", "x.npz"): "--patch 5: does not divide --size 16",
        ("import-llamagen", str(photos), "--out", str(tmp_path / "s")): "must hold one folder named ..._codes",
    }
    for arguments, reason in cases.items():
        done = CliRunner().invoke(main, ["extract", *arguments])
        assert done.exit_code == 2, done.output
        assert done.stderr.startswith("mirai-ds: error: "), done.stderr
        assert reason in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_import_and_inspect(store: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "theirs", store)
    done = warm_mirai_ds("extract", "import-llamagen", str(folder), "--out", str(tmp_path / "s"), "--size", "16")
    assert (done.code, done.out.strip()) == (0, f"{tmp_path / 's'}: 18 images x 10 views x 16 tokens"), done.err
    assert warm_mirai_ds("inspect", str(tmp_path / "s"), "--verify").code == 0
    codes = tmp_path / "s" / "codes.npy"
    codes.write_bytes(codes.read_bytes()[:-1] + b"\xff")
    done = warm_mirai_ds("inspect", str(tmp_path / "s"), "--verify")
    assert done.code == 1
    assert "1 damages" in done.out
    assert done.err.strip().endswith("codes.npy: images 0 to 17 do not have the digest of their codes")
    done = warm_mirai_ds("inspect", str(tmp_path / "theirs"))
    assert (done.code, "is not a store of mirai_ds" in done.err) == (2, True)


@pytest.fixture(scope="module")
def small_vq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VQ networks with few channels, in LlamaGen's wrapper."""
    path = tmp_path_factory.mktemp("vq") / "vq.pt"
    config = replace(VQ16, channels=32, multipliers=(1, 2), codebook_size=64)
    torch.save({"model": VQTokenizer.random(config).model.state_dict()}, path)
    return path


def command(photos: Path, tokenizer: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "mirai_ds", "extract", "codes", "--images", str(photos), "--tokenizer", str(tokenizer),
        "--size", "16", "--out", str(out), "--block", "2", "--batch", "5", *more,
    ]  # fmt: skip


@pytest.mark.matrix
def test_ranks_of_any_launcher_share_the_work(photos: Path, small_vq: Path, tmp_path: Path) -> None:
    """RANK and WORLD_SIZE as torchrun sets them, SLURM_* as srun does; no rendezvous."""
    alone, shared, slurm = (tmp_path / name for name in ("alone", "shared", "slurm"))
    threads = {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(photos, small_vq, alone), check=True, env={**os.environ, **threads})
    for out in (shared, slurm):
        ranks = []
        for rank in (1, 0):
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
            if out == slurm:
                place = {
                    "SLURM_PROCID": str(rank),
                    "SLURM_STEP_ID": "0",
                    "SLURM_NTASKS": "2",
                    "SLURM_LOCALID": str(rank),
                }
            ranks.append(subprocess.Popen(command(photos, small_vq, out), env={**os.environ, **threads, **place}))
        assert [process.wait(120) for process in ranks] == [0, 0]
        assert np.array_equal(open_token_store(out).codes, open_token_store(alone).codes)
        assert content(out) == content(shared)


@pytest.mark.matrix
def test_kills_of_the_whole_group(photos: Path, small_vq: Path, tmp_path: Path) -> None:
    """The launcher, both ranks, everything at once, as a scheduler or the kernel does it."""
    wanted, out = tmp_path / "wanted", tmp_path / "s"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    generator, kills, begun = random.Random(0), 0, time.monotonic()
    subprocess.run(command(photos, small_vq, wanted, "--processes", "2"), check=True, env=env)
    whole = time.monotonic() - begun
    while kills < 3:
        begun = time.monotonic()
        process = subprocess.Popen(
            command(photos, small_vq, out, "--processes", "2"), env=env, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            process.wait(generator.uniform(0.5, 0.95) * whole)
            whole = time.monotonic() - begun  # it was faster this time: the next one is killed earlier
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
            process.wait()
        if (out / "manifest.json").is_file() and not (out / "parts").exists():
            assert content(out) == content(wanted)
            shutil.rmtree(out)
    subprocess.run(command(photos, small_vq, out, "--processes", "2"), check=True, env=env)
    assert content(out) == content(wanted)
