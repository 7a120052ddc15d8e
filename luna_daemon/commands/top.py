"""``luna-daemon top``: a live view of the daemon in the terminal."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
    left = _present(_workers(info), _clients(info), _gpus(info))
    right = _present(_latency(info), _caches(info), _loras(info), _events(info))
    head = [_head(info, address), _load(info)]
    if width < _WIDE:
        return Group(*head, *left, *right)
    both = Table.grid(padding=(0, 4))
    both.add_row(Group(*left), Group(*right))
    return Group(*head, both)


def _present(*tables: RenderableType | None) -> list[RenderableType]:
    return [table for table in tables if table is not None]


def _head(info: dict[str, Any], address: str) -> Text:
    rest = f"  {address}  up {span(info['uptime_s'])}  pid {info['pid']}, {size(info['rss'])}  {info['backend']}"
    state = (info["status"], _STYLES.get(info["status"], ""))
    return Text.assemble((f"Luna Daemon {info['version']} ", "bold"), state, rest)


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


def _table(title: str, columns: str, rows: Sequence[Sequence[RenderableType]]) -> Table | None:
    style = {"title_justify": "left", "title_style": "bold", "header_style": "dim"}
    return make_table(columns, rows, title=f"\n{title}", **style) if rows else None


def _workers(info: dict[str, Any]) -> RenderableType:
    rows = [
        (str(w["number"]), _worker_state(w), w["device"], "\n".join(map(model_name, w["models"])),
         "\n".join(map(size, w["models"].values())), size(w["rss"]), str(w["requests"])) for w in info["workers"]
    ]  # fmt: skip
    table = _table("Workers", "># state device models >weights >memory >requests", rows)
    if table is None:
        return Text("\nNo workers: one starts at the first request.", style="dim")
    errors = {worker["key"]: worker["last_error"] for worker in info["workers"] if worker["last_error"]}
    return Group(table, *(Text(f"{key}: {error}", style="red") for key, error in errors.items()))


def _worker_state(worker: dict[str, Any]) -> Text:
    idle = f" {span(worker['idle_s'])}" if worker["state"] == "idle" else ""
    return Text(worker["state"] + idle, style=_STYLES.get(worker["state"], ""))


def _latency(info: dict[str, Any]) -> Table | None:
    rows = [
        (op, str(info["requests"].get(op, latency["count"])),
         *(f"{latency[name]:.1f}" for name in ("p50_ms", "p95_ms", "mean_ms")))
        for op, latency in sorted(info["latency"].items())
    ]  # fmt: skip
    return _table("Latency", "op >requests >median_ms >p95_ms >mean_ms", rows)


def _caches(info: dict[str, Any]) -> Table | None:
    rows = [
        (name, str(cache["entries"]), size(cache["bytes"]), size(cache["max_bytes"]), str(cache["hits"]),
         str(cache["misses"])) for name, cache in info["caches"].items()
    ]  # fmt: skip
    arena = info["arena"]
    if arena["folder"]:
        rows.append(("shared memory", "", size(arena["used"]), size(arena["max_bytes"]), "", ""))
    return _table("Caches and shared memory", "_ >entries >used >limit >hits >misses", rows)


def _loras(info: dict[str, Any]) -> Table | None:
    loras = info["caches"]["lora"]["loras"]
    last = sorted(loras.items(), key=lambda item: -(item[1].get("last_used") or 0))[:_MOST_ROWS]
    rows = [(name, size(lora["bytes"]), str(lora["hits"])) for name, lora in last]
    return _table(f"LoRAs: {len(rows)} of {len(loras)}", "name >memory >hits", rows)


def _clients(info: dict[str, Any]) -> RenderableType:
    clients = [client for client in info["clients"] if client["pid"] != os.getpid()]
    rows = [
        (c["name"], str(c["pid"]), "shared memory" if c["shared_memory"] else "tcp", size(c["leased_bytes"]),
         str(c["in_flight"])) for c in clients[:_MOST_ROWS]
    ]  # fmt: skip
    table = _table(f"Clients: {len(clients)}", "name >pid transport >memory >in_flight", rows)
    return table or Text("\nNo clients except this one.", style="dim")


def _gpus(info: dict[str, Any]) -> Table | None:
    rows = [
        (str(gpu["index"]), gpu["name"], ProgressBar(total=gpu["total"], completed=gpu["used"], width=20),
         size(gpu["used"]), size(gpu["total"])) for gpu in info["gpus"]
    ]  # fmt: skip
    return _table("GPUs", "># name _ >used >total", rows)


def _events(info: dict[str, Any]) -> Table | None:
    rows = [
        (time.strftime("%H:%M:%S", time.localtime(event["at"])), event["event"].replace("_", " "), str(event["worker"]),
         " ".join(str(event[name]) for name in ("model", "why") if name in event))
        for event in reversed(info["scaling"][-_MOST_ROWS:])
    ]  # fmt: skip
    return _table("Recent events", "at event >worker _", rows)


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
