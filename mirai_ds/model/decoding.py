"""Decoding of fixed batches, a slot at a time, in buffers that stay.

Every step of a stretch runs the same operations on the same addresses, reads its position from a tensor and never waits
for the device: it can be compiled, and captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mirai_ds.model.gpt import GPT, CachedSlots, KVCache
from mirai_ds.model.rules import SamplingRules, filter_logits, guide, image_keys, pick
from mirai_ds.model.stepwise import new_cache, sample_stepwise
from mirai_ds.runtime.counter_random import uniform

# A stretch is a run of steps over which the attended part of the cache keeps its length.  Eight a sequence read an
# eighth more of the cache than is filled (a single one would read twice as much) and make eight graphs.
STRETCHES = 8


@dataclass(frozen=True)
class Speed:
    """compile: torch.compile of the blocks and the draw.  graphs: capture each stretch's step as a CUDA graph."""

    compile: bool = False
    graphs: bool = False


def block_step(
    block: nn.Module, x: Tensor, rope: Tensor, cache: KVCache, position: Tensor, span: int, mask: Tensor | None
) -> Tensor:
    """One slot through a block, a function of tensors alone as the compiler wants it: x (B, 1, D) at `position` (1,)
    int64, rope (1, head_dim/2, 2) -> (B, 1, D).  mask (1, span) bool: which of the cache's first `span` are filled."""
    out: Tensor = block(x, rope, mask=mask, cached=CachedSlots(cache, position, span))
    return out


# Not cuDNN's, which torch prefers on an H100: it makes a plan for each length of the keys.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Decoder:
    """Draws batches of at most `batch` images from one model by one set of rules; allocates everything once.

    The model must not be trained or moved meanwhile.  With `speed.graphs` it must be on a CUDA device.
    """

    def __init__(self, model: GPT, batch: int, rules: SamplingRules, speed: Speed | None = None) -> None:
        self.model, self.batch, self.rules, self.speed = model, batch, rules, speed or Speed()
        self.guided = rules.cfg_scale > 1.0
        if not model.order.one_by_one:  # buffers are made with each batch
            if self.speed.compile or self.speed.graphs:
                raise ValueError("a model of many slots a step is decoded without compilation and graphs")
            return
        config, device = model.config, model.rope.device
        weight = model.tok_embeddings.weight
        rows = 2 * batch if self.guided else batch
        fixed = self.speed.compile or self.speed.graphs
        # Without a compiler to please, each step attends to exactly what is filled.
        self.stretch = -(-config.block_size // STRETCHES) if fixed else 1
        self.cache = new_cache(model, rows)
        self.x = torch.zeros(rows, 1, config.width, dtype=weight.dtype, device=device)
        self.tokens = torch.zeros(batch, config.block_size, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(config.block_size, batch, device=device)  # what each place of each image draws with
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.slots = torch.arange(config.block_size, device=device)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.speed.graphs else None
        # Blocks share one compilation: their code is the same, their weights are inputs of it.
        self._block = _compiled(block_step) if self.speed.compile else block_step
        self._logits = _compiled(self._guided_logits) if self.speed.compile else self._guided_logits

    @torch.no_grad()
    def draw(self, labels: Tensor, indices: Tensor, seed: int) -> Tensor:
        """Tokens (n, N) int64 of n <= batch images with labels (n,) and global numbers `indices` (n,), int64 on the
        model's device.  Rows of a batch that is not full are computed and dropped: the shapes stay."""
        n = labels.shape[0]
        if n == 0:
            return labels.new_empty(0, self.model.config.block_size)
        if not self.model.order.one_by_one:
            with sdpa_kernel(ATTENTION):
                return sample_stepwise(self.model, labels, indices, self.rules, seed)
        self.begin(labels, indices, seed)
        for place in range(self.model.config.block_size):
            self.advance(place)
        return self.tokens[:n].clone()

    @torch.no_grad()
    def begin(self, labels: Tensor, indices: Tensor, seed: int) -> None:
        """A new batch: its random numbers, its first input, position 0."""
        spare = self.batch - labels.shape[0]
        if spare < 0:
            raise ValueError(f"{labels.shape[0]} images in a batch of {self.batch}")
        labels = F.pad(labels, (0, spare))
        keys = image_keys(seed, F.pad(indices, (0, spare)))
        self.numbers.copy_(uniform(keys.expand_as(self.numbers), self.slots[:, None]))
        both = torch.cat([labels, torch.full_like(labels, self.model.config.num_classes)]) if self.guided else labels
        self.x.copy_(self.model.cls_embedding(both, None))
        self.position.zero_()

    @torch.no_grad()
    def advance(self, place: int) -> None:
        """Draw the token at `place`, the one after the last drawn."""
        span = min(self.model.config.block_size, (place // self.stretch + 1) * self.stretch)
        guided = self.guided and not self._unguided_from(place)
        with sdpa_kernel(ATTENTION):
            if not self.speed.graphs:
                self.step(span, guided)
                return
            if (span, guided) not in self._graphs:
                self._graphs[span, guided] = self._capture(span, guided)
        self._graphs[span, guided].replay()

    def _unguided_from(self, place: int) -> bool:
        """Decode steps are counted from 0, after the first token, which is always guided.  Once guidance is over nobody
        looks at the unconditional rows again: they are left out."""
        return self.rules.cfg_interval > -1 and place - 1 > self.rules.cfg_interval

    def step(self, span: int, guided: bool) -> None:
        """The slot at `self.position`: its logits, its token, the next slot's input; moves the position on."""
        model, rows = self.model, 2 * self.batch if guided else self.batch
        rope = model.rope.index_select(0, self.position)
        mask = None if self.stretch == 1 else (self.slots[:span] <= self.position)[None]
        x = self.x[:rows]
        for block, buffers in zip(model.layers, self.cache, strict=True):
            x = self._block(block, x, rope, buffers, self.position, span, mask)
        chosen = self._draw(self._logits(x, guided))
        entered = self.model.tok_embeddings(chosen)[:, None]
        self.tokens.index_copy_(1, self.position, chosen[:, None])
        self.x[:rows].copy_(entered.repeat(2, 1, 1) if guided else entered)
        self.position.add_(1)

    def _guided_logits(self, x: Tensor, guided: bool) -> Tensor:
        """Of the residual stream x (rows, 1, D): logits (batch, V) float32, guided."""
        logits = self.model.head(x)[:, 0]
        if not guided:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, self.rules.cfg_scale)

    def _draw(self, logits: Tensor) -> Tensor:
        """Tokens (batch,) int64 of logits (batch, V) float32 at this position's random numbers.

        Never compiled: Inductor of torch 2.11 fails on sums along more than a few thousand codes (pytorch issue
        180221), and sorts and sums over a whole vocabulary gain nothing from fusion.
        """
        return pick(filter_logits(logits, self.rules), self.numbers.index_select(0, self.position)[0])

    def _capture(self, span: int, guided: bool) -> torch.cuda.CUDAGraph:
        """Record a step.  It is run first, on a stream of its own as capturing demands, so that libraries and compiled
        code have what they allocate once; what it changed and would not overwrite is put back."""
        kept = self.x.clone(), self.position.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.step(span, guided)
                self.x.copy_(kept[0])
                self.position.copy_(kept[1])
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self.step(span, guided)
        return graph


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile without its own CUDA graphs: those decline functions that write to their inputs, as the cache is.

    A stretch's length becomes a symbol at its second value, so that not every stretch is compiled.
    """
    return torch.compile(function)
