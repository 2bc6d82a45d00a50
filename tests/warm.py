"""The process that ranks, pools of ranks and commands are forked from: one a worker of pytest, started when first asked
for.  It has imported what a run needs (`tests/warmed_up.py`), which is most of what a short run takes.
"""

from __future__ import annotations

import multiprocessing as mp
from multiprocessing.context import ForkServerContext


def warm_context() -> ForkServerContext:
    """Processes of this context have everything imported before their first line."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.warmed_up"])
    return context
