"""Networks that are not ours: LlamaGen's `Transformer` by its interface, and what holds the page's examples."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mirai_ds.config import ModelConfig
from mirai_ds.model import GPT, next_token_loss

PAGE = (Path(__file__).parents[2] / "docs" / "library.md").read_text(encoding="utf-8")


def example(name: str) -> ModuleType:
    """The page's file of this name, as a module."""
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if text.startswith(f"# {name}\n"))
    module = ModuleType(name.removesuffix(".py"))
    sys.modules[module.__name__] = module
    exec(compile(block, f"docs/library.md: {name}", "exec"), module.__dict__)
    return module


class Transformer(GPT):
    """Called as LlamaGen's is: (idx, cond_idx, input_pos, targets, mask, valid) -> (logits, loss), and in eval mode
    with a rotary table that fits the whole sequence only."""

    def forward(  # type: ignore[override]
        self, idx: Tensor, cond_idx: Tensor, input_pos: Tensor | None = None, targets: Tensor | None = None,
        mask: Tensor | None = None, valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        x = self.embed(idx, cond_idx, None)
        slots = x.shape[1]
        if not self.training and slots != 1 + self.config.block_size:
            raise RuntimeError(f"shape '[1, {slots}]' is invalid for a table of {1 + self.config.block_size} positions")
        for layer in self.layers:
            x = layer(x, self.rope[:slots])
        logits = self.head(x)
        return logits, None if targets is None else next_token_loss(logits[:, : targets.shape[1]], targets)


def llamagen(monkeypatch: Any) -> None:
    """Put a package `autoregressive.models.gpt` in the place of LlamaGen's."""
    module = ModuleType("autoregressive.models.gpt")
    module.GPT_models = {"GPT-B": lambda **sizes: Transformer(ModelConfig(size="custom", **sizes))}  # type: ignore[attr-defined]
    for name in ("autoregressive", "autoregressive.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Real images: tokens (n, 64) of 17 codes, labels (n,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images[:count], dtype=torch.int64).flatten(1), torch.tensor(data.target[:count])
