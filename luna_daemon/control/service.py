"""Accepted connections, and the check of their greetings."""

from __future__ import annotations

import asyncio

from .. import __version__
from ..core import PROTOCOL_VERSION, AuthenticationError, Busy, ProtocolError, VersionMismatch, logger
from ..wire import messages as m
from ..wire.arena import Slot
from ..wire.connection import Connection
from ..wire.frame import MAX_HEADER
from .peers import ClientPeer, WorkerPeer
from .state import State

_GREET_S = 5.0
_STALL_S = 60.0
"""A peer that reads nothing for this long is disconnected: its unsent messages occupy memory."""
_READS_S = 1.0
"""A peer that has read nothing for this long does not hold up the shutdown."""
_MAX_PENDING = 256
"""Limit of pending connections; beyond it the oldest is aborted. A client greets within milliseconds."""
_HELLO_BYTES = 64 << 10
"""Largest greeting: a pending connection must not make the daemon allocate more."""


class Service:
    """The daemon's connections, and the peer of each connection until its greeting is accepted."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._connections: set[Connection] = set()
        self._pending: dict[Connection, asyncio.TimerHandle] = {}
        """Pending connections, oldest first, and their greeting timeouts."""

    def connect(self) -> Connection:
        """Make the connection for a socket that was just accepted."""
        connection = Connection(self, _HELLO_BYTES, self.state.limits.tensor_bytes)
        self._connections.add(connection)
        timeout = asyncio.get_running_loop().call_later(_GREET_S, self._abort, connection)
        self._pending[connection] = timeout
        if len(self._pending) > _MAX_PENDING:
            self._abort(next(iter(self._pending)))
        return connection

    def _abort(self, pending: Connection) -> None:
        # Forgotten here: asyncio does not call connection_lost where the TLS handshake failed or has not ended.
        self.lost(pending, "")
        pending.abort()

    def _settle(self, connection: Connection) -> None:
        """Cancel the greeting timeout, whose timer would keep the connection and its buffer in memory."""
        if (timeout := self._pending.pop(connection, None)) is not None:
            timeout.cancel()

    # --- the peer of pending connections ---

    def place(self, connection: Connection, nbytes: int) -> Slot:
        """Refuse tensors of a pending connection.

        Raises:
            AuthenticationError: always.
        """
        raise AuthenticationError("tensors were sent before the greeting")

    def received(self, connection: Connection, message: m.Message, payload: Slot | None) -> None:
        """Check a greeting, and give the connection its ``ClientPeer`` or ``WorkerPeer``.

        Raises:
            ProtocolError: the message is not a greeting, or its protocol version or token is wrong.
            Busy: ``max_clients`` clients are connected.
        """
        if not isinstance(message, m.Hello):
            raise ProtocolError(f"the first message must be hello, not {type(message).__name__}")
        if message.protocol != PROTOCOL_VERSION:
            raise VersionMismatch(
                f"client {message.version or '?'} speaks LDP/{message.protocol}, "
                f"daemon {__version__} speaks LDP/{PROTOCOL_VERSION}",
                "Update the older of the two",
            )
        state = self.state
        if message.role == "worker":
            worker = state.pool.adopt(message.token, connection)
            if worker is None:
                raise AuthenticationError("the worker's token is unknown")
            connection.peer = WorkerPeer(state, worker, self._connections.discard)
            connection.max_header = MAX_HEADER
        else:
            state.access.check(message.token)
            if len(state.sessions) >= state.settings.max_clients:
                raise Busy(f"{len(state.sessions)} clients are connected, which is the limit", "Raise max_clients", 5.0)
            session = state.open_session(connection, message)
            connection.peer = ClientPeer(state, session, self._connections.discard)
            connection.max_header = state.limits.header_bytes
        self._settle(connection)
        memory = state.memory
        connection.send(m.Welcome(state.last_session, __version__, state.limits, memory.info, memory.why))

    def lost(self, connection: Connection, why: str) -> None:
        """Forget a pending connection."""
        self._connections.discard(connection)
        self._settle(connection)

    # --- all connections ---

    def maintain(self) -> None:
        """Release unused memory, and disconnect peers that do not read; called every few seconds."""
        self.state.maintain()
        for connection in list(self._connections):
            if connection.stalled_s > _STALL_S:
                logger.warning("disconnecting %s: it read nothing for %.0f s", connection.remote, connection.stalled_s)
                connection.abort()

    @property
    def unsent(self) -> bool:
        """Whether some peer that still reads has not been sent all its messages."""
        return any(connection.unsent and connection.stalled_s < _READS_S for connection in self._connections)

    def close(self) -> None:
        """Close every connection and empty every cache."""
        self.state.close()
        for connection in list(self._connections):
            connection.close()
