"""What is fuzzed: bytes of a peer against the service that a daemon has behind its socket, without processes.

One input is a script: its first byte says who speaks (a stranger, a client, a client that sees shared memory), the rest
is what they send, either as raw bytes or as frames whose lengths are right and whose content is the fuzzer's.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import tempfile
from pathlib import Path
from typing import Any

from luna_daemon.config import load_settings
from luna_daemon.control.access import Access
from luna_daemon.control.peers import ClientPeer
from luna_daemon.control.service import Service
from luna_daemon.control.state import State
from luna_daemon.core import PROTOCOL_VERSION
from luna_daemon.files.resolver import ModelResolver
from luna_daemon.wire import messages as m
from luna_daemon.wire.arena import open_arena
from luna_daemon.wire.frame import encode_frame
from luna_daemon.wire.shared_memory import SharedMemory
from luna_daemon.workers import WorkerPool

__all__ = ["Target", "framed"]

_PIECE = 3000
_PER_SERVICE = 5000
"""Inputs before the service is made anew: its counters would grow."""


class Wire(asyncio.Transport):
    """A transport that takes everything and keeps the last of it."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.said = b""

    def write(self, data: Any) -> None:
        self.said = bytes(data)[:200]

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self if name == "socket" else default

    def setsockopt(self, *option: Any) -> None: ...
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def write_eof(self) -> None: ...
    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True

    abort = close


class Process:
    """A worker's process that never dials in."""

    pid = 0

    def poll(self) -> int | None:
        return None

    def kill(self) -> None: ...


class Target:
    """Takes inputs; raises ``AssertionError`` when the service forgets something or lets an error out."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="luna-fuzz-"))
        self.problems: list[str] = []
        self.loop.set_exception_handler(lambda loop, context: self.problems.append(str(context)))
        self._inputs = itertools.count()
        self.service = self._make()

    def _make(self) -> Service:
        settings = load_settings({"max_tensor_mb": 1, "arena_client_mb": 2, "max_header_mb": 1, "queue_limit": 8}, {})
        pool = WorkerPool(settings, self.folder, spawn=lambda interpreter, config, log: Process())
        arena = open_arena(self.folder / "arena", 1, 64 << 20)
        access = Access("token", "nowhere", lambda: "token")
        return Service(State(
            settings, pool, ModelResolver(settings), SharedMemory(arena, ""), access,
            lambda state: {}, lambda: None, dict,
        ))  # fmt: skip

    def run(self, data: bytes) -> None:
        """One input."""
        if next(self._inputs) % _PER_SERVICE == _PER_SERVICE - 1:
            self._close()
            self.service = self._make()
        if data:
            self.loop.run_until_complete(self._feed(data[0], data[1:]))

    async def _feed(self, who: int, data: bytes) -> None:
        service = self.service
        connection = service.connect()
        wire = Wire()
        connection.connection_made(wire)
        if who & 3:
            self._push(connection, encode_frame(m.Hello(PROTOCOL_VERSION, "token", "client", "fuzz", 1)))
            assert isinstance(connection.peer, ClientPeer)
            connection.peer.session.sees_arena = bool(who & 2)
        self._push(connection, b"".join(_frames(data)) if who & 4 else data)
        for _ in range(4):  # what was put off: slots, hashes
            await asyncio.sleep(0)
        if isinstance(connection.peer, ClientPeer):
            connection.peer.session.said_bye = True
        connection.connection_lost(None)
        for _ in range(4):
            await asyncio.sleep(0)
        self._check()

    def _push(self, connection: Any, data: bytes) -> None:
        """As a transport does: into the protocol's own buffer, piece by piece."""
        at = 0
        while at < len(data) and not connection._closing:
            buffer = connection.get_buffer(-1)
            size = min(len(buffer), len(data) - at, _PIECE)
            assert size, "a buffer of no size"
            buffer[:size] = data[at : at + size]
            connection.buffer_updated(size)
            at += size

    def _check(self) -> None:
        state = self.service.state
        assert not self.problems, self.problems
        assert not any(result == "internal" for _, result in state.events.results), "an error got out"
        assert not state.sessions and not state.pool.queue, "a client that left is still there"
        state.patches.clear()
        state.loras.clear()
        state.conditionings.clear()
        state.pool.queue._served.clear()
        used = state.memory.arena.bytes_used if state.memory.arena else 0
        assert used == 0, f"{used} bytes of shared memory are nobody's"

    def _close(self) -> None:
        self.service.close()
        if self.service.state.memory.arena is not None:
            self.service.state.memory.arena.close()
        self.loop.run_until_complete(asyncio.sleep(0))
        gc.collect()

    def close(self) -> None:
        """Leave nothing behind."""
        self._close()
        self.loop.close()
        import shutil

        shutil.rmtree(self.folder, ignore_errors=True)


def _frames(data: bytes) -> Any:
    """Cut the fuzzer's bytes into frames: two bytes header size, two bytes payload size, the header."""
    at = 0
    while at + 4 <= len(data):
        header = int.from_bytes(data[at : at + 2], "little") & 0x0FFF
        payload = int.from_bytes(data[at + 2 : at + 4], "little") & 0x0FFF
        body = data[at + 4 : at + 4 + header]
        yield b"LDP1" + len(body).to_bytes(4, "little") + payload.to_bytes(8, "little") + body + bytes(payload)
        at += 4 + header


def framed(body: bytes, payload: int = 0) -> bytes:
    """A message's bytes as ``_frames`` cuts them."""
    return len(body).to_bytes(2, "little") + payload.to_bytes(2, "little") + body
