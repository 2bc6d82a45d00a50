"""How fast images are drawn: `python -m mirai_ds.benchmarks.sampling [--device cuda]`.

  static buffers   this package's decoder; `compiled` with torch.compile and, on a GPU, CUDA graphs
  plain cache      a loop as LlamaGen's sampler writes it: buffers anew for each batch, in which each step scatters its
                   keys and values; attention over all slots, a row of the mask gathered by position, by the plain
                   formula; torch.multinomial
  no cache         the whole sequence again for every token
All with the same weights, guidance and batch.  On a CPU the first three take turns step by step, so that a slow moment
of the machine meets all of them; on a GPU batch by batch.  A step without a cache is measured at nine lengths and
integrated (trapezoids).  Decoding of tokens to pixels is left out.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirai_ds.benchmarks.harness import add_device, append, command_line, facts, new_parser, only_table
from mirai_ds.config import ModelConfig
from mirai_ds.model import GPT, Decoder, SamplingRules, Speed, initialise
from mirai_ds.model.rope2d import apply_rope
from mirai_ds.model.rules import guide
from mirai_ds.runtime import markdown

MODULE = "mirai_ds.benchmarks.sampling"
FIELDS = ("date", "device", "python", "torch", "cuda", "command", "model", "batch", "tokens", "dtype", "variant",
          "ms_step", "images_per_s", "times_as_long")  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CFG = 2.0
WARM_UP = 8  # steps on a CPU; on a GPU a batch, in which everything is compiled and captured
LENGTHS = 8  # intervals between the lengths at which a step without a cache is measured
Row = dict[str, str]


def random_gpt(config: ModelConfig, dtype: torch.dtype, device: str) -> GPT:
    """Weights that a run begins with, and an output that is not zero.  The rotary table stays fp32, as in sampling."""
    gpt = GPT(config).eval().requires_grad_(False)
    initialise(gpt, 0)
    torch.nn.init.normal_(gpt.output.weight, 0, 0.02, generator=torch.Generator().manual_seed(0))
    table = gpt.rope
    gpt = gpt.to(device, dtype)
    gpt.rope = table.to(device)
    return gpt


class PlainCache:
    """A batch the way LlamaGen's sampler works; tokens (B, N) are in `tokens`."""

    def __init__(self, gpt: GPT, labels: Tensor) -> None:
        config, rows = gpt.config, 2 * len(labels)
        slots = math.ceil((1 + config.block_size) / 8) * 8
        shape = (rows, config.heads, slots, config.width // config.heads)
        like = gpt.tok_embeddings.weight
        self.gpt = gpt
        self.cache = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in gpt.layers]
        self.mask = torch.ones(slots, slots, dtype=torch.bool, device=like.device).tril()
        self.x = gpt.cls_embedding(torch.cat([labels, torch.full_like(labels, config.num_classes)]), None)
        self.tokens: list[Tensor] = []

    @torch.no_grad()
    def advance(self, place: int) -> None:
        """Draws the token at `place`."""
        gpt, x = self.gpt, self.x
        position = torch.full((1,), place, dtype=torch.int64, device=x.device)
        mask, rope = self.mask[position][None, None], gpt.rope[position]
        for block, (key, value) in zip(gpt.layers, self.cache, strict=True):
            x = _plain_block(block, x, rope, key, value, position, mask)
        conditional, unconditional = gpt.head(x)[:, 0].chunk(2)
        chosen = torch.multinomial(guide(conditional, unconditional, CFG).softmax(-1), 1)
        self.tokens.append(chosen)
        self.x = gpt.tok_embeddings(torch.cat([chosen, chosen]))


def _plain_block(
    block: Any, x: Tensor, rope: Tensor, key: Tensor, value: Tensor, position: Tensor, mask: Tensor
) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attention = block.attention
    q, k, v = attention.wqkv(block.attention_norm(x)).view(len(x), 1, 3, attention.n_head, -1).unbind(2)
    q, k = apply_rope(q, rope).transpose(1, 2), apply_rope(k, rope).transpose(1, 2)
    key[:, :, position], value[:, :, position] = k, v.transpose(1, 2)
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, key, value, attn_mask=mask)
    h = x + attention.wo(out.transpose(1, 2).reshape(len(x), 1, -1))
    return h + block.feed_forward(block.ffn_norm(h))


@torch.no_grad()
def uncached_step(gpt: GPT, labels: Tensor, tokens: Tensor) -> Tensor:
    """The next token (B, 1) after tokens (B, T), the head on the last slot only."""
    both = torch.cat([labels, torch.full_like(labels, gpt.config.num_classes)])
    x, _ = gpt.blocks(gpt.embed(torch.cat([tokens, tokens]), both, None), None)
    conditional, unconditional = gpt.head(x[:, -1:])[:, 0].chunk(2)
    return torch.multinomial(guide(conditional, unconditional, CFG).softmax(-1), 1)


def seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of one call, the device's work included."""
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def cached_times(gpt: GPT, labels: Tensor, batches: int, compiled: bool, device: str) -> dict[str, float]:
    """Seconds a batch of each variant that keeps a cache, over `batches`, when all are warm."""
    n, count = gpt.config.block_size, len(labels)
    rules, indices = SamplingRules(CFG), torch.arange(count, device=device)
    decoders = {"static buffers": Decoder(gpt, count, rules)}
    if compiled:
        decoders["static buffers, compiled"] = Decoder(gpt, count, rules, Speed(True, device == "cuda"))
    turn = n if device == "cuda" else 1
    totals: dict[str, float] = dict.fromkeys([*decoders, "plain cache"], 0.0)
    for number in range(-1, batches):
        loops: dict[str, Any] = dict(decoders)
        spent = {name: seconds(lambda d=d: d.begin(labels, indices, 0), device) for name, d in decoders.items()}  # type: ignore[misc]
        spent["plain cache"] = seconds(lambda: loops.update({"plain cache": PlainCache(gpt, labels)}), device)  # noqa: B023
        for start in range(0, WARM_UP if number < 0 and turn == 1 else n, turn):
            for name, loop in loops.items():

                def steps(loop: Any = loop, start: int = start) -> None:
                    for place in range(start, start + turn):
                        loop.advance(place)

                spent[name] += seconds(steps, device)
        if number >= 0:
            totals = {name: totals[name] + spent[name] / batches for name in totals}
    return totals


def uncached_time(gpt: GPT, labels: Tensor, device: str, repeat: int = 1) -> float:
    """Seconds a batch without a cache: steps at `LENGTHS` + 1 lengths from the first to the last, integrated."""
    n = gpt.config.block_size
    lengths = sorted({round(i * (n - 1) / LENGTHS) for i in range(LENGTHS + 1)})
    tokens = torch.zeros(len(labels), n, dtype=torch.int64, device=device)
    uncached_step(gpt, labels, tokens[:, :1])
    times = []
    for length in lengths:
        call = lambda length=length: uncached_step(gpt, labels, tokens[:, :length])  # noqa: E731
        times.append(min(seconds(call, device) for _ in range(repeat)))
    pairs = zip(lengths, lengths[1:], times, times[1:], strict=False)
    # The sum over n lengths by the trapezoidal rule: the integral and half of both ends.
    return sum((b - a) * (u + v) / 2 for a, b, u, v in pairs) + (times[0] + times[-1]) / 2


def measure(args: argparse.Namespace, command: str) -> list[Row]:
    """All variants, as rows; the last column compares with the fastest of this package's."""
    sizes = {"size": args.size} if args.dim is None else {
        "size": "custom", "dim": args.dim, "n_layer": 2, "n_head": 2, "vocab_size": 64, "num_classes": 10,
    }  # fmt: skip
    config = ModelConfig(**sizes, block_size=args.tokens)
    gpt = random_gpt(config, DTYPES[args.dtype], args.device)
    labels = torch.arange(args.batch, device=args.device) % config.num_classes
    times = cached_times(gpt, labels, args.batches, args.compile or args.device == "cuda", args.device)
    times["no cache"] = uncached_time(gpt, labels, args.device)
    ours = min(value for name, value in times.items() if name.startswith("static"))
    model = args.size if args.dim is None else "tiny"
    about = {**facts(args.device, command), "model": model, "batch": str(args.batch), "tokens": str(args.tokens),
             "dtype": args.dtype}  # fmt: skip
    return [
        {**about, "variant": name, "ms_step": f"{value / args.tokens * 1e3:.4g}",
         "images_per_s": f"{args.batch / value:.4g}", "times_as_long": f"{value / ours:.3g}"}
        for name, value in times.items()
    ]  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    header = "device | model, tokens, batch | dtype | variant | images/s | ms a step | times as long"
    cells = (
        "{device}, torch {torch}, {date} | {model}, {tokens}, {batch} | {dtype} | {variant} | {images_per_s} "
        "| {ms_step} | {times_as_long}"
    )
    return markdown.table(header, map(cells.format_map, rows), "llllrrr")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, append to the results."""
    argv = sys.argv[1:] if argv is None else argv
    parser = new_parser("sampling", __doc__)
    add_device(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="default bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--size", default="GPT-B")
    parser.add_argument("--dim", type=int, help="a tiny model of this width instead")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, help="images; default 64 on a GPU, 8 on a CPU")
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of a CPU; default torch's")
    parser.add_argument("--compile", action="store_true", help="also on a CPU")
    args = parser.parse_args(argv)
    if only_table(args, table, FIELDS):
        return 0
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    args.batch = args.batch or (64 if args.device == "cuda" else 8)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = measure(args, command_line(f"python -m {MODULE}", argv, [args.out]))
    print(table(rows), flush=True)
    append(args.out, FIELDS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
