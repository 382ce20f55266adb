"""Refuse files over 1 MB in a commit: weights, token files and corpora do not belong into the history."""

from __future__ import annotations

import sys
from pathlib import Path

LIMIT = 1_000_000


def main(names: list[str]) -> int:
    large = [name for name in names if Path(name).is_file() and Path(name).stat().st_size > LIMIT and name != "uv.lock"]
    for name in large:
        print(f"{name} is larger than {LIMIT:,} bytes; keep it outside of the repository", file=sys.stderr)
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
