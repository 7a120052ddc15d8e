"""Every benchmark: a table on the terminal and ``build/bench.json``.

python benchmarks/run.py [startup|wire|sharing|cold|lora ...]

A part alone leaves the other parts' results in ``build/bench.json`` as they are. A bar that is missed is reported; it
is no failure.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from common import BUILD, Result, machine, stage
from rich.console import Console
from rich.table import Table

ALL = ("startup", "wire", "sharing", "cold", "lora")
FILE = BUILD / "bench.json"
_SIGNS = {"at_most": "<=", "at_least": ">="}
_OWN_COLUMNS = ("value", "unit", "bar", "met")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(ALL)}; all of them without one")
    parts = parser.parse_args().parts
    if unknown := set(parts) - set(ALL):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    console = Console()
    here = machine()
    kept = earlier(FILE, here) if parts else {}
    results: dict[str, Result] = {}
    for name in parts or ALL:
        with stage(console, f"measuring {name}"):
            results.update(importlib.import_module(name).measure())
        write(FILE, {**kept, **results}, here)
    console.print(table(results))


def earlier(path: Path, here: dict[str, Any]) -> dict[str, Result]:
    """Results that are in the file already; those of another machine do not belong beside new ones."""
    try:
        document = json.loads(path.read_text())
        found: dict[str, Result] = document["results"] if document["machine"] == here else {}
    except (OSError, ValueError, KeyError):
        return {}
    return found


def write(path: Path, results: dict[str, Result], here: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"results": results, "machine": here}, indent=2))


def table(results: dict[str, Result]) -> Table:
    shown = Table(title="Luna Daemon, measured")
    for column in ("what", "value", "bar", "met", "sides"):
        shown.add_column(column, justify="right" if column == "value" else "left", overflow="fold")
    for key, row in results.items():
        sides = ", ".join(f"{name} {side}" for name, side in row.items() if name not in _OWN_COLUMNS)
        bar = "".join(f"{_SIGNS[side]} {limit:g}" for side, limit in (row["bar"] or {}).items())
        met = {True: "yes", False: "NO", None: ""}[row["met"]]
        shown.add_row(key, f"{row['value']:g} {row['unit']}", bar, met, sides)
    return shown


if __name__ == "__main__":
    main()
