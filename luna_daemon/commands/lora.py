"""``luna-daemon lora``: lists, fills and empties the LoRA cache of the daemon."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core import LunaError
from ..system.units import count, size, span
from .options import AsJson, Config, Host, Port, Runtime, dial
from .terminal import Bar, print_json, print_result, tables

_NAMES = typer.Argument(metavar="NAME", help="LoRAs as ComfyUI lists them, files, or folders of files.")
_NAME = typer.Argument(help="A LoRA's name, or its file.")
_ALL = typer.Option("--all", help="Evict all LoRAs that are not pinned.")

lora_app = typer.Typer(
    help="List, warm, pin and evict the LoRAs kept in RAM.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@lora_app.command("ls")
def list_(
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """List the cached LoRAs, the most recently used first."""
    with dial(host, port, config, runtime_dir) as client:
        stats = client.lora_stats()
    if as_json:
        print_json(stats)
        return
    rows = sorted(stats["loras"].items(), key=lambda pair: -pair[1]["last_used"])
    tables(("LoRAs", "name kind >memory >hits >clients pinned >used", [_row(*row) for row in rows]))
    typer.echo(
        f"\n{count(stats['entries'], 'LoRA')}, {size(stats['bytes'])} of {size(stats['max_bytes'])}; "
        f"hits {stats['hits']}, misses {stats['misses']}"
    )


def _row(name: str, lora: dict[str, Any]) -> tuple[str, ...]:
    pinned = "yes" if lora["pinned"] else ""
    return (name, lora["kind"], size(lora["bytes"]), str(lora["hits"]), str(lora["clients"]), pinned,
            f"{span(time.time() - lora['last_used'])} ago")  # fmt: skip


@lora_app.command("warm")
def warm(
    names: Annotated[list[str], _NAMES],
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Load LoRAs into the cache before the first use."""
    wanted = [file for name in names for file in _files(name)]
    warmed: list[dict[str, Any]] = []
    refused: list[str] = []
    with dial(host, port, config, runtime_dir) as client, Bar("LoRAs") as bar:
        for number, name in enumerate(wanted):
            bar.show(number, len(wanted), Path(name).name)
            try:
                warmed.append(client.warm_lora(name))
            except LunaError as error:
                if len(wanted) == 1:
                    raise
                refused.append(str(error))
    nbytes = sum(lora["bytes"] for lora in warmed)
    without_room = [lora["name"] for lora in warmed if not lora["kept"]]
    line = f"warmed {count(len(warmed) - len(without_room), 'LoRA')} ({size(nbytes)})"
    print_result(as_json, {"warmed": warmed, "refused": refused}, line)
    problems = [f"the cache has no room for {name}" for name in without_room] + refused
    for problem in problems:
        typer.echo(f"luna-daemon: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


def _files(name: str) -> list[str]:
    """Resolve an argument: a folder to the LoRA files in it, a file to its path; other names stay."""
    from ..lora.folders import ENDINGS

    path = Path(name)
    if path.is_dir():
        files = [str(file.absolute()) for file in path.rglob("*") if file.suffix.lower() in ENDINGS]
        if not files:
            raise typer.BadParameter(f"there is no LoRA file in {name}", param_hint="NAME")
        return sorted(files)
    return [str(path.absolute()) if path.is_file() else name]


def _cached_name(name: str) -> str:
    """Resolve an argument that is a file to the path that the cache has; other names stay."""
    return str(Path(name).resolve()) if Path(name).is_file() else name


@lora_app.command("pin")
def pin(
    name: Annotated[str, _NAME],
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Load a LoRA and keep it until it is unpinned or evicted."""
    if Path(name).is_dir():
        raise typer.BadParameter(f"{name} is a folder: name one LoRA", param_hint="NAME")
    with dial(host, port, config, runtime_dir) as client:
        _print_pin(client.pin_lora(_files(name)[0]), True, as_json)


@lora_app.command("unpin")
def unpin(
    name: Annotated[str, _NAME],
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Allow a pinned LoRA to be evicted when room is needed."""
    with dial(host, port, config, runtime_dir) as client:
        _print_pin(client.pin_lora(_cached_name(name), False), False, as_json)


def _print_pin(name: str, pinned: bool, as_json: bool) -> None:
    line = f"{name} is {'' if pinned else 'no longer '}pinned"
    print_result(as_json, {"name": name, "pinned": pinned}, line)


@lora_app.command("evict")
def evict(
    name: Annotated[str | None, typer.Argument(help="A LoRA's name, or its file.", show_default=False)] = None,
    everything: Annotated[bool, _ALL] = False,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Remove a LoRA from the cache, or all that are not pinned."""
    if everything == (name is not None):
        raise typer.BadParameter("name one LoRA, or use --all", param_hint="NAME")
    with dial(host, port, config, runtime_dir) as client:
        evicted = client.evict_lora(name and _cached_name(name))
    print_result(as_json, {"evicted": evicted}, f"evicted {count(len(evicted), 'LoRA')}")
