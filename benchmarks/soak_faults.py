"""The faults of the soak: each function brings one fault about, and returns once the fault is over."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
from soak_stage import Stage

from luna_daemon.core import LunaError
from luna_daemon.wire import messages as m

__all__ = ["FAULTS", "Fault", "fill_arena", "restart_daemon"]

Fault = Callable[[Stage, random.Random], None]


def kill_worker(stage: Stage, chance: random.Random) -> None:
    workers = stage.workers()
    if workers:
        with suppress(psutil.NoSuchProcess):
            chance.choice(workers).kill()


def kill_client(stage: Stage, chance: random.Random) -> None:
    number = chance.choice(sorted(stage.clients))
    stage.clients[number].kill()
    stage.clients.pop(number).wait()
    stage.killed.add(number)
    stage.start_client(max([number, *stage.clients, *stage.killed]) + 1)


def stop_worker(stage: Stage, chance: random.Random) -> None:
    workers = stage.workers()
    if workers:
        worker = chance.choice(workers)
        with suppress(psutil.NoSuchProcess):
            worker.suspend()
            time.sleep(5)
            worker.resume()


def fill_queue(stage: Stage, chance: random.Random) -> None:
    with stage.ask() as client:

        def flood() -> None:
            with suppress(LunaError):
                client.call(m.Echo(0, 0.1))

        threads = [threading.Thread(target=flood) for _ in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def replace_lora(stage: Stage, chance: random.Random) -> None:
    stage.replace_lora()


def restart_daemon(stage: Stage, chance: random.Random) -> None:
    stage.stop_daemon()
    time.sleep(1)
    stage.start_daemon()


def fill_arena(stage: Stage, chance: random.Random) -> None:
    file = stage.arena / "somebody-elses"
    with suppress(OSError), file.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(1 << 20))
    time.sleep(5)
    file.unlink()


FAULTS = [kill_worker, kill_client, stop_worker, fill_queue, replace_lora, fill_arena, restart_daemon]
