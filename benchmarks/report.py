"""The results of all benchmarks: one file, ``build/bench.json``, and a table on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import BUILD, Result
from rich.table import Table

__all__ = ["FILE", "earlier", "table", "write"]

FILE = BUILD / "bench.json"
_SIGNS = {"at_most": "<=", "at_least": ">="}
_OWN_COLUMNS = ("value", "unit", "bar", "met")


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
