"""One rank of an extraction: `python -m mirai_ds.extract codes ...` under any launcher."""

from __future__ import annotations

from mirai_ds.commands.extract import extract

if __name__ == "__main__":
    extract(prog_name="python -m mirai_ds.extract")
