"""``luna-daemon top``: a live view of the daemon in the terminal."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..core import LunaError
from ..pool.events import model_name
from ..system.units import size, span
from .terminal import make_table

if TYPE_CHECKING:
    from ..client import DaemonClient

_WIDE = 110
"""Width of the terminal, in columns, from which tables are side by side."""
_KEY_S = 0.1
"""Longest wait for a key, and for drawing a new answer."""
_MOST_ROWS = 8
_STYLES = {
    "running": "bold green", "draining": "bold yellow", "idle": "green", "busy": "bold cyan", "loading": "yellow",
    "starting": "yellow", "stopping": "dim",
}  # fmt: skip


def print_once(info: dict[str, Any], address: str) -> None:
    """Print all tables once, as wide as the terminal."""
    console = Console(markup=False, highlight=False)
    console.print(render(info, address, console.width))


def watch(client: DaemonClient, interval: float) -> None:
    """Draw until ``q`` or Ctrl-C; while the daemon does not answer, show the reason and ask again.

    Args:
        interval: seconds between two requests.
    """
    observer = _Observer(client, interval)
    console = Console(markup=False, highlight=False)
    drawn: Any = None
    with (
        _interrupt() as interrupted,
        _keys() as pressed,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while pressed(_KEY_S).lower() != "q" and not interrupted.is_set():
            if (observer.seen, console.size) != drawn:
                drawn = (observer.seen, console.size)
                live.update(observer.render(console.width), refresh=True)


class _Observer:
    """Asks the daemon in a thread, so that keys work while the daemon does not answer."""

    def __init__(self, client: DaemonClient, interval: float) -> None:
        self.seen = 0
        """Number of requests that were answered or failed."""
        self._client = client
        self._interval = interval
        self._address = f"{client.host}:{client.port}"
        self._info: dict[str, Any] | None = None
        self._why = "Waiting for the first answer"
        self._last: float | None = None
        threading.Thread(target=self._ask, name="luna-daemon top", daemon=True).start()

    def _ask(self) -> None:
        while True:
            try:
                self._info = self._client.get_daemon_info()
                self._last = time.time()
            except LunaError as error:
                self._info, self._why = None, str(error)
            self.seen += 1
            time.sleep(self._interval)

    def render(self, width: int) -> RenderableType:
        info = self._info
        return render_away(self._address, self._why, self._last) if info is None else render(info, self._address, width)


def render_away(address: str, why: str, last: float | None) -> RenderableType:
    """Render the view of a daemon that does not answer.

    Args:
        why: the error of the last request.
        last: time of the last answer, in seconds since the epoch.
    """
    seen = "" if last is None else f"Last seen at {time.strftime('%H:%M:%S', time.localtime(last))}. "
    return Group(
        Text.assemble(("Luna Daemon is away", "bold red"), f"  {address}"),
        Text(f"\n{why}"),
        Text(f"\n{seen}Still trying; q quits.", style="dim"),
    )


def render(info: dict[str, Any], address: str, width: int) -> RenderableType:
    """Render all tables for a width in columns, side by side where there is room."""
    left = [_workers(info), _clients(info), _gpus(info)]
    right = [_latency(info), _caches(info), _loras(info), _events(info)]
    head = [_head(info, address), _load(info)]
    if width < _WIDE:
        return Group(*head, *(table for table in [*left, *right] if table is not None))
    both = Table.grid(padding=(0, 4))
    both.add_row(*(Group(*(table for table in side if table is not None)) for side in (left, right)))
    return Group(*head, both)


def _head(info: dict[str, Any], address: str) -> Text:
    rest = f"  {address}  up {span(info['uptime_s'])}  pid {info['pid']}, {size(info['rss'])}  {info['backend']}"
    return Text.assemble(
        (f"Luna Daemon {info['version']} ", "bold"), (info["status"], _STYLES.get(info["status"], "")), rest
    )  # fmt: skip


def _load(info: dict[str, Any]) -> Text:
    queue = info["queue"]
    text = Text(
        f"{info['throughput_per_s']:.1f} requests/s, {info['in_flight']} in flight; queue {queue['waiting']} of "
        f"{queue['limit']}, oldest {queue['oldest_s']:.1f} s, average wait {1000 * queue['average_wait_s']:.0f} ms; "
    )
    losses = {"errors": sum(info["errors"].values()), "crashes": info["crashes"], "fallbacks": info["fallbacks"]}
    for number, (name, count) in enumerate(losses.items()):
        text.append(f"{', ' if number else ''}{name} {count}", style="bold red" if count else "")
    return text


def _table(title: str, columns: str) -> Table:
    return make_table(columns, title=f"\n{title}", title_justify="left", title_style="bold", header_style="dim")


def _workers(info: dict[str, Any]) -> RenderableType:
    if not info["workers"]:
        return Text("\nNo workers: one starts at the first request.", style="dim")
    table = _table("Workers", "># state device models >weights >memory >requests")
    for worker in info["workers"]:
        rest = f" {span(worker['idle_s'])}" if worker["state"] == "idle" else ""
        state = Text(worker["state"] + rest, style=_STYLES.get(worker["state"], ""))
        models, weights = "\n".join(map(model_name, worker["models"])), "\n".join(map(size, worker["models"].values()))
        number, served = str(worker["number"]), str(worker["requests"])
        table.add_row(number, state, worker["device"], models, weights, size(worker["rss"]), served)
    errors = {worker["key"]: worker["last_error"] for worker in info["workers"] if worker["last_error"]}
    return Group(table, *(Text(f"{key}: {error}", style="red") for key, error in errors.items()))


def _latency(info: dict[str, Any]) -> RenderableType | None:
    if not info["latency"]:
        return None
    table = _table("Latency", "op >requests >median_ms >p95_ms >mean_ms")
    for op, latency in sorted(info["latency"].items()):
        total = str(info["requests"].get(op, latency["count"]))
        table.add_row(op, total, *(f"{latency[name]:.1f}" for name in ("p50_ms", "p95_ms", "mean_ms")))
    return table


def _caches(info: dict[str, Any]) -> RenderableType:
    table = _table("Caches and shared memory", "_ >entries >used >limit >hits >misses")
    for name, cache in info["caches"].items():
        table.add_row(
            name, str(cache["entries"]), size(cache["bytes"]), size(cache["max_bytes"]),
            str(cache["hits"]), str(cache["misses"]),
        )  # fmt: skip
    arena = info["arena"]
    if arena["folder"]:
        table.add_row("shared memory", "", size(arena["used"]), size(arena["max_bytes"]), "", "")
    return table


def _loras(info: dict[str, Any]) -> RenderableType | None:
    loras = info["caches"]["lora"]["loras"]
    if not loras:
        return None
    table = _table(f"LoRAs: {min(len(loras), _MOST_ROWS)} of {len(loras)}", "name >memory >hits")
    last = sorted(loras.items(), key=lambda item: -(item[1].get("last_used") or 0))
    for name, lora in last[:_MOST_ROWS]:
        table.add_row(name, size(lora["bytes"]), str(lora["hits"]))
    return table


def _clients(info: dict[str, Any]) -> RenderableType | None:
    clients = [client for client in info["clients"] if client["pid"] != os.getpid()]
    if not clients:
        return Text("\nNo clients except this one.", style="dim")
    table = _table(f"Clients: {len(clients)}", "name >pid transport >memory >in_flight")
    for client in clients[:_MOST_ROWS]:
        transport = "shared memory" if client["shared_memory"] else "tcp"
        table.add_row(
            client["name"], str(client["pid"]), transport, size(client["leased_bytes"]), str(client["in_flight"])
        )  # fmt: skip
    return table


def _gpus(info: dict[str, Any]) -> RenderableType | None:
    if not info["gpus"]:
        return None
    table = _table("GPUs", "># name _ >used >total")
    for gpu in info["gpus"]:
        bar = ProgressBar(total=gpu["total"], completed=gpu["used"], width=20)
        table.add_row(str(gpu["index"]), gpu["name"], bar, size(gpu["used"]), size(gpu["total"]))
    return table


def _events(info: dict[str, Any]) -> RenderableType | None:
    if not info["scaling"]:
        return None
    table = _table("Recent events", "at event >worker _")
    for event in reversed(info["scaling"][-_MOST_ROWS:]):
        at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
        more = " ".join(str(event[name]) for name in ("model", "why") if name in event)
        table.add_row(at, event["event"].replace("_", " "), str(event["worker"]), more)
    return table


@contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """Have Ctrl-C set an event: a ``KeyboardInterrupt`` may get lost while an object is drawn or freed."""
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Give a function that waits some seconds for a key, and returns the key or an empty string."""
    if not sys.stdin.isatty():
        yield _no_key
    elif sys.platform == "win32":
        import msvcrt

        def pressed(seconds: float) -> str:
            time.sleep(seconds)
            return msvcrt.getwch() if msvcrt.kbhit() else ""

        yield pressed
    else:
        import select
        import termios
        import tty

        def pressed(seconds: float) -> str:
            ready, _, _ = select.select([sys.stdin], [], [], seconds)
            return os.read(sys.stdin.fileno(), 1).decode(errors="replace") if ready else ""

        before = termios.tcgetattr(sys.stdin)
        tty.setcbreak(sys.stdin)
        try:
            yield pressed
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _no_key(seconds: float) -> str:
    time.sleep(seconds)
    return ""
