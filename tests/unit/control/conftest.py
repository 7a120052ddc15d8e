"""A daemon's state without a socket, and clients whose connection keeps what it was to send."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from luna_daemon.config import load_settings
from luna_daemon.control.access import Access
from luna_daemon.control.peers import ClientPeer
from luna_daemon.control.state import State
from luna_daemon.core import PROTOCOL_VERSION
from luna_daemon.files.resolver import ModelResolver
from luna_daemon.wire import messages as m
from luna_daemon.wire.arena import Slot
from luna_daemon.wire.connection import Connection
from luna_daemon.wire.frame import encode_call
from luna_daemon.wire.shared_memory import SharedMemory
from luna_daemon.workers import WorkerPool

HELLO = m.Hello(PROTOCOL_VERSION, "token", "client", "test", 1)


class Outbox:
    """A connection that keeps every message, and the bytes that travel with it."""

    crowded = False
    is_loopback = False

    def __init__(self) -> None:
        self.sent: list[m.Message] = []
        self.payloads: list[bytes] = []
        self.closed = False

    def send(self, message: m.Message, slots: list[Slot] | None = None) -> None:
        self.sent.append(message)
        self.payloads.append(b"".join(bytes(slot.view) for slot in slots or []))
        for slot in slots or []:
            slot.release()

    def close(self) -> None:
        self.closed = True


class Client:
    """A client that has greeted."""

    def __init__(self, state: State) -> None:
        self.outbox = Outbox()
        self.connection = cast(Connection, self.outbox)
        self.session = state.open_session(self.connection, HELLO)
        self.peer = ClientPeer(state, self.session)

    def ask(self, number: int, call: m.Call, payload: Slot | None = None, **fields: Any) -> None:
        self.peer.received(self.connection, m.Request(number, encode_call(call), **fields), payload)

    def leave(self) -> None:
        self.session.said_bye = True
        self.peer.lost(self.connection, "")


@pytest.fixture
def state(tmp_path) -> Iterator[State]:
    """The state of a daemon without shared memory, workers or a socket."""
    settings = load_settings({"max_tensor_mb": 1, "arena_client_mb": 1}, {})
    made = State(
        settings, WorkerPool(settings, tmp_path), ModelResolver(settings), SharedMemory(None, "off"),
        Access("token", "nowhere", lambda: "another"), lambda state: {}, lambda: None, dict,
    )  # fmt: skip
    yield made
    made.close()


@pytest.fixture
def join(state: State) -> Callable[[], Client]:
    """Make a client."""
    return lambda: Client(state)


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop run until something holds."""
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within 5 s")
