"""The static decoder: equal to the model without a cache, compiled or not, and fit to be captured as a CUDA graph."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from mirai_ds.config import ModelConfig
from mirai_ds.model import GPT, Decoder, SamplingRules, Speed, sample_tokens
from mirai_ds.model.decoding import block_step
from mirai_ds.model.rules import image_labels
from tests.model import plain_gpt as plain

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(size="custom", **plain.TINY)
LABELS, INDICES = torch.tensor([0, 3, 1, 4, 2, 2]), torch.tensor([10, 3, 7, 0, 1, 2])
ALL = SamplingRules(cfg_scale=2.0, cfg_interval=7, temperature=0.9, top_k=12, top_p=0.9)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    model = GPT(CONFIG).eval().requires_grad_(False)
    state = plain.ruled({k: tuple(v.shape) for k, v in model.state_dict().items()}, seed=5)
    state["output.weight"] *= 3.0  # peaked enough for the filters to matter
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("stretch", [1, 4, 16])
def test_a_step_equals_the_whole_sequence(gpt: GPT, stretch: int) -> None:
    """Logits of every slot within 1e-5 of teacher-forced ones, whatever the length of a stretch."""
    tokens = torch.randint(48, (3, 15), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 4, 5])
    forced = gpt(tokens, labels).logits
    decoder = Decoder(gpt, 3, SamplingRules())
    for buffers in decoder.cache:
        buffers.key.fill_(7.0)  # what an earlier batch left behind must not be seen
        buffers.value.fill_(-7.0)
    embedded, slots = gpt.embed(tokens, labels, None), torch.arange(16)
    for place in range(16):
        position, span = torch.tensor([place]), min(16, (place // stretch + 1) * stretch)
        mask = None if stretch == 1 else (slots[:span] <= place)[None]
        x = embedded[:, place : place + 1]
        for block, buffers in zip(gpt.layers, decoder.cache, strict=True):
            x = block_step(block, x, gpt.rope[place : place + 1], buffers, position, span, mask)
        assert plain.error(gpt.head(x)[:, 0], forced[:, place]) <= 1e-5, place


def test_buffers_are_kept_from_batch_to_batch(gpt: GPT) -> None:
    """Also a batch that is not full, and one after it: nothing of the one before is seen, nothing is allocated anew."""
    decoder = Decoder(gpt, 4, ALL)
    places = [buffers.key.data_ptr() for buffers in decoder.cache]
    for chosen in (slice(0, 4), slice(4, 6), slice(1, 5)):
        found = decoder.draw(LABELS[chosen], INDICES[chosen], 9)
        assert torch.equal(found, sample_tokens(gpt, LABELS[chosen], INDICES[chosen], ALL, 9))
    assert [buffers.key.data_ptr() for buffers in decoder.cache] == places
    assert decoder.draw(LABELS[:0], INDICES[:0], 9).shape == (0, 16)
    with pytest.raises(ValueError, match="6 images in a batch of 4"):
        decoder.draw(LABELS, INDICES, 9)


def logits_in_batches() -> list[int]:
    """Of GPT-B's width: the sizes of batch, of four rows and more (fewer are another kernel's), in which an image's
    logits are not to the last bit those in a batch of 33."""
    config = ModelConfig(size="custom", dim=768, n_layer=1, n_head=12, vocab_size=64, num_classes=5, block_size=16)
    model = GPT(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.output.weight, 0, 0.02, generator=generator)
    x = torch.randn(33, 1, 768, generator=generator)
    found = {}
    for rows in (33, 4, 8, 16, 27):
        buffers = Decoder(model, rows, SamplingRules()).cache[0]
        out = block_step(model.layers[0], x[:rows], model.rope[3:4], buffers, torch.tensor([3]), 4, None)
        found[rows] = model.head(out)[:2]
    return [rows for rows, logits in found.items() if not torch.equal(logits, found[33])]


def test_fp32_bits_do_not_depend_on_the_batch() -> None:
    """In a process of its own: on Intel's processors MKL must be asked for it before its first product."""
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").exists() else False
    env = {**os.environ, **({"MKL_CBWR": "AVX2,STRICT"} if intel else {})}
    code = "from tests.model.test_decoding import logits_in_batches; print(logits_in_batches())"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", ["guided", pytest.param("all", marks=pytest.mark.matrix)])
def test_compiled_steps_give_the_same_tokens(gpt: GPT, name: str) -> None:
    """torch.compile with stretches; all: guidance that ends, and filters.  Two batches through the same code."""
    rules = {"guided": SamplingRules(cfg_scale=2.0), "all": ALL}[name]
    torch._dynamo.reset()
    counters.clear()
    decoder = Decoder(gpt, 6, rules, Speed(compile=True))
    assert decoder.stretch == 2
    for seed in (9, 10):
        assert torch.equal(decoder.draw(LABELS, INDICES, seed), sample_tokens(gpt, LABELS, INDICES, rules, seed))
    # Blocks share a compilation and so do stretches; a graph more a block or stretch would soon meet dynamo's limit,
    # beyond which it runs what it was given, without a word.
    assert 2 <= counters["stats"]["unique_graphs"] <= 8
    assert not counters["graph_break"]


class Recorder(TorchDispatchMode):
    """Operations with the shapes of their inputs, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = tree_map(lambda a: tuple(a.shape) if isinstance(a, Tensor) else a, args)
        self.calls.append(f"{func} {shapes}")
        return func(*args, **(kwargs or {}))


def test_every_step_of_a_stretch_is_the_same(gpt: GPT) -> None:
    """What a CUDA graph needs: the same operations, shapes and numbers at any position, and no value read back."""
    decoder = Decoder(gpt, 3, SamplingRules(2.0, top_k=5, top_p=0.9))
    decoder.stretch = 8
    seen = []
    for place in (8, 11, 15):
        decoder.position.fill_(place)
        with torch.no_grad(), Recorder() as recorder:
            decoder.step(16, True)
        seen.append(recorder.calls)
    assert len(seen[0]) > 100
    assert seen[0] == seen[1] == seen[2]
    reading = [call for call in seen[0] if any(name in call for name in ("_local_scalar", "nonzero", "is_nonzero"))]
    assert reading == []


def test_a_step_stays_on_its_device() -> None:
    """On tensors without content that say they are on a GPU: an operation that mixed devices, made a tensor elsewhere
    or needed a value would raise."""
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda").uniform_()
    except RuntimeError as error:  # PyTorch 2.8
        pytest.skip(f"this PyTorch asks for a GPU even for tensors without content: {str(error).splitlines()[0]}")
    with FakeTensorMode(), torch.device("cuda"):
        model = GPT(CONFIG).eval().requires_grad_(False)
        decoder = Decoder(model, 3, SamplingRules(2.0, top_k=5, top_p=0.9))
        decoder.stretch = 8
        with torch.no_grad():
            decoder.step(16, True)
        assert decoder.tokens.device.type == "cuda"


def test_random_labels_are_of_the_image_and_uniform() -> None:
    indices = torch.arange(20_000)
    labels = image_labels("random", range(10), 3, indices)
    assert torch.equal(labels[5000:], image_labels("random", range(10), 3, indices[5000:]))
    assert not torch.equal(labels, image_labels("random", range(10), 4, indices))
    counts = torch.bincount(labels, minlength=10)
    assert float(((counts - 2000.0) ** 2 / 2000).sum()) < 27.9  # chi2, 9 degrees: exceeded once in 1,000
    some = image_labels("random", [7, 2], 3, indices)
    assert set(some.tolist()) == {2, 7}


def test_balanced_labels_go_round() -> None:
    assert image_labels("balanced", [4, 0, 2], 0, torch.arange(7)).tolist() == [4, 0, 2, 4, 0, 2, 4]
