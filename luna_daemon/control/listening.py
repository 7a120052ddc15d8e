"""The listening socket, its TLS, and what the runtime folder tells this user's clients about both."""

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
    """The runtime folder's document about the daemon, which this user's clients read."""
    cert = {"tls_cert": str(settings.tls_cert)} if settings.tls_cert else {}
    return {"pid": os.getpid(), "port": port, "ws_port": settings.ws_port, **cert}


def tls_of(settings: Settings) -> ssl.SSLContext | None:
    """TLS for both ports, if the settings name a certificate; warns where a network can read along without it.

    Raises:
        ConfigError: the certificate or the key cannot be used.
    """
    if settings.tls_cert is None:
        if settings.tls_key is not None:
            raise ConfigError("setting 'tls_key' is given without 'tls_cert'", "Name the certificate too")
        if settings.host != "localhost" and not is_loopback(settings.host):
            logger.warning(
                "listening on %s without TLS: others on the network can read tokens and pictures. Set tls_cert",
                settings.host,
            )
        return None
    return server_context(settings.tls_cert, settings.tls_key)


def bind(settings: Settings) -> socket.socket:
    """Bind a socket to the daemon's port.

    Raises:
        PortInUse: another process has the port, which the message names, or this user may not take it.
        ConfigError: the host is not an address of this machine.
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
