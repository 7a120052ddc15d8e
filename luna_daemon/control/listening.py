"""Taking the port: the listening socket, TLS on it, and what this user's clients are told about both."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from typing import Any

import psutil

from ..config import Settings
from ..core import ConfigError, PortInUse, logger
from ..system import ports
from ..system.runtime import is_loopback, read_facts
from ..wire.tls import server_context


def facts_of(settings: Settings, port: int) -> dict[str, Any]:
    """What this user's clients read in the runtime folder."""
    cert = {"tls_cert": str(settings.tls_cert)} if settings.tls_cert else {}
    return {"pid": os.getpid(), "port": port, "ws_port": settings.ws_port, **cert}


def tls_of(settings: Settings) -> ssl.SSLContext | None:
    """TLS for both ports, if it is set; without it, others on the network could read tokens and pictures.

    Raises:
        ConfigError: certificate and key are not what they should be.
    """
    if settings.tls_cert is None:
        if settings.tls_key is not None:
            raise ConfigError("setting 'tls_key' is given without 'tls_cert'", "Name the certificate too")
        if settings.host != "localhost" and not is_loopback(settings.host):
            logger.warning(
                "listening on %s without TLS: whoever shares the network can read tokens and pictures. Set tls_cert",
                settings.host,
            )
        return None
    return server_context(settings.tls_cert, settings.tls_key)


def bind(settings: Settings) -> socket.socket:
    """Take the port, or say who has it.

    Raises:
        PortInUse: taken, or not ours to take.
    """
    try:
        listener = ports.bind(settings.host, settings.port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise ConfigError(
                f"setting 'host' is {settings.host!r}: {error.strerror or error}", "Use an address of this machine"
            ) from error
        raise PortInUse(
            f"port {settings.port} on {settings.host} is in use by {_who_listens(settings)}",
            "Stop it, or choose another --port",
        ) from error
    listener.setblocking(False)
    return listener


def _who_listens(settings: Settings) -> str:
    facts = read_facts(settings.port, settings.runtime_dir)
    if facts.get("pid") and psutil.pid_exists(int(facts["pid"])):
        return f"another Luna Daemon of yours (pid {facts['pid']})"
    holder = ports.listener(settings.port)
    return f"{holder[0]!r} (pid {holder[1]})" if holder else "a process of another user"
