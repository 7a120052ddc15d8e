"""The daemon under load and faults: sixteen clients, a fault every twenty seconds, every answer checked.

    SOAK_S=600 python benchmarks/soak.py

Prints one table, writes ``build/soak.json``, and ends with 1 if a bar was missed.
"""

from __future__ import annotations

import json
import os
import random
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
from common import BUILD, machine
from rich.console import Console
from soak_client import latents
from soak_faults import FAULTS, Fault, fill_arena, restart_daemon
from soak_report import Course, Measured, judge, read_logs, table
from soak_stage import Stage, prepared

from luna_daemon.wire import messages as m

CLIENTS = 16
EVERY_S = 20.0
PAGE = 4096
AFTER_S = 5.0
"""A fault's window ends so long after the fault is over."""


def main() -> None:
    seconds = float(os.environ.get("SOAK_S", "600"))
    console = Console()
    with ExitStack() as stack:
        stage = stack.enter_context(prepared())
        course = run(stage, seconds, console)
        requests = read_logs(stage)
        stack.callback(keep_logs, stage)
    report = judge(course, requests, stage.killed)
    console.print(table(report, f"{CLIENTS} clients for {seconds:g} s, a fault every {EVERY_S:g} s", stage.private))
    (BUILD / "soak.json").write_text(json.dumps({"machine": machine(), "seconds": seconds, **report}, indent=2))
    raise SystemExit(0 if all(row["met"] for row in report["bars"]) else 1)


def run(stage: Stage, seconds: float, console: Console) -> Course:
    """Load without faults for a tenth of the time, then with one every twenty seconds."""
    course = Course()
    stage.start_daemon()
    course.before = quiet(stage)
    for number in range(CLIENTS):
        stage.start_client(number)
    stage.wait_for(lambda info: len(info["clients"]) > CLIENTS, 120)
    time.sleep(5)
    began = time.time()
    time.sleep(max(20.0, seconds / 10))
    course.calm = (began, time.time())
    faults(stage, seconds, course, console)
    stage.stop_clients()
    stage.workers()
    course.after = quiet(stage)
    course.exit_code = stage.stop_daemon()
    course.left_over = leftovers(stage)
    return course


def faults(stage: Stage, seconds: float, course: Course, console: Console) -> None:
    """One after another in an order of chance; each kind comes before any comes again.

    Restarts come early, so that the last daemon lives long enough to show whether it grows.
    """
    chance = random.Random(int(seconds))
    began, due = time.time(), time.time()
    last_restart = began
    waiting: list[Fault] = []
    while time.time() - began < seconds * 0.9:
        if course.minute is None and time.time() - last_restart > 60 and time.time() - began > seconds * 0.4:
            course.minute = measured(stage)
        if not waiting:
            waiting = chance.sample(FAULTS, len(FAULTS))
            if time.time() - began > seconds * 0.3:
                waiting.remove(restart_daemon)
            if not stage.private:
                waiting.remove(fill_arena)
            if time.time() - began < 1:  # the first round has its restart first
                waiting.sort(key=lambda fault: fault is not restart_daemon)
        if time.time() >= due:
            fault = waiting.pop(0)
            console.print(f"{time.time() - began:6.0f} s  {fault.__name__.replace('_', ' ')}")
            start = time.time()
            fault(stage, chance)
            course.windows.append((fault.__name__, start, time.time() + AFTER_S))
            if fault is restart_daemon:
                last_restart, course.minute = time.time(), None
            due = start + EVERY_S
        stage.workers()
        time.sleep(0.5)
    course.rough = (began, time.time())
    if course.minute is None:
        course.minute = measured(stage)


def quiet(stage: Stage) -> Measured:
    """The daemon without clients and with its memory given back: at its start, once it has computed, and at the end."""
    with suppress(TimeoutError):
        stage.wait_for(lambda info: len(info["clients"]) == 1 and not info["in_flight"], 30)
    with stage.ask() as client:
        client.vae_decode(latents(0), "demo")
        client.call(m.ModelUnload())
        for name in list(client.get_daemon_info()["caches"]["lora"]["loras"]):
            client.call(m.LoraEvict(name))
    time.sleep(1)
    return measured(stage)


def measured(stage: Stage) -> Measured:
    """The control process as it is now.

    Each worker costs one connection; every other open file is the daemon's own. Memory that the cache of conditioning
    holds, two tensors per prompt in whole pages, is left out.
    """
    process, workers = stage.process(), len(stage.workers())
    info = stage.info()
    cache = info["caches"]["conditioning"]
    used = info["arena"]["used"] - cache["bytes"] - cache["entries"] * 2 * PAGE
    time.sleep(0.5)  # the daemon has yet to see that the asker's own connection has ended
    return Measured(process.memory_info().rss, process.num_fds() - workers, max(0, used), open_files(process.pid))


def open_files(pid: int) -> list[str]:
    """What a process has open, where the system tells."""
    folder = Path(f"/proc/{pid}/fd")
    found = []
    for link in folder.iterdir() if folder.is_dir() else []:
        with suppress(OSError):
            found.append(os.readlink(link))
    return sorted(found)


def leftovers(stage: Stage) -> list[str]:
    """Processes and files that outlived the daemon."""
    time.sleep(2)
    found = []
    for pid, born in stage.seen.items():
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).create_time() == born:
                found.append(f"worker {pid}")
    found += [str(path) for path in stage.arena.iterdir()]
    if (stage.folder / "run" / str(stage.port)).exists():
        found.append("the runtime folder")
    return found


def keep_logs(stage: Stage) -> None:
    kept = BUILD / "soak"
    kept.mkdir(parents=True, exist_ok=True)
    for path in [*stage.folder.glob("*.jsonl"), stage.folder / "daemon.log"]:
        (kept / path.name).write_bytes(path.read_bytes())


if __name__ == "__main__":
    main()
