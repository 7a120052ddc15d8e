"""TCP ports of this machine: binds a port, finds the process that listens on a port, tests if a port answers."""

from __future__ import annotations

import socket

_ANSWER_S = 0.5


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket that no other process can share; port 0 stands for any free port.

    Raises:
        OSError: the port is taken (``EADDRINUSE``), or this process may not use the host or port.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    # On Windows SO_REUSEADDR would let two daemons share the port; elsewhere it only skips TIME_WAIT.
    bound.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR), 1)
    try:
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def listener(port: int) -> tuple[str, int] | None:
    """Find name and pid of the process that listens on a port; ``None`` if this user may not see the process."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return psutil.Process(connection.pid).name(), connection.pid
    except (psutil.Error, OSError):
        pass
    return None


def answers(host: str, port: int) -> bool:
    """Return whether a connection to the port is accepted within half a second."""
    try:
        socket.create_connection((host, port), timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True
