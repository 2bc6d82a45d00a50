"""A block of images: labels, tokens, pixels, and their PNGs where they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirai_ds.config import UserError
from mirai_ds.model import Decoder, gpt_from_weights
from mirai_ds.model.rules import image_labels
from mirai_ds.resumable.parts import Part
from mirai_ds.resumable.plan import WorkPlan
from mirai_ds.runtime.disk import replacing
from mirai_ds.sampling.request import Drawing, SamplingRequest

Array = np.ndarray[Any, Any]

# Products of fewer rows are another kernel's on a CPU, and round otherwise.
FEWEST_ROWS = 4


class DrawJob:
    """Blocks are batches, always full: the last one draws further images and drops them.  So every image is computed in
    the same shapes and in the same company, whatever ranks there are and how often they were killed.  Only where an
    image is the same in any company, a start with another batch draws the blocks of the first one in its own."""

    def __init__(
        self, request: SamplingRequest, drawing: Drawing, plan: WorkPlan, device: torch.device, pictures: Path
    ) -> None:
        self.request, self.drawing, self.plan = request, drawing, plan
        self.device, self.pictures = device, pictures
        self._sampler: Decoder | None = None

    @property
    def sampler(self) -> Decoder:
        """On the device at the first block: a rank with nothing left to draw needs none."""
        if self._sampler is None:
            d = self.drawing
            weights = {name: value.to(self.device, d.dtype) for name, value in d.gpt.items()}
            gpt = gpt_from_weights(d.config.model, weights)
            self._sampler = Decoder(gpt, max(d.batch, FEWEST_ROWS), d.rules, d.speed)
        return self._sampler

    def prepare(self, images: range) -> range:
        """There is nothing to read."""
        return images

    def finish(self, prepared: range, block: int) -> Part:
        """Draw and decode the images of a block; those beyond `prepared` are dropped."""
        d, n = self.drawing, len(prepared)
        size = self.plan.block_images
        rows = min(d.batch, size)
        indices = torch.arange(block * size, block * size + -(-size // rows) * rows)
        labels = image_labels(self.request.policy, d.classes, self.request.seed, indices)
        pieces = zip(labels.to(self.device).split(rows), indices.to(self.device).split(rows), strict=True)
        try:
            tokens = torch.cat([self.sampler.draw(*piece, self.request.seed) for piece in pieces])
            images = self._pixels(tokens, n)
        except torch.cuda.OutOfMemoryError:
            raise UserError(
                f"--batch {d.batch}: does not fit into the GPU's memory; give a smaller one and a new --out"
            ) from None
        if self.request.png:
            write_pngs(self.pictures, prepared, images)
        dtype = np.uint16 if d.config.model.vocab_size <= 65536 else np.int32
        arrays = {"images": images, "tokens": tokens[:n].cpu().numpy().astype(dtype), "labels": labels[:n].numpy()}
        return Part(np.arange(prepared.start, prepared.stop), arrays, [])

    def _pixels(self, tokens: Tensor, n: int) -> Array:
        """uint8 (n, size, size, 3) of the first n.  On a CPU each image alone on one thread: a convolution's last bits
        depend on the images and the threads that share it, and ranks share the cores."""
        d = self.drawing
        if self.device.type != "cpu":
            return d.decoder.decode(tokens, d.size)[:n]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return np.concatenate([d.decoder.decode(one, d.size) for one in tokens[:n].split(1)])
        finally:
            torch.set_num_threads(threads)

    def whole(self, part: Part) -> bool:
        """Whether a finished part is of this plan and its PNGs are there."""
        n, size = len(part.kept), self.drawing.size
        images = part.arrays.get("images")
        if images is None or images.shape != (n, size, size, 3) or {"tokens", "labels"} - set(part.arrays):
            return False
        names = (self.pictures / png_name(int(i)) for i in part.kept)
        return not self.request.png or all(path.is_file() and path.stat().st_size > 0 for path in names)


def png_name(image: int) -> str:
    """The name that LlamaGen's sampler gives an image."""
    return f"{image:06d}.png"


def write_pngs(folder: Path, numbers: range, images: Array) -> None:
    """Writes the images; a file appears under its name only when it is complete."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number, image in zip(numbers, images, strict=True):
        path = folder / png_name(number)
        with replacing(path, flush=False) as part:
            Image.fromarray(image).save(part, format="PNG")
