"""Start the operating system's process of a worker."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from .orphans import hold

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
"""Variables that let OpenMP threads spin for at most half a millisecond while they wait.

Spinning slows down all processes on busy cores; sleeping at once is slower on idle cores. No bit depends on this.
Decision record 4 has the measurements.
"""


class Process(Protocol):
    """A started process, such as ``subprocess.Popen``."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit code, or ``None`` while the process runs."""
        ...

    def kill(self) -> None:
        """Kill the process at once."""
        ...


Spawn = Callable[[str, dict[str, Any], Path], Process]
"""The signature of ``spawn``."""


def spawn(interpreter: str, config: dict[str, Any], log: Path) -> Process:
    """Start a worker's process.

    Args:
        interpreter: the Python that runs ``pool/child.py``.
        config: ``child.WorkerConfig`` as a dictionary, written to standard input as one JSON line.
        log: the file to which the process' output is appended.

    Raises:
        OSError: the interpreter cannot be run, or ended before the settings were written.
    """
    script = Path(__file__).resolve().with_name("child.py")
    chosen = WAITING.keys() & os.environ.keys()  # the user has chosen how threads wait
    environment = {**({} if chosen else WAITING), **os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [interpreter, str(script)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            # In its own session, Ctrl-C in the daemon's terminal does not kill a worker that computes.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    try:
        hold(process)
        assert process.stdin is not None
        process.stdin.write(json.dumps(config).encode() + b"\n")
        process.stdin.close()
    except OSError:
        process.kill()
        raise
    return process
