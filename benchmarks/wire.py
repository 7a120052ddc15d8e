"""What the daemon adds to a call: small calls, 12.6 MB out by shared memory and by TCP, the predecessor's way."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from common import Result, client, daemon, median, percentile, result, times_ms

from luna_daemon.client import DaemonClient
from luna_daemon.wire import messages as m

NBYTES = 1024 * 1024 * 3 * 4
"""A 1024x1024 float32 image."""
HELD = 50
ROUNDS, BLOCK = 5, 12


def measure() -> dict[str, Result]:
    found: dict[str, Result] = {}
    with daemon() as running:
        with client(running) as shared, client(running, use_arena=False) as tcp:
            pings = times_ms(shared.ping, 3000, 200)
            found["ping_ms"] = result(median(pings), "ms", "<= 0.1", p99=percentile(pings, 0.99), runs=3000)
            found.update(large(shared, tcp))
        found["clients64"] = many_clients(running)
    return found


def large(shared: DaemonClient, tcp: DaemonClient) -> dict[str, Result]:
    """12.6 MB out, in blocks that take turns, so that what disturbs one side disturbs all.

    Like is compared with like: results of which 50 are held against copies to 50 places in turn; results that die as
    they come (as the predecessor's do) against copies to one place.
    """
    latents = torch.zeros(1, 4, 64, 64)
    source = torch.rand(NBYTES // 4)
    data = memoryview(source.numpy()).cast("B")
    places = [bytearray(NBYTES) for _ in range(HELD)]
    held: list[torch.Tensor] = []
    pickled: list[float] = []

    def by(which: DaemonClient) -> torch.Tensor:
        return which.call(m.Echo(NBYTES), [latents]).tensors[0]

    def copy(number: int) -> None:
        memoryview(places[number % HELD])[:] = data

    sides: dict[str, Callable[[int], object]] = {
        "memcpy_one_place": lambda number: copy(0),
        "memcpy_50_places": copy,
        "shared_memory": lambda number: by(shared),
        "shared_memory_held": lambda number: held.append(by(shared)),
        "tcp": lambda number: by(tcp),
    }
    private = results_are_private(shared, latents)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, work in sides.items():
            block = [timed(work, number) for number in range(HELD if "held" in name or "50" in name else BLOCK)]
            if turn:  # the first round has touched every page
                times[name] += block
        held.clear()
        pickled.append(predecessor_ms())
    ms = {name: median(values) for name, values in times.items()} | {"pickle": median(pickled)}
    all_ms = {f"{name}_ms": round(value, 3) for name, value in ms.items()}
    return {
        "out_12mb_over_memcpy": result(
            ms["shared_memory_held"] / ms["memcpy_50_places"], "x", "<= 1.6", private=private,
            not_held_over_one_place=ms["shared_memory"] / ms["memcpy_one_place"], rounds=ROUNDS, **all_ms,
        ),
        "pickle_over_out_12mb": result(
            ms["pickle"] / ms["shared_memory"], "x", ">= 20", over_held=ms["pickle"] / ms["shared_memory_held"],
            pickle_ms=ms["pickle"], shared_memory_ms=ms["shared_memory"],
            shared_memory_held_ms=ms["shared_memory_held"], rounds=ROUNDS,
        ),
        "tcp_12mb_over_memcpy": result(
            ms["tcp"] / ms["memcpy_one_place"], "x", "<= 12", tcp_ms=ms["tcp"],
            memcpy_one_place_ms=ms["memcpy_one_place"], rounds=ROUNDS,
        ),
    }  # fmt: skip


def predecessor_ms() -> float:
    """The predecessor's call, in processes of its own: what our other buffers did to the allocator must not help it."""
    script = Path(__file__).with_name("predecessor.py")
    return float(subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True).stdout)


def timed(work: Callable[[int], object], number: int) -> float:
    start = time.perf_counter()
    work(number)
    return (time.perf_counter() - start) * 1e3


def results_are_private(which: DaemonClient, latents: torch.Tensor) -> bool:
    """Whether results held at once can be written without changing each other."""
    held = [which.call(m.Echo(NBYTES), [latents]).tensors[0] for _ in range(HELD)]
    for number, tensor in enumerate(held):
        tensor.fill_(number)
    return all(bool((tensor == number).all()) for number, tensor in enumerate(held))


def many_clients(running: Any, count: int = 64, calls: int = 20_000) -> Result:
    """Many connections, many small calls: errors, slowest answers, growth of the control process."""
    control = psutil.Process(running.pid)
    clients = [client(running) for _ in range(count)]
    for one in clients:
        one.ping()
    before = control.memory_info().rss
    times: list[float] = []
    errors: list[str] = []

    def work(one: DaemonClient) -> None:
        for _ in range(-(-calls // count)):
            try:
                times.append(one.ping() * 1e3)
            except Exception as error:
                errors.append(repr(error))

    threads = [threading.Thread(target=work, args=(one,)) for one in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    grown = control.memory_info().rss - before
    for one in clients:
        one.close()
    return result(
        len(errors), "errors", "<= 0", p50_ms=median(times), p99_ms=percentile(times, 0.99), calls=len(times),
        connections=count, rss_growth_mb=grown / 2**20,
    )  # fmt: skip


if __name__ == "__main__":
    for key, row in measure().items():
        print(key, row)
