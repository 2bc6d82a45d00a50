"""For tests of one process on a GPU: some multiply matrices before others build a deterministic session."""

from __future__ import annotations

from mirai_ds.runtime.distributed import repeatable_cublas

repeatable_cublas()
