"""Connecting to the daemon: TCP, TLS if configured, ``hello`` and ``welcome``."""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path

from .. import __version__
from ..core import (
    PROTOCOL_VERSION,
    DaemonConnectionError,
    LimitExceeded,
    LunaError,
    ProtocolError,
    error_from_code,
)
from ..system.runtime import find_token, read_facts
from . import messages as m
from .channel import Channel
from .tls import TlsSocket, client_context, pinned_context

_CONNECT_S = 1.0
_GREETING_S = 0.8
"""Short, so that a program that is not a daemon is reported within a second."""


def _connect(host: str, port: int, runtime_dir: Path | None, tls_ca: str) -> socket.socket | TlsSocket:
    """Connect, with TLS if an authority is named or the daemon's runtime folder names its certificate."""
    try:
        sock = socket.create_connection((host, port), timeout=_CONNECT_S)
    except OSError as error:
        raise DaemonConnectionError(
            f"no Luna Daemon answers on {host}:{port} ({error.strerror or error})", "Start it with 'luna-daemon serve'"
        ) from error
    try:
        context = tls_towards(port, runtime_dir, tls_ca)
        return TlsSocket(sock, context, host) if context is not None else sock
    except LunaError:
        sock.close()
        raise


def tls_towards(port: int, runtime_dir: Path | None, tls_ca: str) -> ssl.SSLContext | None:
    """TLS context to check the daemon: by ``tls_ca``, or by the certificate in its runtime folder; or ``None``.

    Raises:
        AuthenticationError: the certificate's file cannot be read.
    """
    if tls_ca:
        return client_context(tls_ca)
    pinned = read_facts(port, runtime_dir).get("tls_cert")
    return pinned_context(Path(pinned)) if pinned else None


def greet(host: str, port: int, runtime_dir: Path | None, name: str, tls_ca: str) -> tuple[Channel, m.Welcome]:
    """Connect, send ``hello`` and receive ``welcome``.

    Raises:
        DaemonConnectionError: no program listens, or the program is not Luna Daemon.
        AuthenticationError, VersionMismatch: the daemon refused this client.
    """
    token = find_token(port, runtime_dir)
    channel = Channel(_connect(host, port, runtime_dir, tls_ca))
    hello = m.Hello(PROTOCOL_VERSION, token, "client", name, os.getpid(), __version__)
    try:
        channel.send(hello)
        received = channel.receive(_GREETING_S)
    except (ProtocolError, LimitExceeded) as error:
        channel.close()
        if isinstance(error, ProtocolError) and error.code != ProtocolError.code:
            raise
        raise DaemonConnectionError(
            f"something else than Luna Daemon listens on {host}:{port}: {error.message}", "Choose another port"
        ) from error
    except DaemonConnectionError as error:
        channel.close()
        raise DaemonConnectionError(
            f"whatever listens on {host}:{port} closed the connection instead of greeting",
            f"{error.message}. A daemon with TLS needs LUNA_TLS_CA",
        ) from error
    message = received[0] if received else None
    if isinstance(message, m.Welcome):
        return channel, message
    channel.close()
    if isinstance(message, m.Failure):
        raise error_from_code(message.code, message.message, message.hint, message.retry_after_s)
    raise DaemonConnectionError(
        f"what listens on {host}:{port} did not greet within {_GREETING_S:g} s: not Luna Daemon, "
        "or the predecessor's daemon on the same port",
        "Stop it, or start Luna Daemon on another port",
    )
