"""`mirai-ds config`: what a recipe may say.  `python -m mirai_ds.cli.config --write` writes docs/configuration.md."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line

if TYPE_CHECKING:
    from mirai_ds.config.reference import Entry

BEGIN, END = "<!-- python -m mirai_ds.cli.config -->", "<!-- end -->"


@click.command(context_settings=CONTEXT)
@click.argument("name", required=False, metavar="[FIELD|SECTION]")
@mistakes_in_one_line
def config(name: str | None) -> None:
    """Explain the fields of a recipe: type, default, meaning, the paper's symbol.

    FIELD is a dotted name or its last part; a SECTION stands for all of its fields.  Names of the paper and of LlamaGen
    lead to ours.

    \b
    Example:
      mirai-ds config foresight
      mirai-ds config warmup_epochs
    """
    from mirai_ds.config.reference import entries, find

    chosen = entries() if name is None else find(name)
    click.echo("\n".join(line for entry in chosen for line in _lines(entry)))


def _lines(entry: Entry) -> list[str]:
    default = f" [{entry.default}]" if entry.default else ""
    symbol = f" (paper: {entry.symbol})" if entry.symbol else ""
    return [f"{entry.name}: {entry.type}{default}{symbol}", f"    {entry.meaning}"]


def page() -> str:
    """All fields as Markdown, a table a section."""
    from mirai_ds.config.reference import entries
    from mirai_ds.runtime import markdown

    sections: dict[str, list[str]] = {}
    for entry in entries():
        section, _, name = entry.name.rpartition(".")
        cells = [f"`{name}`", entry.type, f"`{entry.default}`" if entry.default else "", entry.meaning, entry.symbol]
        sections.setdefault(section, []).append(" | ".join(cell.replace("|", "\\|") for cell in cells))
    parts = [
        f"### {section or 'The run'}\n\n{markdown.table('field | type | default | meaning | paper', rows)}\n"
        for section, rows in sections.items()
    ]
    return "\n".join(parts)


def main() -> None:
    """Prints the page's tables, or writes them into docs/configuration.md of the source tree."""
    from mirai_ds.runtime import markdown

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(page())
        return
    document = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
    text = markdown.replaced(document.read_text(encoding="utf-8"), BEGIN, page(), END, document)
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
