"""Which attention torch chooses on an H100, where cuDNN's is its first choice: by torch's own rules, nothing is run.

(The rest of the rehearsal has cuDNN switched off, since it is none of the fake's libraries.)
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

pytestmark = pytest.mark.rehearsal

CHOICE = """
import json, torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
torch.backends.cudnn.enabled = True
torch.backends.cuda.enable_cudnn_sdp(True)
def choice(q, k, v, attn_mask=None, is_causal=False):
    return SDPBackend(torch._fused_sdp_choice(q, k, v, attn_mask, 0.0, is_causal)).name
"""
TRAINING = """
q = torch.zeros(8, 12, 256, 64, device="cuda", dtype=getattr(torch, {dtype!r}), requires_grad=True)
mask = torch.ones(256, 256, dtype=torch.bool, device="cuda") if {masked} else None
free = choice(q, q, q, mask, mask is None)
torch.use_deterministic_algorithms(True)
print(json.dumps([free, choice(q, q, q, mask, mask is None)]))
"""
DRAWN = """
from mirai_ds.model import Decoder, GPT, SamplingRules, Speed, initialise
from mirai_ds.config import ModelConfig
gpt = GPT(ModelConfig(size="custom", dim=256, n_layer=2, n_head=4, vocab_size=512, num_classes=4, block_size=64,
                      par_tokens={par})).eval()
initialise(gpt, 0)
gpt = gpt.to("cuda", torch.bfloat16)
attend, chosen = F.scaled_dot_product_attention, []
def watched(*arguments, **named):
    chosen.append(choice(*arguments, **named))
    return attend(*arguments, **named)
F.scaled_dot_product_attention = watched
q = torch.zeros(8, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
k = torch.zeros(8, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
with torch.no_grad():
    usual = choice(q, k, k)
labels = torch.arange(4, device="cuda")
Decoder(gpt, 4, SamplingRules(2.0), Speed(False, False)).draw(labels, labels, 0)
print(json.dumps([usual, len(chosen), sorted(set(chosen))]))
"""


def answer(told: str) -> object:
    return json.loads(told.splitlines()[-1])


def prefers_cudnn(usual: str) -> None:
    """Else nothing was avoided: torch 2.8 takes flash attention by itself."""
    if usual != "CUDNN_ATTENTION":
        pytest.skip(f"torch {torch.__version__} prefers {usual} to cuDNN's")


@pytest.mark.parametrize(("dtype", "masked", "expected"), [
    ("bfloat16", False, "FLASH_ATTENTION"), ("bfloat16", True, "EFFICIENT_ATTENTION"),
    ("float32", False, "EFFICIENT_ATTENTION"),
])  # fmt: skip
def test_training_that_must_repeat_itself_takes_kernels_that_do(
    run_code: Callable[..., str], dtype: str, masked: bool, expected: str
) -> None:
    code = CHOICE + TRAINING.format(dtype=dtype, masked=masked)
    free, bound = answer(run_code(code, values="none", capability=90))  # type: ignore[misc]
    assert bound == expected
    if dtype == "bfloat16":
        prefers_cudnn(free)


@pytest.mark.parametrize("par", [None, 4])
def test_drawing_makes_no_plan_for_each_length(run_code: Callable[..., str], par: int | None) -> None:
    """cuDNN's attention would."""
    usual, calls, chosen = answer(run_code(CHOICE + DRAWN.format(par=par), capability=90))  # type: ignore[misc]
    assert calls > 16
    assert set(chosen) <= {"FLASH_ATTENTION", "EFFICIENT_ATTENTION"}
    prefers_cudnn(usual)
