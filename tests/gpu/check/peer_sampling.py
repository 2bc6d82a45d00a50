"""LlamaGen's own sampler on one GPU, compiled as its script compiles it: milliseconds a batch, as a row.

python -m tests.gpu.check.peer_sampling FOLDER --size GPT-B --batch 32

FOLDER holds the checkout LlamaGen.  The trainer's own speed is `python -m mirai_ds.benchmarks.sampling`'s: the same
sizes, guidance 2.0, bf16, 256 tokens, without decoding to pixels.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import torch

from tests.gpu.check.native_rows import one

TOKENS, CLASSES, CFG = 256, 1000, 2.0


@torch.no_grad()
def seconds(folder: Path, size: str, batch: int, batches: int, compiled: bool) -> list[float]:
    """Of each batch; the first one compiles and captures."""
    sys.path.insert(0, str(folder / "LlamaGen"))
    torch.backends.cuda.matmul.allow_tf32 = True  # as their script sets it
    torch.set_float32_matmul_precision("high")
    models = importlib.import_module("autoregressive.models.gpt").GPT_models
    generate = importlib.import_module("autoregressive.models.generate").generate
    model = models[size](vocab_size=16384, block_size=TOKENS, num_classes=CLASSES, cls_token_num=1, model_type="c2i")
    model = model.to("cuda", torch.bfloat16).eval()
    torch.nn.init.normal_(model.output.weight, 0, 0.02)  # theirs begins at zero: every token would be as likely
    if compiled:
        model = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    labels, found = torch.arange(batch, device="cuda") % CLASSES, []
    for _ in range(batches):
        torch.cuda.synchronize()
        began = time.perf_counter()
        generate(model, labels, TOKENS, cfg_scale=CFG, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0,
                 sample_logits=True)  # fmt: skip
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the best batch after the first, and the first."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check.peer_sampling", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="GPT-B", choices=("GPT-B", "GPT-L", "GPT-XL"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args(argv)
    first, *others = seconds(args.folder.resolve(), args.size, args.batch, args.batches, not args.eager)
    about = {"model": args.size, "batch": str(args.batch), "precision": "bf16",
             "variant": "LlamaGen's generate, " + ("eager" if args.eager else "compiled with CUDA graphs")}  # fmt: skip
    rows = [one("sampling", "first batch", f"{first:.3g}", "s", **about)]
    if others:
        rows.append(one("sampling", "batch", f"{1e3 * min(others):.4g}", "ms", **about))
    print("\n".join(map(json.dumps, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
