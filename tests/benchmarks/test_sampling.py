"""The document shows the committed rows, and the loops that are compared do the same work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mirai_ds.benchmarks import sampling
from mirai_ds.benchmarks.harness import read
from mirai_ds.config import ModelConfig
from mirai_ds.model import Decoder, SamplingRules
from tests.benchmarks.pages import check_page

torch.set_num_threads(1)


def test_the_document_shows_the_committed_rows() -> None:
    check_page("sampling.md", "sampling", sampling.table)


def test_all_loops_draw_from_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the most likely token in place of a draw, the three write the same image."""
    monkeypatch.setattr(torch, "multinomial", lambda p, n: p.argmax(-1, keepdim=True))
    config = ModelConfig(size="custom", dim=64, n_layer=2, n_head=2, vocab_size=64, num_classes=10, block_size=16)
    gpt, labels = sampling.random_gpt(config, torch.float32, "cpu"), torch.arange(3)
    torch.nn.init.normal_(gpt.output.weight, 0, 1.0, generator=torch.Generator().manual_seed(0))
    plain, tokens = sampling.PlainCache(gpt, labels), torch.zeros(3, 0, dtype=torch.int64)
    for place in range(16):
        plain.advance(place)
        tokens = torch.cat([tokens, sampling.uncached_step(gpt, labels, tokens)], dim=1)
    ours = Decoder(gpt, 3, SamplingRules(sampling.CFG, temperature=0.0)).draw(labels, labels, 0)
    assert torch.equal(torch.cat(plain.tokens, dim=1), ours)
    assert torch.equal(tokens, ours)
    assert len(ours.unique()) > 8


def test_steps_without_a_cache_are_integrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a step as long as its sequence, n steps of lengths 0..n-1 would take n(n-1)/2."""
    config = ModelConfig(size="custom", dim=64, n_layer=1, n_head=2, vocab_size=64, num_classes=10, block_size=64)
    gpt, seen = sampling.random_gpt(config, torch.float32, "cpu"), []
    monkeypatch.setattr(sampling, "uncached_step", lambda gpt, labels, tokens: seen.append(tokens.shape[1]))
    monkeypatch.setattr(sampling, "seconds", lambda run, device: (run(), float(seen[-1]))[1])
    assert sampling.uncached_time(gpt, torch.arange(2), "cpu") == pytest.approx(64 * 63 / 2)
    assert seen == [1, 0, 8, 16, 24, 32, 39, 47, 55, 63]


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    tiny = ["--device", "cpu", "--dim", "32", "--tokens", "16", "--batch", "2"]
    assert sampling.main([*tiny, "--out", str(out)]) == 0
    rows = read(out)
    assert [row["variant"] for row in rows] == ["static buffers", "plain cache", "no cache"]
    for row in rows:
        assert float(row["images_per_s"]) == pytest.approx(2 / (16 * float(row["ms_step"]) / 1e3), rel=1e-2)
        assert float(row["times_as_long"]) == pytest.approx(float(row["ms_step"]) / float(rows[0]["ms_step"]), rel=1e-2)
    assert sampling.main(["--table", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip().endswith(sampling.table(rows))
