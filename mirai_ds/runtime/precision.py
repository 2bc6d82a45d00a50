"""How the device multiplies fp32 matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch


@contextmanager
def float32_products(mode: Literal["ieee", "tf32"]) -> Iterator[None]:
    """fp32 products exact or in TF32 meanwhile; afterwards the process's own settings are back."""
    if not hasattr(torch.backends.cudnn, "conv"):  # torch 2.8 has one switch each
        old = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        try:
            torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = mode == "tf32"
            yield
        finally:
            torch.set_float32_matmul_precision(old[0])
            torch.backends.cudnn.allow_tf32 = old[1]
        return
    # The modes by operation alone: later torch refuses to read the old switches where a program has set the modes.
    cpu: Any = torch.backends.mkldnn  # its TF32 is not for every processor, and no reference ran with it
    holders: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, cpu.matmul, cpu.conv]
    saved = [holder.fp32_precision for holder in holders]
    try:
        for holder, value in zip(holders, (mode, mode, "ieee", "ieee"), strict=True):
            holder.fp32_precision = value
        yield
    finally:
        for holder, value in zip(holders, saved, strict=True):
            holder.fp32_precision = value
