"""Token features as colours on the token grid (the paper's Figs. 6 and 9), and how smooth they are in numbers."""

from __future__ import annotations

import json
import math
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mirai_ds.checkpoint.weights import LoadedWeights, load_weights
from mirai_ds.config import ConfigError, RunConfig, UserError
from mirai_ds.config.eval_config import Weights
from mirai_ds.data import load_dataset
from mirai_ds.data.meaning import class_names
from mirai_ds.data.token_source import TokenDecoder, TokenSource
from mirai_ds.model import gpt_from_weights, token_features
from mirai_ds.model.features import Slots
from mirai_ds.runtime.disk import write_whole
from mirai_ds.tokenizer import open_tokenizer
from mirai_ds.tracking.pictures import save_figure

Array = np.ndarray[Any, Any]
Method = Literal["tsne", "pca"]

FOLDER = "maps"
Z95 = 1.959964  # of the normal distribution
_EDGE = 2.0  # percent of the values at each end that share a colour
SHOWN = 4  # images, where none are asked for


@dataclass(frozen=True)
class Images:
    """What is shown and what is measured: tokens (n, N) int64, labels (n,) int64, pixels (n, H, W, 3) uint8 where there
    are any, a name each."""

    tokens: Tensor
    labels: Tensor
    pixels: Array | None
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def first(self, count: int) -> Images:
        """Returns the first `count` images."""
        pixels = None if self.pixels is None else self.pixels[:count]
        return Images(self.tokens[:count], self.labels[:count], pixels, self.names[:count])


@dataclass(frozen=True)
class Smoothness:
    """Means over images of the cosine of two tokens' features: neighbours (right and below), and any two tokens of the
    image.  difference: of the two, image by image; ci95: half the width of its 95 % interval."""

    images: int
    neighbours: float
    random_pairs: float
    difference: float
    ci95: float
    each: Array  # the difference of every image


@dataclass(frozen=True)
class RunMap:
    """One run's colours (n, g, g, 3) in [0, 1] for the shown images, and its smoothness over the measured ones."""

    name: str
    origin: str
    step: int
    layer: int
    weights: str
    colours: Array
    smoothness: Smoothness


def smoothness(features: Tensor) -> Smoothness:
    """features (n, N, D) of n images on square grids.  Random pairs are all N (N - 1) ordered pairs, not a sample: the
    sum of their cosines is |sum of unit vectors|^2 - N."""
    images, cells, _ = features.shape
    side = math.isqrt(cells)
    unit = F.normalize(features.double(), dim=-1).view(images, side, side, -1)
    right = (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1)
    below = (unit[:, 1:] * unit[:, :-1]).sum(-1)
    near = torch.cat([right.flatten(1), below.flatten(1)], dim=1).mean(1)
    lengths = unit.square().sum((1, 2, 3))  # N, or fewer where a feature is zero
    far = (unit.sum((1, 2)).square().sum(-1) - lengths) / (cells * (cells - 1))
    each = (near - far).numpy()
    return Smoothness(images, float(near.mean()), float(far.mean()), float(each.mean()), half_width(each), each)


def half_width(values: Array) -> float:
    """Half the width of the mean's 95 % interval; NaN for a single value."""
    return Z95 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def colours(features: Tensor, method: Method, seed: int) -> Array:
    """(n, N, D) -> (n, g, g, 3) in [0, 1]: all images' features together to three numbers, each a colour channel.

    Directions count, not lengths: features are scaled to unit length, so that distances are those of cosines.
    """
    images, cells, width = features.shape
    points = F.normalize(features, dim=-1).reshape(images * cells, width).numpy().astype(np.float64)
    components = _tsne(points, seed) if method == "tsne" else _pca(points)
    low, high = np.percentile(components, [_EDGE, 100 - _EDGE], axis=0)
    scaled = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
    side = math.isqrt(cells)
    return scaled.reshape(images, side, side, 3)


def _tsne(points: Array, seed: int) -> Array:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(points) - 1) / 3)
    components: Array = TSNE(3, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)
    return components


def _pca(points: Array) -> Array:
    """Three principal components; each points where its largest deviation is positive."""
    centred = points - points.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    components: Array = centred @ axes[:3].T
    components = np.pad(components, ((0, 0), (0, 3 - components.shape[1])))
    largest = components[np.abs(components).argmax(0), range(3)]
    return components * np.where(largest < 0, -1.0, 1.0)


# --- images ---------------------------------------------------------------------------------------------------------


def find_images(
    loaded: LoadedWeights, wanted: Sequence[str], tokenizer: Path | None, label: int | None, measured: int
) -> tuple[Images, Images]:
    """(shown, measured).  wanted: numbers of held-out samples, .npz files of tokens, or picture files; default four
    held-out samples of different classes.  What is measured are the first held-out samples, else what is shown.

    Raises UserError when there are none, and for what is not theirs.
    """
    numbers = [int(one) for one in wanted if one.isdigit()]
    files = [Path(one) for one in wanted if not one.isdigit()]
    held, decoder = _held_out(loaded, tokenizer, needed=not files)
    parts = [_from_file(path, loaded.config, decoder, label) for path in files]
    if held is not None and (numbers or not files):
        chosen = numbers or of_different_classes(held.labels, SHOWN)
        beyond = [n for n in chosen if n >= len(held)]
        if beyond:
            raise UserError(f"--image {beyond[0]}: there are {len(held)} held-out samples, 0 to {len(held) - 1}")
        parts.insert(0, _pick(held, decoder, chosen))
    elif numbers:
        raise UserError(f"--image {numbers[0]}: {_NO_HELD_OUT}")
    shown = _joined(parts)
    return shown, shown if held is None else _pick(held, decoder, list(range(min(measured, len(held)))))


def of_different_classes(labels: Array, count: int) -> list[int]:
    """Up to `count` numbers of samples, ascending: the first of each class, then the second of each, and so on."""
    seen = Counter[int]()
    turns = []
    for n, label in enumerate(labels.tolist()):
        seen[label] += 1
        turns.append((seen[label], n))
    return sorted(n for _, n in sorted(turns)[:count])


_NO_HELD_OUT = "there are no held-out samples at hand; give --image FILE.npz with an array `tokens` (n, N)"


def _held_out(
    loaded: LoadedWeights, tokenizer: Path | None, needed: bool
) -> tuple[TokenSource | None, TokenDecoder | None]:
    """The run's held-out samples, None where there are none, and what decodes tokens."""
    decoder: TokenDecoder | None = None if tokenizer is None else open_tokenizer(tokenizer)
    if loaded.data is None:
        if needed:
            raise UserError(_NO_HELD_OUT)
        return None, decoder
    try:
        data = load_dataset(loaded.data, loaded.config.model)
    except UserError as error:
        if needed:
            raise UserError(f"{error}; or give --image FILE.npz with an array `tokens` (n, N)") from None
        return None, decoder
    decoder = decoder or data.train.decoder
    if not len(data.held_out):
        if needed:
            raise UserError(_NO_HELD_OUT)
        return None, decoder
    return data.held_out, decoder


def _pick(source: TokenSource, decoder: TokenDecoder | None, chosen: list[int]) -> Images:
    indices = np.asarray(chosen)
    tokens = source.first_view(indices)
    labels = torch.from_numpy(source.labels[indices].astype(np.int64))
    pixels = decoder.decode(tokens) if decoder is not None else None
    classes = class_names(source.meaning, labels.tolist())
    return Images(tokens, labels, pixels, [f"held out {n}, class {c}" for n, c in zip(chosen, classes, strict=True)])


def _from_file(path: Path, config: RunConfig, decoder: TokenDecoder | None, label: int | None) -> Images:
    if not path.is_file():
        raise UserError(f"--image {path}: no such file (and not the number of a held-out sample)")
    unknown = config.model.num_classes if label is None else label  # the unconditional class
    if not 0 <= unknown <= config.model.num_classes:
        raise UserError(f"--label {label}: must be 0 to {config.model.num_classes - 1}")
    if path.suffix == ".npz":
        return _from_npz(path, config, decoder, unknown)
    encode = getattr(decoder, "encode", None)
    if decoder is None or encode is None:
        raise UserError(f"--image {path}: only a tokenizer makes tokens of a picture; give --tokenizer FILE")
    from PIL import Image, UnidentifiedImageError

    side = config.model.grid * decoder.downsampling
    try:
        with Image.open(path) as opened:
            picture = opened.convert("L" if decoder.channels == 1 else "RGB")  # type: ignore[attr-defined]
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"--image {path}: cannot be read as a picture ({error})") from None
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    square = picture.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + short, top + short))
    pixels = np.asarray(square).reshape(1, side, side, -1)
    tokens = encode(torch.from_numpy(pixels.copy()))
    return Images(tokens, torch.tensor([unknown]), decoder.decode(tokens), [path.name])


def _from_npz(path: Path, config: RunConfig, decoder: TokenDecoder | None, unknown: int) -> Images:
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"--image {path}: is not a readable .npz file ({error})") from None
    codes = arrays.get("tokens", arrays.get("codes"))
    if codes is None or codes.dtype.kind not in "iu" or codes.ndim not in (2, 3):
        raise UserError(f"--image {path}: needs an integer array `tokens` (n, N)")
    codes = codes if codes.ndim == 2 else codes[:, 0]
    m = config.model
    if codes.shape[1] != m.block_size or int(codes.max()) >= m.vocab_size or int(codes.min()) < 0:
        what = f"{codes.shape[1]} tokens an image, {int(codes.min())} to {int(codes.max())}"
        raise UserError(f"--image {path}: holds {what}; the model has {m.block_size} of 0 to {m.vocab_size - 1}")
    tokens = torch.from_numpy(codes.astype(np.int64))
    given = arrays.get("labels")
    labels = torch.full((len(tokens),), unknown) if given is None else torch.from_numpy(given.astype(np.int64))
    pixels = arrays.get("images")
    if pixels is None and decoder is not None:
        pixels = decoder.decode(tokens)
    return Images(tokens, labels, pixels, [f"{path.name} {i}" for i in range(len(tokens))])


def _joined(parts: list[Images]) -> Images:
    if len(parts) == 1:
        return parts[0]
    pixels = [part.pixels for part in parts]
    sizes = {None if p is None else p.shape[1:] for p in pixels}
    whole = len(sizes) == 1 and None not in sizes
    return Images(
        torch.cat([p.tokens for p in parts]), torch.cat([p.labels for p in parts]),
        np.concatenate(pixels) if whole else None, [name for p in parts for name in p.names],  # type: ignore[arg-type]
    )  # fmt: skip


# --- maps -----------------------------------------------------------------------------------------------------------


def map_run(
    source: Path, loaded: LoadedWeights, layer: int | None, shown: Images, measured: Images, method: Method, seed: int,
    slots: Slots,
) -> RunMap:  # fmt: skip
    """layer: default two thirds of the depth, as the paper's 8 of 12."""
    config = loaded.config
    chosen = layer or max(1, round(config.model.depth * 8 / 12))
    if chosen > config.model.depth:
        raise ConfigError("--layer", layer, f"{source}: the model has {config.model.depth} blocks")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpt = gpt_from_weights(config.model, {name: value.float().to(device) for name, value in loaded.gpt.items()})
    name = config.name if source.is_dir() else source.name
    features = token_features(gpt, shown.tokens, shown.labels, chosen, slots)
    measure = smoothness(token_features(gpt, measured.tokens, measured.labels, chosen, slots))
    return RunMap(name, loaded.origin, loaded.step, chosen, loaded.kind, colours(features, method, seed), measure)


def make_maps(
    sources: Sequence[Path], wanted: Sequence[str], layer: int | None, method: Method, out: Path | None,
    weights: Weights | None, step: int | None, recipe: str | None, block_size: int | None, tokenizer: Path | None,
    label: int | None, measured: int, seed: int, slots: Slots,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Write the picture and, beside it, its JSON; returns the picture's path and what the JSON holds."""
    mixed = len({source.is_dir() for source in sources}) == 2  # then a step is the runs', a recipe the files'
    loaded = []
    for source in sources:
        of_run, of_file = (not mixed or source.is_dir()), (not mixed or not source.is_dir())
        options = (step if of_run else None, recipe if of_file else None)
        loaded.append((source, load_weights(source, weights, *options, block_size)))
    first = loaded[0][1].config
    for source, one in loaded[1:]:
        for field in ("block_size", "vocab_size", "num_classes"):
            ours, theirs = getattr(first.model, field), getattr(one.config.model, field)
            if ours != theirs:
                raise UserError(f"{source}: model.{field} = {theirs}, {sources[0]} has {ours}: other images")
    shown, measure = find_images(loaded[0][1], wanted, tokenizer, label, measured)
    maps = [map_run(source, one, layer, shown, measure, method, seed, slots) for source, one in loaded]
    picture = out or _default_path(sources[0], maps[0].layer, method)
    record = as_json(maps, shown, method, seed, slots)
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(picture, maps, shown)
        write_whole(picture.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--out {picture}: cannot be written ({error})") from None
    return picture, record


def _default_path(source: Path, layer: int, method: str) -> Path:
    folder = source / FOLDER if source.is_dir() else Path(FOLDER)
    return folder / f"layer-{layer:02d}-{method}.png"


def as_json(maps: Sequence[RunMap], shown: Images, method: str, seed: int, slots: Slots) -> dict[str, Any]:
    """A row a run; from the second on with its difference in smoothness to the first, image by image."""
    rows = []
    for one in maps:
        s = one.smoothness
        row: dict[str, Any] = {
            "run": one.name, "origin": one.origin, "step": one.step, "layer": one.layer, "weights": one.weights,
            "images": s.images, "neighbour_cosine": s.neighbours, "random_pair_cosine": s.random_pairs,
            "smoothness": s.difference, "ci95": _number(s.ci95),
        }  # fmt: skip
        if one is not maps[0]:
            paired = s.each - maps[0].smoothness.each
            row |= {"over_first": float(paired.mean()), "over_first_ci95": _number(half_width(paired))}
        rows.append(row)
    return {"method": method, "seed": seed, "slots": slots, "shown": shown.names, "runs": rows}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def draw(path: Path, maps: Sequence[RunMap], shown: Images) -> None:
    """A row an image: the picture itself where there is one, then each run's map."""
    from matplotlib.figure import Figure

    offset = 0 if shown.pixels is None else 1
    columns = offset + len(maps)
    figure = Figure(figsize=(2.4 * columns + 0.6, 2.45 * len(shown) + 0.9), layout="constrained")
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for row, name in enumerate(shown.names):
        if shown.pixels is not None:
            axes[row, 0].imshow(shown.pixels[row], interpolation="nearest")
        for k, one in enumerate(maps):
            axes[row, offset + k].imshow(one.colours[row], interpolation="nearest")
        for axis in axes[row]:
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(_plain(name), fontsize=8)
    if offset:
        axes[0, 0].set_title("image", fontsize=9)
    for k, one in enumerate(maps):
        s = one.smoothness
        spread = f" ± {s.ci95:.3f}" if math.isfinite(s.ci95) else ""
        title = f"{_plain(one.name)}\nlayer {one.layer}, smoothness {s.difference:.3f}{spread}"
        axes[0, offset + k].set_title(title, fontsize=9)
    save_figure(path, figure, dpi=130)


def _plain(text: str) -> str:
    """Escapes text so that matplotlib does not take it for mathematics."""
    return text.replace("$", r"\$")
