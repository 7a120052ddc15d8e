"""Every benchmark: a table on the terminal and ``build/bench.json``.

python benchmarks/run.py [startup|wire|sharing|cold|lora ...]

A part alone leaves the other parts' results in ``build/bench.json`` as they are, and so do all of them with those of
``benchmarks/comfy.py``. A bar that is missed is reported; it is no failure.
"""

from __future__ import annotations

import argparse
import importlib

from common import Result, machine, stage
from report import FILE, earlier, table, write
from rich.console import Console

ALL = ("startup", "wire", "sharing", "cold", "lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(ALL)}; all of them without one")
    parts = parser.parse_args().parts
    if unknown := set(parts) - set(ALL):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    console = Console()
    here = machine()
    kept = earlier(FILE, here)
    results: dict[str, Result] = {}
    for name in parts or ALL:
        with stage(console, f"measuring {name}"):
            results.update(importlib.import_module(name).measure())
        write(FILE, {**kept, **results}, here)
    console.print(table(results))


if __name__ == "__main__":
    main()
