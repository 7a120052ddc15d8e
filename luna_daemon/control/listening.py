"""The listening socket, its TLS context, and the document about both in the runtime folder."""

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


def runtime_document(settings: Settings, port: int) -> dict[str, Any]:
    """Content of ``daemon.json`` in the runtime folder, which this user's clients read."""
    cert = {"tls_cert": str(settings.tls_cert)} if settings.tls_cert else {}
    return {"pid": os.getpid(), "port": port, "ws_port": settings.ws_port, **cert}


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """TLS context for both ports, if the settings name a certificate; warns about a network address without TLS.

    Raises:
        ConfigError: the certificate or the key cannot be used.
    """
    if settings.tls_cert is None:
        if settings.tls_key is not None:
            raise ConfigError("setting 'tls_key' is set without 'tls_cert'", "Set tls_cert too")
        if settings.host != "localhost" and not is_loopback(settings.host):
            logger.warning(
                "listening on %s without TLS: others on the network can read tokens and images; set tls_cert",
                settings.host,
            )
        return None
    return server_context(settings.tls_cert, settings.tls_key)


def bind(settings: Settings) -> socket.socket:
    """Bind a socket to the daemon's port.

    Raises:
        PortInUse: another process, named in the message, listens on the port, or this user may not bind to the port.
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
            f"port {settings.port} on {settings.host} is in use by {_port_holder(settings)}",
            "Stop that process, or choose another --port",
        ) from error
    listener.setblocking(False)
    return listener


def _port_holder(settings: Settings) -> str:
    document = read_facts(settings.port, settings.runtime_dir)
    if document.get("pid") and psutil.pid_exists(int(document["pid"])):
        return f"another Luna Daemon of this user (pid {document['pid']})"
    holder = ports.listener(settings.port)
    return f"{holder[0]!r} (pid {holder[1]})" if holder else "a process of another user"
