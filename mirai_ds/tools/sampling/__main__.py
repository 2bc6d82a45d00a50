"""One rank that draws images: `python -m mirai_ds.tools.sampling SOURCE --num-images ...` under any launcher.

The deepspeed command puts its `--local_rank` right after the module, where `mirai-ds` expects a verb.
"""

from __future__ import annotations

from mirai_ds.commands.sample import sample

if __name__ == "__main__":
    sample(prog_name="python -m mirai_ds.tools.sampling")
