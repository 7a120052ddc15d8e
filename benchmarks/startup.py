"""How soon a daemon answers: from starting ``luna-daemon serve`` to the first answered ping."""

from __future__ import annotations

import subprocess
import sys
import time

from common import RUNTIME, Result, free_port, median, result

from luna_daemon.client import DaemonClient
from luna_daemon.core import LunaError

RUNS = 10
_IMPORTS = ("pass", "import asyncio", "import luna_daemon.config", "import luna_daemon.daemon_server")


def ready_once() -> float:
    port = free_port()
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "luna_daemon", "serve", "--port", str(port), "--ws-port", str(free_port()),
         "--runtime-dir", str(RUNTIME)],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with DaemonClient("127.0.0.1", port, runtime_dir=RUNTIME) as client:
            while True:
                try:
                    client.ping()
                    return time.perf_counter() - start
                except LunaError:
                    time.sleep(0.002)
    finally:
        process.terminate()
        process.wait(30)


def bare_import(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def measure() -> dict[str, Result]:
    ready = [ready_once() for _ in range(RUNS)]
    bare = {code: round(median([bare_import(code) for _ in range(5)]), 3) for code in _IMPORTS}
    return {"ready_s": result(median(ready), "s", "<= 0.7", runs=RUNS, worst=max(ready), bare_imports_s=bare)}


if __name__ == "__main__":
    print(measure())
