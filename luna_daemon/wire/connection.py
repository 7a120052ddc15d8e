"""Asyncio LDP/1 connection: the control process' side of a client or worker.

Inline payloads are received directly into a slot that the peer provides, and sent directly from slots.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ..core import InternalError, LunaError, ProtocolError, logger
from ..system.runtime import is_loopback
from .arena import Slot
from .frame import PREFIX_SIZE, decode_message, encode_frame, parse_prefix
from .messages import Failure, Message

_READ = 64 << 10
_CHUNK = 512 << 10
_HTTP = (b"GET ", b"POST", b"HEAD", b"PUT ", b"OPTI")
_LINGER_S = 1.0
"""How long a refused connection stays open, so that the other side can read the error."""
_AT_ONCE = 32
"""Frames of a connection that are handled before other connections have their turn."""
_MOST_QUEUED = 64
"""Frames that wait for a slow reader before its requests are no longer read."""


class Peer(Protocol):
    """Receiver of a connection's frames: a pending connection, a client, or a worker."""

    def place(self, connection: Connection, nbytes: int) -> Slot:
        """Memory for an inline payload that is about to arrive; raises ``LunaError`` to refuse the connection."""
        ...

    def received(self, connection: Connection, message: Message, payload: Slot | None) -> None:
        """Handle a whole frame and own its payload's slot; raises ``LunaError`` to refuse the connection."""
        ...

    def lost(self, connection: Connection, why: str) -> None:
        """Release everything that the connection held, after it was lost."""
        ...


class Connection(asyncio.BufferedProtocol):
    """LDP/1 frames over an asyncio transport.

    Args:
        peer: receives the frames; may be replaced between two frames.
        max_header: most bytes of a message.
        max_payload: most inline bytes of a frame.
    """

    def __init__(self, peer: Peer, max_header: int, max_payload: int) -> None:
        self.peer = peer
        self.max_header = max_header
        self.max_payload = max_payload
        self.transport: asyncio.Transport | None = None
        self.remote = ""
        self.is_loopback = False
        """Whether the other side connected over loopback."""
        self._buffer = bytearray(_READ)
        self._have = 0
        self._message: Message | None = None
        self._payload: Slot | None = None
        self._filled = 0
        self._outbox: deque[tuple[bytes, list[Slot]]] = deque()
        self._sending: deque[memoryview] = deque()
        self._sent_slots: list[Slot] = []
        self._paused = False
        self._paused_at = 0.0
        self._closing = False
        self._refused = False
        self._resting = False
        """Whether this connection's frames wait while other connections have their turn."""

    # --- called by asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set up the transport: no Nagle delay, and no write buffer, so that slots are not reused too early."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        name = transport.get_extra_info("peername")
        self.remote, self.is_loopback = str(name), bool(name) and is_loopback(str(name[0]))
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Paused then means that some bytes have not been sent: a slot may be reused only once the kernel has its
        # bytes. TLS pauses at the limit, not above the limit, and with 0 would never resume.
        transport.set_write_buffer_limits(high=1 if transport.get_extra_info("sslcontext") else 0)
        if self._closing:
            transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Memory for the next bytes: the payload's slot, or the buffer for messages."""
        if self._refused:
            return memoryview(self._buffer)
        if self._payload is not None:
            return self._payload.view[self._filled :]
        return memoryview(self._buffer)[self._have :]

    def buffer_updated(self, nbytes: int) -> None:
        """Handle the frames that are complete now."""
        if self._refused:
            return
        if self._payload is not None:
            self._filled += nbytes
            self._handle(self._finish_payload)
        else:
            self._have += nbytes
            self._handle(self._take_frames)

    def _handle(self, work: Callable[[], None]) -> None:
        """Run ``work``; an error in it refuses this connection, and harms no other."""
        try:
            work()
        except LunaError as error:
            self._refuse(error)
        except Exception as error:
            logger.exception("a message from %s could not be handled", self.remote)
            self._refuse(InternalError.of(error))

    def eof_received(self) -> bool:
        """Let asyncio close the transport: half-open connections are not used."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Release every slot in transit, and notify the peer."""
        self._closing = True
        slots = [slot for _, held in self._outbox for slot in held] + self._sent_slots
        self._outbox.clear()
        self._sending.clear()
        self._sent_slots = []
        if self._payload is not None:
            slots.append(self._payload)
            self._payload = None
        for slot in slots:
            slot.release()
        self.peer.lost(self, str(exc) if exc else "closed")

    def pause_writing(self) -> None:
        """Stop sending until the other side has read."""
        self._paused = True
        self._paused_at = time.monotonic()

    def resume_writing(self) -> None:
        """Send queued frames again."""
        self._paused = False
        self._pump()
        self._read_on()

    # --- called by the control process ---

    @property
    def unsent(self) -> bool:
        """Whether something is not sent yet."""
        return self._paused or bool(self._outbox)

    @property
    def crowded(self) -> bool:
        """Whether too many frames wait for the other side, so that optional messages should be skipped."""
        return len(self._outbox) >= _MOST_QUEUED

    @property
    def stalled_s(self) -> float:
        """Seconds for which sending has been blocked; 0 if it is not."""
        return time.monotonic() - self._paused_at if self._paused else 0.0

    def send(self, message: Message, slots: list[Slot] | None = None) -> None:
        """Queue a frame; ``slots`` are sent inline and then released."""
        slots = slots or []
        if self._closing or self.transport is None:
            for slot in slots:
                slot.release()
            return
        self._outbox.append((encode_frame(message, sum(slot.nbytes for slot in slots)), slots))
        self._pump()
        if len(self._outbox) >= _MOST_QUEUED:
            self.transport.pause_reading()

    def close(self) -> None:
        """Close after the queued frames are sent."""
        self._closing = True
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Close now; queued frames are lost."""
        self._closing = True
        if self.transport is not None:
            self.transport.abort()

    # --- receiving ---

    def _read_on(self) -> None:
        if self.transport is not None and not self._closing and not self._resting and not self.crowded:
            self.transport.resume_reading()

    def _rest(self) -> None:
        """Let other connections have their turn before the frames that have arrived already."""
        assert self.transport is not None
        self._resting = True
        self.transport.pause_reading()
        asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._resting = False
        if not self._refused and not self._closing:
            self._handle(self._take_frames)
            self._read_on()

    def _take_frames(self) -> None:
        start = taken = 0
        view = memoryview(self._buffer)
        while self._have - start >= PREFIX_SIZE and self._payload is None and not self._closing:
            if taken == _AT_ONCE:
                self._rest()
                break
            taken += 1
            header, payload = parse_prefix(view[start:], self.max_header, self.max_payload)
            end = start + PREFIX_SIZE + header
            if self._have < end:
                if len(self._buffer) < PREFIX_SIZE + header:
                    view = self._enlarge(start, PREFIX_SIZE + header)
                    start = 0
                break
            message = decode_message(bytes(view[start + PREFIX_SIZE : end]))
            start = end
            if payload == 0:
                self.peer.received(self, message, None)
                continue
            self._message = message
            self._payload = self.peer.place(self, payload)
            here = min(payload, self._have - start)
            self._payload.view[:here] = view[start : start + here]
            self._filled = here
            start += here
            self._finish_payload()
        if start:
            left = self._have - start
            view[:left] = view[start : self._have]
            self._have = left
        if self._have == 0 and len(self._buffer) > _READ:
            self._buffer = bytearray(_READ)

    def _enlarge(self, start: int, size: int) -> memoryview:
        larger = bytearray(size)
        larger[: self._have - start] = self._buffer[start : self._have]
        self._buffer, self._have = larger, self._have - start
        return memoryview(larger)

    def _finish_payload(self) -> None:
        if self._payload is not None and self._filled == self._payload.nbytes:
            message, payload = self._message, self._payload
            self._message, self._payload, self._filled = None, None, 0
            assert message is not None
            self.peer.received(self, message, payload)

    def _refuse(self, error: LunaError) -> None:
        if isinstance(error, ProtocolError) and bytes(self._buffer[:4]) in _HTTP:
            if self.transport is not None:
                self.transport.write(b"HTTP/1.0 400 Luna Daemon's socket speaks LDP/1, not HTTP\r\n\r\n")
        else:
            self.send(Failure(0, error.code, error.message, error.hint, getattr(error, "retry_after_s", 0.0)))
        # Bytes that still arrive are dropped: closing with unread bytes would reset the connection and lose the error.
        self._closing = self._refused = True
        asyncio.get_running_loop().call_later(_LINGER_S, self.close)
        self._pump()

    # --- sending ---

    def _pump(self) -> None:
        transport = self.transport
        if transport is None:
            return
        while not self._paused:
            if self._sending:
                transport.write(self._sending.popleft())
                continue
            for slot in self._sent_slots:
                slot.release()
            self._sent_slots = []
            if not self._outbox:
                if self._refused and transport.can_write_eof():
                    transport.write_eof()
                return
            head, slots = self._outbox.popleft()
            self._sent_slots = slots
            transport.write(head)
            for slot in slots:
                self._sending.extend(slot.view[at : at + _CHUNK] for at in range(0, slot.nbytes, _CHUNK))
