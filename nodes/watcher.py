"""Script that stops a daemon once process PID has ended: ``python watcher.py PID HOST PORT RUNTIME_DIR``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

_PAUSE_S = 0.5


def main(pid: int, host: str, port: int, runtime_dir: str) -> None:
    """Wait for the process to end, then shut the daemon down."""
    import psutil

    from luna_daemon.client import DaemonClient
    from luna_daemon.core import LunaError

    try:
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_PAUSE_S)
    except psutil.NoSuchProcess:
        pass
    try:
        with DaemonClient(host, port, runtime_dir=runtime_dir or None, name="watcher") as client:
            client.shutdown()
    except LunaError:
        pass


if __name__ == "__main__":
    # This folder is first on the path of a script; the package lies beside it, if it is not installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
