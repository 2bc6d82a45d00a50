"""An arm of a race for tests: it answers what its settings say, and dies where they say so."""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Obey until the parent closes the line."""
    settings = json.loads(sys.argv[1])["settings"]
    for number, line in enumerate(sys.stdin):
        if number == settings.get("dies_at"):
            sys.exit("no memory")
        print(json.dumps(settings["answers"].get(line.split()[0], {})), flush=True)


if __name__ == "__main__":
    main()
