"""Output of the commands: tables and progress bars for people, JSON for scripts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

from ..system.units import count, size, span

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from ..wire.messages import Progress

LOADED = "model >memory pinned"


def print_json(document: Any) -> None:
    """Print an indented JSON document to stdout."""
    typer.echo(json.dumps(document, indent=2))


def print_result(as_json: bool, document: Any, line: str) -> None:
    """Print the result of a command: a JSON document for scripts, a line for people."""
    print_json(document) if as_json else typer.echo(line)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(markup=False, highlight=False, stderr=stderr)


def tables(*tables: tuple[str, str, Sequence[tuple[str, ...]]]) -> None:
    """Print tables of (title, columns as for ``make_table``, rows)."""
    console = _console()
    for title, columns, rows in tables:
        if title:
            console.print(f"\n{title}" if rows else f"\n{title}: none")
        if rows:
            console.print(make_table(columns, rows, show_header=bool(title)))


def make_table(columns: str, rows: Iterable[Sequence[RenderableType]], **style: Any) -> Table:
    """Make a table; ``>`` before a column's name aligns the column to the right, ``_`` is a space."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, **style)
    for column in columns.split():
        side: Any = "right" if column[0] == ">" else "left"
        table.add_column(column.lstrip(">").replace("_", " "), justify=side, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def loaded_rows(listing: dict[str, Any]) -> list[tuple[str, ...]]:
    """Make the rows of a table with the columns ``LOADED`` from bytes per ``loaded`` key and the ``pinned`` keys."""
    pinned = listing["pinned"]
    return [(key, size(nbytes), "yes" if key in pinned else "") for key, nbytes in listing["loaded"].items()]


def show_status(info: dict[str, Any], address: str, page: str) -> None:
    """Print an ``info`` of the daemon at ``address``; ``page`` is the address of the daemon's status page."""
    typer.echo(
        f"Luna Daemon {info['version']} is {info['status']} on {address} "
        f"(pid {info['pid']}, {size(info['rss'])}) for {span(info['uptime_s'])}"
    )
    tables(("", "what value", _status_rows(info, page)))
    workers = [
        (str(w["number"]), str(w["pid"]), w["state"], w["device"], "\n".join(w["models"]), size(w["rss"]),
         str(w["requests"])) for w in info["workers"]
    ]  # fmt: skip
    loaded = {key: nbytes for worker in info["workers"] for key, nbytes in worker["models"].items()}
    clients = [
        (c["name"], str(c["pid"]), "shared memory" if c["shared_memory"] else "tcp", size(c["leased_bytes"]),
         str(c["in_flight"])) for c in info["clients"] if c["pid"] != os.getpid()
    ]  # fmt: skip
    gpus = [(str(g["index"]), g["name"], size(g["used"]), size(g["total"])) for g in info["gpus"]]
    comfyuis = _comfyui_rows(info["workers"])
    tables(
        ("Workers", "># >pid state device models >memory >requests", workers),
        *([("ComfyUIs", ">worker version torch folder flags", comfyuis)] if comfyuis else []),
        ("Loaded models", LOADED, loaded_rows({"loaded": loaded, "pinned": info["models"]["pinned"]})),
        ("Clients", "name >pid transport >memory >in_flight", clients),
        ("GPUs", "># name >used >total", gpus),
    )


def _comfyui_rows(workers: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Make a row for each worker that runs ComfyUI, with ComfyUI's folder and the flags that change results."""
    return [
        (str(w["number"]), w["versions"].get("comfyui", ""), w["versions"].get("torch", ""), w["comfyui"]["root"],
         " ".join(w["comfyui"]["flags"])) for w in workers if w["comfyui"]
    ]  # fmt: skip


def _status_rows(info: dict[str, Any], page: str) -> list[tuple[str, str]]:
    queue, arena = info["queue"], info["arena"]
    kinds = ", ".join(f"{op} {count}" for op, count in sorted(info["requests"].items())) or "none"
    errors = ", ".join(f"{code} {count}" for code, count in sorted(info["errors"].items())) or "none"
    caches = [
        (f"{name} cache", f"{c['entries']} entries, {size(c['bytes'])} of {size(c['max_bytes'])}; "
         f"hits {c['hits']}, misses {c['misses']}") for name, c in info["caches"].items()
    ]  # fmt: skip
    shared = f"{size(arena['used'])} used, at most {size(arena['max_bytes'])}, in {arena['folder']}"
    return [
        ("serves", f"{info['service_type']}, backend {info['backend']}"),
        ("models", ", ".join(info["models"]["named"])),
        ("transport", f"{info['transport']}: {info['transport_why']}"),
        ("shared memory", shared if arena["folder"] else f"none: {arena['why']}"),
        ("requests", f"{kinds}; in flight {info['in_flight']}"),
        ("errors", f"{errors}; worker crashes {info['crashes']}"),
        ("fallbacks", f"{info['fallbacks']}; weights loaded by clients {info['materialised']}"),
        ("queue", f"{queue['waiting']} of {queue['limit']}, average wait {queue['average_wait_s']:.3f} s"),
        *caches,
        ("status page", page),
    ]  # fmt: skip


def show_checks(checks: Sequence[tuple[str, str, str, str]]) -> None:
    """Print a row for each check (name, level, finding, advice), and the number of problems and warnings."""
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table.grid(padding=(0, 2))
    for name, level, found, advice in checks:
        text = Text(found)
        if advice:
            text.append(f"\n{advice}.", style="bold")
        table.add_row(Text(level, style=styles[level]), name, text)
    levels = [level for _, level, _, _ in checks]
    sums = [count(levels.count(level), level) for level in ("problem", "warning")]
    _console().print(table, f"\n{', '.join(sums)}")


class Bar:
    """A progress bar on stderr that disappears at the end; not shown where stderr is not a terminal."""

    def __init__(self, title: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        console = _console(stderr=True)
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._title, self._task = title, self._progress.add_task(title, total=None)

    def show(self, step: int, total: int, stage: str = "") -> None:
        """Show how many of ``total`` steps are done; 0 means that the total is unknown."""
        text = f"{self._title}: {stage}" if stage else self._title
        self._progress.update(self._task, description=text, completed=step, total=total or None)

    def progress(self, message: Progress) -> None:
        """Show a progress message of the daemon; ``running`` means that the previous stage goes on."""
        if message.stage != "running":
            self.show(message.step, message.total, message.stage)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()
