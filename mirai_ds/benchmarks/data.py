"""How fast images become codes, and codes and images reach training: `python -m mirai_ds.benchmarks.data`.

Each comparison takes turns in one run; what counts is the ratio.
  extract   reading, cutting and encoding through VQ-16 in batches across images with reading threads, against an image
            at a time (ten views a call, then two small .npy files), as LlamaGen's extraction does
  loader    tokens into a training batch from a store, against a LlamaGen-style folder: two .npy files an image
  views     one view's pixels for Mirai-I, by one worker: from the original JPEG, and from image stores
Real photographs (scikit-learn's two, cut into pieces of ImageNet's usual 500 x 375), random tokenizer weights.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mirai_ds.benchmarks.harness import add_device, append, command_line, facts, new_parser, only_table
from mirai_ds.data import BatchLoader, DataOrder
from mirai_ds.data.crops import ViewGeometry, centre_crop
from mirai_ds.data.image_sets import open_image_set
from mirai_ds.data.sources import TokenSource
from mirai_ds.data.stores import open_image_store
from mirai_ds.data.views import FileViews, PackedViews
from mirai_ds.extract.codes import CodesJob
from mirai_ds.extract.images import ENCODINGS
from mirai_ds.extract.run import Options, extract_images
from mirai_ds.resumable.plan import Listing, WorkPlan
from mirai_ds.runtime import markdown
from mirai_ds.runtime.distributed import World
from mirai_ds.tokenizer import VQ16, Tokenizer, VQTokenizer

FIELDS = ("date", "device", "python", "torch", "cuda", "command", "task", "variant", "value", "unit", "ratio", "note")
TASKS = ("loader", "views", "extract")
ALONE = World(0, 0, 1, 1)
Row = dict[str, str]


def in_turns(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Units of work a second of each variant (a call returns its units): median of `rounds` after one to warm up."""
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            began = time.perf_counter()
            units = run()
            if number:
                speeds[name].append(units / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in speeds.items()}


def rows(task: str, unit: str, speeds: dict[str, float], notes: dict[str, str], about: Row) -> list[Row]:
    """One row per variant; `ratio` is its speed divided by the last variant's."""
    base = list(speeds.values())[-1]
    return [
        {**about, "task": task, "variant": name, "value": f"{speed:.4g}", "unit": unit, "ratio": f"{speed / base:.2f}",
         "note": notes.get(name, "")}
        for name, speed in speeds.items()
    ]  # fmt: skip


def photographs(folder: Path, count: int) -> Path:
    """`count` JPEGs of 500 x 375 pixels, quality 92, from scikit-learn's two photographs, in two class folders."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    images = load_sample_images().images
    for i in range(count):
        top, left = int(rng.integers(427 - 375)), int(rng.integers(640 - 500))
        path = folder / str(i % 2) / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i % 2][top : top + 375, left : left + 500]).save(path, quality=92)
    return folder


def extraction(
    folder: Path, tokenizer: Tokenizer, images: int, batch: int, workers: int
) -> dict[str, Callable[[], float]]:
    """The two ways to extract, to be timed end to end in images a second; both give the same codes."""
    photos, geometry = open_image_set(photographs(folder / "photographs", images)), ViewGeometry(256, "ten", 1.1)
    listing = Listing(photos.names, photos.labels)
    plan = WorkPlan("codes", str(photos.root), {}, images, images, photos.classes)

    def ours() -> float:
        job = CodesJob(plan, listing, geometry, tokenizer, batch, workers)
        part = job.finish(job.prepare(range(images)), 0)
        np.savez(folder / "part.npz", **part.arrays)  # type: ignore[arg-type]
        job.reader.close()
        return images

    def image_by_image() -> float:
        for i in range(images):
            crop = centre_crop(photos.load(i).image, geometry.side)
            views = np.stack([geometry.view(crop, view) for view in range(10)])
            np.save(folder / "codes.npy", tokenizer.encode(torch.from_numpy(views)).numpy()[None])
            np.save(folder / "label.npy", photos.labels[i : i + 1].astype(np.int64))
        return images

    return {"batched": ours, "an image at a time": image_by_image}


def loading(folder: Path, images: int, batch: int) -> dict[str, Callable[[], float]]:
    """Tokens a second into batches of `batch`, one process, files in the page cache."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16384, (images, 10, 256), dtype=np.uint16)
    labels = rng.integers(0, 1000, images).astype(np.int32)
    np.save(folder / "codes.npy", codes)
    for name in ("codes", "labels"):
        (folder / name).mkdir()
    for i in range(images):
        np.save(folder / "codes" / f"{i}.npy", codes[i : i + 1].astype(np.int64))
        np.save(folder / "labels" / f"{i}.npy", labels[i : i + 1].astype(np.int64))
    source = TokenSource(np.load(folder / "codes.npy", mmap_mode="r"), labels, max_code=16383)
    order = DataOrder(images, batch, 0)
    loader = BatchLoader(source, order, batch, 0, 1, torch.device("cpu"), images=False)
    steps = order.steps_per_epoch

    def store() -> float:
        for step in range(steps):
            list(loader.micro_batches(step))
        return steps * batch * 256

    def small_files() -> float:
        for step in range(steps):
            indices, keys = order.batch(step)
            views = order.views(keys, 10).tolist()
            chosen = [
                (np.load(folder / "codes" / f"{i}.npy")[0, view], np.load(folder / "labels" / f"{i}.npy"))
                for i, view in zip(indices.tolist(), views, strict=True)
            ]
            torch.from_numpy(np.stack([tokens for tokens, _ in chosen]))
            torch.from_numpy(np.concatenate([label for _, label in chosen]))
        return steps * batch * 256

    return {"token store": store, ".npy files": small_files}


def viewing(folder: Path, images: int) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """The ways to read views, to be timed in images a second of one worker, and what an image takes on disk."""
    photos, geometry = open_image_set(photographs(folder / "photographs", images)), ViewGeometry(256, "ten", 1.1)
    numbers, views = np.arange(images), np.arange(images) % 10
    runs: dict[str, Callable[[], float]] = {}
    notes: dict[str, str] = {}

    def runner(source: FileViews | PackedViews) -> Callable[[], float]:
        def run() -> float:
            source.gather(numbers, views)
            return images

        return run

    for encoding in ENCODINGS:
        out = folder / encoding
        made = extract_images(Options(images=photos.root, out=out, size=256), ALONE, encoding)
        assert made is not None
        runs[f"{encoding} store"] = runner(PackedViews(open_image_store(out)))
        notes[f"{encoding} store"] = f"{sum(made.shard_bytes) / images / 1000:.0f} kB an image"
    size = sum(path.stat().st_size for path in photos.root.rglob("*.jpg"))
    runs["original files"] = runner(FileViews(photos.root, photos.names, geometry))
    notes["original files"] = f"{size / images / 1000:.0f} kB an image"
    return runs, notes


def table(measured: list[Row]) -> str:
    """A Markdown table with one line per row."""
    lines = []
    for row in measured:
        value, about = float(row["value"]), ", ".join(filter(None, [row["note"], row["device"], row["date"]]))
        lines.append(f"{row['task']} | {row['variant']} | {value:,.4g} {row['unit']} | {row['ratio']}x | {about}")
    return markdown.table("task | variant | speed | ratio |", lines)


def measure(task: str, folder: Path, device: str, quick: bool, about: Row) -> list[Row]:
    """The rows of a task.  quick: a fraction of the work, for a test that the benchmark runs."""
    rounds = 1 if quick else 5
    if task == "loader":
        return rows(task, "tokens/s", in_turns(loading(folder, 64 if quick else 4096, 32), rounds), {}, about)
    if task == "views":
        runs, notes = viewing(folder, 4 if quick else 64)
        return rows(task, "images/s a worker", in_turns(runs, rounds), notes, about)
    tokenizer = random_tokenizer(device, small=quick)
    images, batch = (2, 20) if quick or device == "cpu" else (256, 256)
    runs = extraction(folder, tokenizer, images, batch, max(1, len(os.sched_getaffinity(0))))
    note = {"batched": f"{batch} views a call, {tokenizer.name} fp32"}
    return rows(task, "images/s (ten views each)", in_turns(runs, min(rounds, 3)), note, about)


def random_tokenizer(device: str, small: bool) -> Tokenizer:
    """VQ-16 with random weights; with `small` it has few channels."""
    from dataclasses import replace

    return VQTokenizer.random(replace(VQ16, channels=32) if small else VQ16, device)


def main(argv: list[str] | None = None) -> int:
    """Measure and write rows, or print the table of rows that are there."""
    parser = new_parser("data", __doc__)
    add_device(parser)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--quick", action="store_true", help="a fraction of the work: shows that it runs")
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    if only_table(args, table, FIELDS):
        return 0
    about = facts(args.device, command_line("python -m mirai_ds.benchmarks.data", given, [args.out]))
    for task in args.tasks:
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(task, Path(folder), args.device, args.quick, about)
        append(args.out, FIELDS, measured, ("device", "task"))
        print("\n".join(table(measured).splitlines()[2:]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
