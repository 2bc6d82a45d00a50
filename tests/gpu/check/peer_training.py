"""Training as users start it, on the same files: the authors' unmodified script, then `mirai-ds train`; images/s.

python -m tests.gpu.check.peer_training FOLDER [--files 3200]

FOLDER holds the checkout Mirai.  The files are random codes as LlamaGen's extraction writes them; their script is told
how many there are, which is written into its data set.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mirai_ds.runtime.launch import free_port
from tests.gpu.check.facts import ROOT
from tests.gpu.check.native_rows import Row, one

BATCH, LOGGED = 32, 20  # images a step; steps between two lines of a log
SCRIPT = "autoregressive/train/train_c2i_Mirai_E.py"
# Their README's, for one GPU.  Of the last `--epochs` only speeds of lines after the first count.
THEIRS = (
    "--gpt-model", "GPT-B", "--image-size", "256", "--downsample-size", "16", "--global-batch-size", str(BATCH),
    "--lr", "1e-4", "--ema", "--cloud-save-path", "cloud", "--dataset", "imagenet_code", "--teacher-depth", "8",
    "--student-depth", "8", "--proj-coeffs", "2", "2", "2", "--use-prev-iter-ema", "--warmup-epochs", "0",
    "--num-heads", "3", "--ckpt-every", "100000000", "--log-every", str(LOGGED),
)  # fmt: skip
OURS = {
    "as shipped": (),
    "--deepspeed zero0": ("--deepspeed", "zero0"),
    "--deepspeed zero0, compile `blocks`": ("--deepspeed", "zero0", "--set", "train.compile=blocks"),
}
# Runs their script in a process whose data set has as many files as there are.
RUNNER = """
import runpy, sys, types
root, count, script = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sys.argv = [script, *sys.argv[4:]]
sys.path.insert(0, root)
sys.modules["wandb"] = types.ModuleType("wandb")
from dataset import imagenet
built = imagenet.CustomDataset.__init__
def with_fewer(self, *arguments):
    built(self, *arguments)
    self.feature_files, self.label_files = self.feature_files[:count], self.label_files[:count]
imagenet.CustomDataset.__init__ = with_fewer
runpy.run_path(f"{root}/{script}", run_name="__main__")
"""


def write_codes(folder: Path, count: int) -> None:
    """Ten views of 256 codes an image, and its label."""
    rng = np.random.default_rng(0)
    for name in ("codes", "labels"):
        (folder / f"imagenet256_{name}").mkdir(parents=True)
    for number in range(count):
        np.save(folder / "imagenet256_codes" / f"{number}.npy", rng.integers(0, 16384, (1, 10, 256)))
        np.save(folder / "imagenet256_labels" / f"{number}.npy", np.array([number % 1000]))


def theirs(folder: Path, codes: Path, count: int, epochs: int, compiled: bool) -> float:
    """Images a second of the last line that their script logs.  Raises RuntimeError with its last words."""
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **ranks, "MASTER_PORT": str(free_port())}
    words = [*THEIRS, "--epochs", str(epochs), "--code-path", str(codes), "--results-dir", str(codes / "results")]
    words += [] if compiled else ["--no-compile"]
    command = [sys.executable, "-c", RUNNER, str(folder / "Mirai"), str(count), SCRIPT, *words]
    return BATCH * last(said(command, environment), r"Train Steps/Sec: ([\d.]+)")


def ours(store: Path, run: Path, count: int, epochs: int, more: tuple[str, ...]) -> float:
    """Images a second of the last metrics of a run."""
    settings = (
        "data.source=store", f"data.path={store}", f"train.global_batch_size={BATCH}", "foresight.warmup_epochs=0",
        f"train.max_steps={epochs * (count // BATCH)}", f"logging.every_steps={LOGGED}", "eval.loss.at_end=false",
        "sampling.at_end=false",
    )  # fmt: skip
    command = [sys.executable, "-m", "mirai_ds", "train", "mirai-e-b-80", "--run-dir", str(run), *more]
    said([*command, *(word for setting in settings for word in ("--set", setting))], dict(os.environ))
    return last_speed(run / "metrics.jsonl")


def last_speed(metrics: Path) -> float:
    """Of a run's metrics.  Raises RuntimeError where there is none."""
    found = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    speeds = [float(row["speed/images_per_s"]) for row in found if "speed/images_per_s" in row]
    if not speeds:
        raise RuntimeError(f"{metrics}: no speed was logged")
    return speeds[-1]


def said(command: list[str], environment: dict[str, str]) -> str:
    """What it prints.  Raises RuntimeError where it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stdout[-600:]}")
    return done.stdout


def last(text: str, pattern: str) -> float:
    """The last number of a log.  Raises RuntimeError where there is none."""
    found = re.findall(pattern, text)
    if not found:
        raise RuntimeError(f"no {pattern!r} in what was logged: {text[-600:]}")
    return float(found[-1])


def rows(folder: Path, scratch: Path, count: int, epochs: int) -> Iterator[Row]:
    """One after the other, each alone on the device."""
    about = {"model": "GPT-B", "method": "E", "batch": str(BATCH), "precision": "bf16-autocast"}
    codes, store = scratch / "code_c2i_flip_ten_crop", scratch / "store"  # `flip`: they draw one of the views
    write_codes(codes, count)
    said([sys.executable, "-m", "mirai_ds", "extract", "import-llamagen", str(codes), "--out", str(store)],
         dict(os.environ))  # fmt: skip
    for name, compiled in (("eager", False), ("compiled", True)):
        speed = theirs(folder, codes, count, epochs, compiled)
        yield one(
            "training", "speed", f"{speed:.4g}", "images/s", variant=f"authors' unmodified script, {name}", **about
        )
    for number, (name, more) in enumerate(OURS.items()):
        speed = ours(store, scratch / f"run{number}", count, epochs, more)
        yield one("training", "speed", f"{speed:.4g}", "images/s", variant=name, **about)


def main(argv: list[str] | None = None) -> int:
    """Print rows as they come; 1 where one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check.peer_training", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=3200)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for row in rows(args.folder.resolve(), Path(scratch), args.files, args.epochs):
                print(json.dumps(row), flush=True)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
