"""``luna-daemon bench``: times small calls, and 12.6 MB by shared memory and by TCP beside a copy in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .terminal import Bar, tables

if TYPE_CHECKING:
    from ..client import DaemonClient

_TENSOR_BYTES = 1024 * 1024 * 3 * 4
_WARM_UP = 3
_TITLES = {
    "memory_copy": "copy of 12.6 MB",
    "shared_memory": "12.6 MB by shared memory",
    "tcp": "12.6 MB by TCP",
}


def own_daemon(stack: ExitStack, config: Path | None) -> DaemonClient:
    """Start a daemon on free ports, and make a client of this daemon, which ends with the stack.

    Raises:
        ConfigError: a setting is wrong.
        DaemonConnectionError: the daemon did not answer in time.
    """
    from tempfile import TemporaryDirectory

    from ..client import DaemonClient
    from ..daemon_server import LunaDaemon
    from ..system.ports import bind

    folder = Path(stack.enter_context(TemporaryDirectory(prefix="luna-daemon-bench-")))
    with bind("127.0.0.1", 0) as first, bind("127.0.0.1", 0) as second:
        port, ws_port = first.getsockname()[1], second.getsockname()[1]
    stack.enter_context(LunaDaemon("127.0.0.1", port, ws_port, runtime_dir=folder, config_file=config))
    return DaemonClient("127.0.0.1", port, runtime_dir=folder, name="luna-daemon")


def measure(client: DaemonClient, rounds: int) -> dict[str, Any]:
    """Time each kind of call; the kinds alternate, so that a busy machine slows all of them alike.

    Returns:
        Medians in milliseconds, their ratios to the memory copy (``None`` without shared memory), and the transport.
    """
    import numpy as np

    from ..client import DaemonClient
    from ..wire.messages import Echo

    info, call = client.get_daemon_info(), Echo(_TENSOR_BYTES)
    source = np.ones(_TENSOR_BYTES, np.uint8)
    target = np.ones_like(source)
    calls: dict[str, Callable[[], object]] = {"memory_copy": lambda: np.copyto(target, source)}
    if info["transport"] == "shared memory":
        calls["shared_memory"] = lambda: client.call(call)
    with DaemonClient(client.host, client.port, runtime_dir=client.runtime_dir, use_arena=False) as other:
        calls["tcp"] = lambda: other.call(call)
        times: dict[str, list[float]] = {name: [] for name in calls}
        with Bar("timing") as bar:
            for turn in range(rounds + _WARM_UP):
                bar.show(turn, rounds + _WARM_UP)
                for name, timed in calls.items():
                    times[name].append(_ms(timed))
    pings = sorted(_ms(client.ping) for _ in range(300))
    return _numbers({name: series[_WARM_UP:] for name, series in times.items()}, pings, info)


def _numbers(times: dict[str, list[float]], pings: list[float], info: dict[str, Any]) -> dict[str, Any]:
    from statistics import median

    numbers: dict[str, Any] = {"ping_p50_ms": median(pings), "ping_p99_ms": pings[len(pings) * 99 // 100]}
    copy_ms = median(times["memory_copy"])
    for name in _TITLES:
        ms = median(times[name]) if name in times else None
        numbers[f"{name}_ms"] = ms
        if name != "memory_copy":
            numbers[f"{name}_over_copy"] = None if ms is None else ms / copy_ms
    transport = {name: info[name] for name in ("version", "transport", "transport_why")}
    return {"bytes": _TENSOR_BYTES, **numbers, **transport}


def _ms(timed: Callable[[], object]) -> float:
    start = time.perf_counter()
    timed()
    return (time.perf_counter() - start) * 1000


def show_numbers(numbers: dict[str, Any]) -> None:
    """Print what ``measure`` returned as a table."""
    rows = [
        ("small call", f"{numbers['ping_p50_ms']:.3f} ms", ""),
        ("small call, 99th percentile", f"{numbers['ping_p99_ms']:.3f} ms", ""),
    ]
    for key, title in _TITLES.items():
        ms, ratio = numbers[f"{key}_ms"], numbers.get(f"{key}_over_copy")
        rows.append((title, "-" if ms is None else f"{ms:.2f} ms", "" if ratio is None else f"{ratio:.2f}"))
    tables(("Medians", "call >time >in_memory_copies", rows))
    typer.echo(f"\nTensors travel by {numbers['transport']} ({numbers['transport_why']}).")
