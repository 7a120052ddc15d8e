"""The ``luna-daemon`` command: run the daemon, and ask, fill, measure and stop a running one.

``serve`` must listen as fast as it can, so what only other commands need is imported inside them. Facts go to
stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .core import AuthenticationError, ConfigError, DaemonConnectionError, LunaError, PortInUse, logger

if TYPE_CHECKING:
    from contextlib import ExitStack

    from rich.console import Console

    from .client import DaemonClient
    from .doctor import Check
    from .wire.messages import Progress

__all__ = ["main"]

_REFUSED = (ConfigError, PortInUse, AuthenticationError)
_PICTURE_BYTES = 1024 * 1024 * 3 * 4
_LOG_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"

app = typer.Typer(
    help="Hold VAEs and text encoders once and serve every ComfyUI instance on this machine.",
    epilog="Every setting is also read from LUNA_* variables and luna.toml: see docs/configuration.md.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_HOST = typer.Option(metavar="HOST", help="Address of the daemon [127.0.0.1].")
_PORT = typer.Option(metavar="PORT", help="Port of the daemon [19283].")
_WS_PORT = typer.Option(metavar="PORT", help="Port of its status page [19284].")
_CONFIG = typer.Option(metavar="FILE", help="Configuration file [luna.toml in this folder].")
_RUNTIME = typer.Option("--runtime-dir", metavar="FOLDER", help="Folder of its token [one per user].")
_COMFYUI = typer.Option(metavar="FOLDER", help="ComfyUI's folder [COMFYUI_PATH].")
_MODEL_DIR = typer.Option(metavar="FOLDER", help="A folder with models; may be repeated.")
_DEVICE = typer.Option(metavar="DEVICE", help="auto, cpu, cuda:1 or a GPU's UUID [auto].")
_BACKEND = typer.Option(metavar="NAME", help="What runs the models: auto, comfy or diffusers [auto].")
_SERVICE = typer.Option(metavar="NAME", help="What work to accept: full, vae or clip [full].")
_LOG_LEVEL = typer.Option(metavar="LEVEL", help="DEBUG, INFO, WARNING or ERROR [INFO].")
_KIND = typer.Option(metavar="KIND", help="What to load of it: vae, clip or all.")
_PIN = typer.Option("--pin", help="Keep it loaded until it is unloaded.")
_TIMEOUT = typer.Option(metavar="SECONDS", help="How long to wait for its end.", min=0)
_ROUNDS = typer.Option(metavar="COUNT", help="How often each call is timed.", min=1)
_JSON = typer.Option("--json", help="Print one JSON document and nothing else.")

Host = Annotated[str | None, _HOST]
Port = Annotated[int | None, _PORT]
WsPort = Annotated[int | None, _WS_PORT]
Config = Annotated[Path | None, _CONFIG]
Runtime = Annotated[Path | None, _RUNTIME]
AsJson = Annotated[bool, _JSON]


def main(argv: list[str] | None = None) -> None:
    """Run the command; ends with 0, 1 (no daemon, or it said no) or 2 (wrong usage or setting)."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        app(arguments, prog_name="luna-daemon")
    except LunaError as error:
        if "--json" in arguments:
            status = "stopped" if isinstance(error, DaemonConnectionError) else "error"
            _print_json({"status": status, "error": error.code, "message": error.message, "hint": error.hint})
        typer.echo(f"luna-daemon: {error}", err=True)
        raise SystemExit(2 if isinstance(error, _REFUSED) else 1) from None


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"luna-daemon {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    logging.basicConfig(format="luna-daemon: %(message)s", level=logging.WARNING)


@app.command()
def serve(
    host: Host = None,
    port: Port = None,
    ws_port: WsPort = None,
    config: Config = None,
    comfyui: Annotated[Path | None, _COMFYUI] = None,
    model_dir: Annotated[list[Path] | None, _MODEL_DIR] = None,
    vae_device: Annotated[str | None, _DEVICE] = None,
    clip_device: Annotated[str | None, _DEVICE] = None,
    backend: Annotated[str | None, _BACKEND] = None,
    service_type: Annotated[str | None, _SERVICE] = None,
    log_level: Annotated[str | None, _LOG_LEVEL] = None,
    runtime_dir: Runtime = None,
) -> None:
    """Run the daemon until Ctrl-C or 'luna-daemon stop'."""
    logging.basicConfig(format=_LOG_FORMAT, datefmt="%Y-%m-%d %H:%M:%S", level=logging.INFO, force=True)
    from .daemon_server import LunaDaemon

    daemon = LunaDaemon(
        host, port, ws_port, service_type=service_type, config_file=config, comfyui_path=comfyui,
        model_dirs=model_dir or None, vae_device=vae_device, clip_device=clip_device, backend=backend,
        log_level=log_level.upper() if log_level else None, runtime_dir=runtime_dir,
    )  # fmt: skip
    logger.setLevel(daemon.settings.log_level)
    daemon.run()


@app.command()
def status(
    host: Host = None, port: Port = None, ws_port: WsPort = None, config: Config = None,
    runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Show what the running daemon does and holds."""
    with _dial(host, port, config, runtime_dir) as client:
        info = client.get_daemon_info()
        if as_json:
            _print_json(info)
        else:
            _show_status(info, f"{client.host}:{client.port}", _status_page(client, ws_port, config))


@app.command()
def models(
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """List the models by name, and those loaded."""
    with _dial(host, port, config, runtime_dir) as client:
        listing = client.models()
    if as_json:
        _print_json(listing)
        return
    named = [
        (name, model["type"], kind, "\n".join(model[kind]))
        for name, model in listing["named"].items()
        for kind in ("vae", "clip")
        if model[kind]
    ]
    _tables(("Named", "name type kind files", named), ("Loaded", _LOADED, _loaded_rows(listing)))


@app.command()
def warm(
    name: Annotated[str, typer.Argument(help="A name that 'luna-daemon models' lists.")],
    kind: Annotated[str, _KIND] = "all",
    pin: Annotated[bool, _PIN] = False,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Load a model before the first request needs it."""
    from .wire.messages import ModelRef

    loaded = {}
    with _dial(host, port, config, runtime_dir) as client:
        for one in _kinds(client, name, kind):
            with _Bar(f"{name} ({one})") as bar:
                loaded[one] = client.warm(ModelRef(one, name), pin, bar.progress)
    if as_json:
        _print_json({"model": name, "pinned": pin, "loaded": loaded})
        return
    for one, properties in loaded.items():
        typer.echo(f"{name} ({one}) is loaded{' and pinned' if pin else ''}")
        _tables(("", "property value", [(key, str(value)) for key, value in properties.items()]))


@app.command()
def unload(
    name: Annotated[str | None, typer.Argument(help="A model's name.", show_default="all models")] = None,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Give the memory of one model, or of all, back."""
    from .wire.messages import ModelRef, ModelUnload

    with _dial(host, port, config, runtime_dir) as client:
        refs = [ModelRef(kind, name) for kind in _kinds(client, name, "all")] if name else [None]
        count = sum(client.call(ModelUnload(ref)).result["unloaded"] for ref in refs)
    if as_json:
        _print_json({"unloaded": count})
    else:
        typer.echo(f"unloaded {_count(count, 'model')}")


@app.command()
def stop(
    timeout: Annotated[float, _TIMEOUT] = 60.0,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Let running requests finish, then end the daemon."""
    began = time.monotonic()
    with _dial(host, port, config, runtime_dir) as client:
        info = client.get_daemon_info()
        client.shutdown()
        gone = _end_of(client, info["pid"])
    while not gone() and time.monotonic() - began < timeout:
        time.sleep(0.02)
    ended, waited = gone(), time.monotonic() - began
    facts = {"status": "stopped" if ended else "draining", "pid": info["pid"], "waited_s": round(waited, 3)}
    if as_json:
        _print_json(facts)
    elif ended:
        typer.echo(f"Luna Daemon (pid {info['pid']}) has stopped after {waited:.1f} s")
    if not ended:
        typer.echo(
            f"luna-daemon: process {info['pid']} still finishes its requests after {waited:.0f} s. "
            "Wait, or end the process",
            err=True,
        )
        raise typer.Exit(1)


@app.command()
def doctor(
    host: Host = None, port: Port = None, ws_port: WsPort = None, config: Config = None,
    runtime_dir: Runtime = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Check machine and settings, and say what to do."""
    from .doctor import examine

    overrides = {"host": host, "port": port, "ws_port": ws_port, "runtime_dir": runtime_dir}
    checks = examine(overrides, config)
    problems = sum(check.level == "problem" for check in checks)
    if as_json:
        listing = [{"name": c.name, "level": c.level, "found": c.found, "advice": c.advice} for c in checks]
        _print_json({"problems": problems, "checks": listing})
    else:
        _show_checks(checks)
    raise typer.Exit(1 if problems else 0)


@app.command()
def bench(
    rounds: Annotated[int, _ROUNDS] = 30,
    host: Host = None, port: Port = None, config: Config = None, runtime_dir: Runtime = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Time calls on this machine beside a memory copy.

    Uses the running daemon, or one of its own for as long as it takes.
    """
    from contextlib import ExitStack

    with ExitStack() as stack:
        try:
            client, own = _dial(host, port, config, runtime_dir), False
        except DaemonConnectionError:
            client, own = _temporary_daemon(stack, config), True
        numbers = _measure(stack.enter_context(client), rounds)
    if as_json:
        _print_json({"own_daemon": own, **numbers})
        return
    _show_numbers(numbers)


# --- reaching the daemon ---


def _dial(host: str | None, port: int | None, config: Path | None, runtime_dir: Path | None) -> DaemonClient:
    """A client that has reached the daemon.

    Raises:
        DaemonConnectionError: none answers; one that is about to end is told from none at all.
    """
    from .client import DaemonClient
    from .config import load_settings
    from .runtime import read_facts, runtime_folder

    settings = load_settings({"host": host, "port": port, "runtime_dir": runtime_dir}, config_file=config)
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    # Given a folder, the client need not read the settings once more, and without --config.
    folder = runtime_folder(settings.port, settings.runtime_dir).parent
    client = DaemonClient(address, settings.port, runtime_dir=folder, name="luna-daemon")
    try:
        client.ping()
    except DaemonConnectionError as error:
        pid = read_facts(settings.port, folder).get("pid")
        if pid is None or _has_ended(pid, folder / str(settings.port)):
            raise
        raise DaemonConnectionError(
            f"Luna Daemon (pid {pid}) does not answer on {address}:{settings.port}",
            "It is starting, or finishing its requests: ask again in a moment",
        ) from error
    return client


def _has_ended(pid: int, folder: Path) -> bool:
    """Whether the daemon of this runtime folder is gone; its number may be another process' by now."""
    import psutil

    try:
        process = psutil.Process(pid)
        dead = process.status() == psutil.STATUS_ZOMBIE
        return dead or (folder.exists() and process.create_time() > folder.stat().st_mtime + 1)
    except (psutil.NoSuchProcess, OSError):
        return True
    except psutil.AccessDenied:
        return False


def _end_of(client: DaemonClient, pid: int) -> Callable[[], bool]:
    """Tells whether the daemon is gone: its process here, its socket on another machine."""
    from .runtime import read_facts, runtime_folder

    if read_facts(client.port, client.runtime_dir).get("pid") == pid:
        return lambda: _has_ended(pid, runtime_folder(client.port, client.runtime_dir))

    return lambda: not _listens(client.host, client.port)


def _listens(host: str, port: int) -> bool:
    import socket

    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except OSError:
        return False
    return True


def _status_page(client: DaemonClient, ws_port: int | None, config: Path | None) -> str:
    from .config import load_settings
    from .runtime import read_facts

    known = ws_port or read_facts(client.port, client.runtime_dir).get("ws_port")
    known = known or load_settings(config_file=config).ws_port
    address = f"http://{client.host}:{known}/"
    return address if _listens(client.host, known) else f"{address} does not answer"


def _kinds(client: DaemonClient, name: str, kind: str) -> list[str]:
    """Which kinds of a named model are meant. An unknown name passes: the daemon's own refusal is better."""
    if kind not in ("vae", "clip", "all"):
        raise typer.BadParameter(f"{kind!r} is not one of vae, clip, all", param_hint="--kind")
    named = client.models()["named"]
    model = named.get(name) or named.get(name.lower()) or {"vae": ["?"]}
    return [kind] if kind != "all" else [one for one in ("vae", "clip") if model.get(one)]


# --- the bench ---

_WARM_UP = 3
_WAYS = {
    "memory_copy": "copy of 12.6 MB",
    "shared_memory": "12.6 MB by shared memory",
    "tcp": "12.6 MB by TCP",
}


def _temporary_daemon(stack: ExitStack, config: Path | None) -> DaemonClient:
    from tempfile import TemporaryDirectory

    from .daemon_server import LunaDaemon

    folder = Path(stack.enter_context(TemporaryDirectory(prefix="luna-daemon-bench-")))
    port, ws_port = _free_ports(2)
    stack.enter_context(LunaDaemon("127.0.0.1", port, ws_port, runtime_dir=folder, config_file=config))
    return _dial("127.0.0.1", port, config, folder)


def _free_ports(count: int) -> list[int]:
    import socket
    from contextlib import ExitStack

    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _measure(client: DaemonClient, rounds: int) -> dict[str, Any]:
    """Medians in milliseconds; the ways take turns, so that whatever slows the machine slows all of them."""
    import numpy as np

    from .client import DaemonClient
    from .wire.messages import Echo

    info, call = client.get_daemon_info(), Echo(_PICTURE_BYTES)
    source = np.ones(_PICTURE_BYTES, np.uint8)
    target = np.ones_like(source)
    ways: dict[str, Callable[[], object]] = {"memory_copy": lambda: np.copyto(target, source)}
    if info["transport"] == "shared memory":
        ways["shared_memory"] = lambda: client.call(call)
    with DaemonClient(client.host, client.port, runtime_dir=client.runtime_dir, use_arena=False) as other:
        ways["tcp"] = lambda: other.call(call)
        times: dict[str, list[float]] = {name: [] for name in ways}
        with _Bar("timing") as bar:
            for turn in range(rounds + _WARM_UP):
                bar.show(turn, rounds + _WARM_UP)
                for name, way in ways.items():
                    times[name].append(_ms(way))
    pings = sorted(_ms(client.ping) for _ in range(300))
    return _numbers({name: all_of[_WARM_UP:] for name, all_of in times.items()}, pings, info)


def _numbers(times: dict[str, list[float]], pings: list[float], info: dict[str, Any]) -> dict[str, Any]:
    from statistics import median

    numbers: dict[str, Any] = {"ping_p50_ms": median(pings), "ping_p99_ms": pings[len(pings) * 99 // 100]}
    copy_ms = median(times["memory_copy"])
    for name in _WAYS:
        ms = median(times[name]) if name in times else None
        numbers[f"{name}_ms"] = ms
        if name != "memory_copy":
            numbers[f"{name}_over_copy"] = None if ms is None else ms / copy_ms
    facts = {name: info[name] for name in ("version", "transport", "transport_why")}
    return {"bytes": _PICTURE_BYTES, **numbers, **facts}


def _ms(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return (time.perf_counter() - start) * 1000


# --- what it looks like ---

_LOADED = "model >memory pinned"


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2))


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(markup=False, highlight=False, stderr=stderr)


def _tables(*tables: tuple[str, str, Sequence[tuple[str, ...]]]) -> None:
    """Print tables of (title, column names, rows); ``>`` before a name sets a column to the right."""
    from rich import box
    from rich.table import Table

    console = _console()
    for title, columns, rows in tables:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=bool(title))
        for column in columns.split():
            side: Any = "right" if column[0] == ">" else "left"
            table.add_column(column.lstrip(">").replace("_", " "), justify=side, overflow="fold")
        for row in rows:
            table.add_row(*row)
        if title:
            console.print(f"\n{title}" if rows else f"\n{title}: none")
        if rows:
            console.print(table)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GB"


def _span(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _loaded_rows(listing: dict[str, Any]) -> list[tuple[str, ...]]:
    pinned = listing["pinned"]
    return [(key, _size(size), "yes" if key in pinned else "") for key, size in listing["loaded"].items()]


def _show_status(info: dict[str, Any], address: str, page: str) -> None:
    typer.echo(
        f"Luna Daemon {info['version']} is {info['status']} on {address} "
        f"(pid {info['pid']}, {_size(info['rss'])}) for {_span(info['uptime_s'])}"
    )
    _tables(("", "what value", _status_rows(info, page)))
    workers = [
        (str(w["number"]), str(w["pid"]), w["state"], w["device"], "\n".join(w["models"]), _size(w["rss"]),
         str(w["requests"])) for w in info["workers"]
    ]  # fmt: skip
    loaded = {key: size for worker in info["workers"] for key, size in worker["models"].items()}
    clients = [
        (c["name"], str(c["pid"]), "shared memory" if c["shared_memory"] else "tcp", _size(c["leased_bytes"]),
         str(c["in_flight"])) for c in info["clients"] if c["pid"] != os.getpid()
    ]  # fmt: skip
    gpus = [(str(g["index"]), g["name"], _size(g["used"]), _size(g["total"])) for g in info["gpus"]]
    _tables(
        ("Workers", "># >pid state device models >memory >requests", workers),
        ("Loaded models", _LOADED, _loaded_rows({"loaded": loaded, "pinned": info["models"]["pinned"]})),
        ("Clients", "name >pid transport >holds >in_flight", clients),
        ("GPUs", "># name >used >total", gpus),
    )


def _status_rows(info: dict[str, Any], page: str) -> list[tuple[str, str]]:
    queue, arena = info["queue"], info["arena"]
    kinds = ", ".join(f"{op} {count}" for op, count in sorted(info["requests"].items())) or "none"
    errors = ", ".join(f"{code} {count}" for code, count in sorted(info["errors"].items())) or "none"
    caches = [
        (f"{name} cache", f"{c['entries']} entries, {_size(c['bytes'])} of {_size(c['max_bytes'])}; "
         f"hits {c['hits']}, misses {c['misses']}") for name, c in info["caches"].items()
    ]  # fmt: skip
    shared = f"{_size(arena['used'])} used, at most {_size(arena['max_bytes'])}, in {arena['folder']}"
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


def _show_numbers(numbers: dict[str, Any]) -> None:
    rows = [
        ("small call", f"{numbers['ping_p50_ms']:.3f} ms", ""),
        ("small call, 99th of 100", f"{numbers['ping_p99_ms']:.3f} ms", ""),
    ]
    for key, title in _WAYS.items():
        ms, ratio = numbers[f"{key}_ms"], numbers.get(f"{key}_over_copy")
        rows.append((title, "-" if ms is None else f"{ms:.2f} ms", "" if ratio is None else f"{ratio:.2f}"))
    _tables(("Medians", "call >time >in_copies", rows))
    typer.echo(f"\nTensors go by {numbers['transport']} ({numbers['transport_why']}).")


def _show_checks(checks: list[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table.grid(padding=(0, 2))
    for check in checks:
        text = Text(check.found)
        if check.advice:
            text.append(f"\n{check.advice}.", style="bold")
        table.add_row(Text(check.level, style=styles[check.level]), check.name, text)
    levels = [check.level for check in checks]
    sums = [_count(levels.count(level), level) for level in ("problem", "warning")]
    _console().print(table, f"\n{', '.join(sums)}")


class _Bar:
    """A bar on stderr while something takes long; it leaves no trace."""

    def __init__(self, title: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        console = _console(stderr=True)
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._title, self._task = title, self._progress.add_task(title, total=None)

    def show(self, step: int, total: int, stage: str = "") -> None:
        """Say how far it is; a ``total`` of 0 is unknown."""
        text = f"{self._title}: {stage}" if stage else self._title
        self._progress.update(self._task, description=text, completed=step, total=total or None)

    def progress(self, message: Progress) -> None:
        """What the daemon says while a call runs."""
        if message.stage != "running":  # a mere sign of life: what was said before still holds
            self.show(message.step, message.total, message.stage)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()
