"""Compiled steps and CUDA graphs draw what plain steps draw.  Skipped, with the reason, where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mirai_ds.config import ModelConfig
from mirai_ds.model import Decoder, SamplingRules, Speed, gpt_from_weights, sample_tokens
from mirai_ds.model.decoding import block_step
from mirai_ds.runtime.distributed import World
from mirai_ds.sampling import draw_archive
from tests.gpu.test_gpu import TINY, tiny_gpt
from tests.model import plain_gpt as plain
from tests.sampling.conftest import request_of, tiny  # noqa: F401  (a fixture)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]
SPEEDS = {"graphs": Speed(False, True), "compiled": Speed(True, False), "both": Speed(True, True)}
RULES = {
    "guided": SamplingRules(2.0),
    "all": SamplingRules(2.0, cfg_interval=20, temperature=0.9, top_k=12, top_p=0.9),
    "plain": SamplingRules(),
}


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("rules", RULES)
def test_the_same_tokens(speed: str, rules: str) -> None:
    """fp32 without TF32.  Other kernels sum in another order, which can flip a draw and what follows it, as can a
    stretch behind a mask.  Three batches: the graphs are captured in the first."""
    torch.backends.cuda.matmul.allow_tf32 = False
    weights = {name: p.detach().cuda() for name, p in tiny_gpt().named_parameters()}
    gpt = gpt_from_weights(ModelConfig(**TINY), weights)
    decoder = Decoder(gpt, 16, RULES[rules], SPEEDS[speed])
    labels = torch.arange(16, device="cuda") % 5
    for start in (0, 16, 32):
        indices = torch.arange(start, start + 16, device="cuda")
        found = decoder.draw(labels, indices, 0)
        assert (found == sample_tokens(gpt, labels, indices, RULES[rules], 0)).float().mean() > 0.95
        assert torch.equal(found, decoder.draw(labels, indices, 0))


def test_graphs_do_not_change_what_is_captured() -> None:
    """Compiled with and without graphs: the same kernels, so the same bits in bf16 too."""
    weights = {name: p.detach().cuda().bfloat16() for name, p in tiny_gpt().named_parameters()}
    gpt = gpt_from_weights(ModelConfig(**TINY), weights)
    labels, indices = torch.arange(16, device="cuda") % 5, torch.arange(16, device="cuda")
    found = [Decoder(gpt, 16, RULES["all"], SPEEDS[name]).draw(labels, indices, 0) for name in ("compiled", "both")]
    assert torch.equal(*found)


def test_cached_logits_equal_teacher_forced_ones() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    gpt = tiny_gpt().cuda().eval().requires_grad_(False)
    decoder = Decoder(gpt, 4, SamplingRules(), Speed(False, True))
    labels = torch.arange(4, device="cuda")
    tokens = decoder.draw(labels, labels, 0)
    forced = gpt(tokens[:, :-1], labels).logits
    x = gpt.embed(tokens[:, -2:-1], labels, None)[:, 1:]
    position = torch.tensor([63], device="cuda")
    for block, buffers in zip(gpt.layers, decoder.cache, strict=True):
        x = block_step(block, x, gpt.rope[63:64], buffers, position, 64, None)
    assert plain.error(gpt.head(x)[:, 0].cpu(), forced[:, 63].cpu()) <= 1e-5


def test_many_images(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    """The whole command in bf16 with everything on, twice: the same bytes."""
    world = World(0, 0, 1, 1)
    for name in ("a", "b"):
        draw_archive(request_of(tiny, tmp_path / f"{name}.npz"), world)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert '"cuda_graphs": true' in (tmp_path / "a.npz.json").read_text()
