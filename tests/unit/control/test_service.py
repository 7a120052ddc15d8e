"""Who is let in: greetings, and connections that have not greeted."""

from __future__ import annotations

import asyncio

import pytest

from luna_daemon.control import service as service_module
from luna_daemon.control.peers import ClientPeer, WorkerPeer
from luna_daemon.control.service import Service
from luna_daemon.core import PROTOCOL_VERSION, AuthenticationError, Busy, ProtocolError, VersionMismatch
from luna_daemon.pool.launch import WorkerKey
from luna_daemon.pool.process import WorkerProcess
from luna_daemon.wire import messages as m
from luna_daemon.wire.frame import MAX_HEADER, encode_call
from tests.unit.control.conftest import until


def hello(token: str = "token", role: str = "client", protocol: int = PROTOCOL_VERSION) -> m.Hello:
    return m.Hello(protocol, token, role, "test", 1, "1.0")


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (hello(protocol=PROTOCOL_VERSION + 1), VersionMismatch),
        (hello("wrong"), AuthenticationError),
        (hello("token", "worker"), AuthenticationError),
        (m.Request(1, encode_call(m.Ping())), ProtocolError),
        (m.Bye(), ProtocolError),
    ],
)
def test_greetings_that_are_refused(state, message, error):
    """The connection stays a pending one, without a session, and may send no tensors."""

    async def main() -> None:
        service = Service(state)
        connection = service.connect()
        with pytest.raises(error):
            service.received(connection, message, None)
        assert connection.peer is service and not state.sessions
        with pytest.raises(AuthenticationError):
            connection.peer.place(connection, 8)
        service.close()

    asyncio.run(main())


def test_a_client_and_a_worker_are_spoken_to_by_peers_of_their_own(state, tmp_path):
    """Larger messages are taken from then on; who is gone is forgotten."""

    async def main() -> None:
        service = Service(state)
        worker = WorkerProcess(1, WorkerKey("echo", "cpu"), "cpu", 1, {}, tmp_path / "log")
        state.pool.fleet._by_token[worker.token] = worker
        client, pooled = service.connect(), service.connect()
        service.received(client, hello(), None)
        service.received(pooled, hello(worker.token, "worker"), None)
        assert isinstance(client.peer, ClientPeer) and isinstance(pooled.peer, WorkerPeer)
        assert (client.max_header, pooled.max_header) == (state.limits.header_bytes, MAX_HEADER)
        assert [session.connection for session in state.sessions.values()] == [client]
        assert worker.connection is pooled and not service._pending
        for connection in (client, pooled):
            connection.connection_lost(None)
        assert not state.sessions and not service._connections

    asyncio.run(main())


def test_as_many_clients_as_are_allowed(state):
    """Further ones are told when to come back; one that leaves makes room."""
    state.settings = state.settings.model_copy(update={"max_clients": 1})

    async def main() -> None:
        service = Service(state)
        first, second = service.connect(), service.connect()
        service.received(first, hello(), None)
        with pytest.raises(Busy) as refused:
            service.received(second, hello(), None)
        assert refused.value.retry_after_s == 5.0
        first.connection_lost(None)
        service.received(second, hello(), None)
        service.close()

    asyncio.run(main())


def test_pending_connections_are_few_and_do_not_wait_for_ever(state, monkeypatch):
    """The oldest makes room for a new one; each ends when it has not greeted in time; clients are not counted."""
    monkeypatch.setattr(service_module, "_MAX_PENDING", 2)
    monkeypatch.setattr(service_module, "_GREET_S", 0.05)

    async def main() -> None:
        service = Service(state)
        client, oldest = service.connect(), service.connect()
        service.received(client, hello(), None)
        others = [service.connect() for _ in range(2)]
        assert oldest._closing and not any(other._closing for other in others)
        await until(lambda: all(other._closing for other in others))
        assert not service._pending and not client._closing
        assert service._connections == {client}, "one whose TLS handshake never ends is not kept"

    asyncio.run(main())
