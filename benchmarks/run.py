"""Every benchmark: a table on the terminal and ``build/bench.json``.

python benchmarks/run.py [startup|wire|sharing|cold ...]
"""

from __future__ import annotations

import importlib
import json
import sys

from common import BUILD, machine
from rich.console import Console
from rich.table import Table

ALL = ("startup", "wire", "sharing", "cold")


def main() -> None:
    console = Console()
    results = {}
    for name in sys.argv[1:] or ALL:
        with console.status(f"measuring {name}"):
            results.update(importlib.import_module(name).measure())
    table = Table(title="Luna Daemon, measured")
    for column in ("what", "value", "bar", "sides"):
        table.add_column(column, justify="right" if column == "value" else "left", overflow="fold")
    for key, row in results.items():
        sides = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("value", "unit", "bar"))
        table.add_row(key, f"{row['value']:g} {row['unit']}", row["bar"], sides)
    console.print(table)
    BUILD.mkdir(exist_ok=True)
    (BUILD / "bench.json").write_text(json.dumps({"results": results, "machine": machine()}, indent=2))


if __name__ == "__main__":
    main()
