"""One blocking connection that speaks LDP/1: what clients and workers hold. Sending is thread-safe, receiving not."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

from ..core import DaemonConnectionError, LunaError
from .buffers import Buffers
from .frame import MAX_HEADER, PREFIX_SIZE, decode_message, encode_frame, parse_prefix
from .messages import Message
from .tls import TlsSocket

_CHUNK = 1 << 20
_READ = 256 << 10
_SEND_STALL_S = 60.0


class Channel:
    """Frames over a connected socket, with or without TLS.

    Args:
        max_payload: most inline bytes accepted in one frame.
    """

    def __init__(self, sock: socket.socket | TlsSocket, max_payload: int = 1 << 40) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(_SEND_STALL_S)
        self._sock = sock
        self._max_payload = max_payload
        self._send_lock = threading.Lock()
        self._receive_lock = threading.Lock()
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)
        self._buffer = bytearray(_READ)
        self._have = 0
        # A frame whose payload is still arriving: kept here, so that a timeout in its middle loses nothing.
        self._message: Message | None = None
        self._payload = memoryview(b"")
        self._filled = 0
        self._buffers = Buffers()

    def send(self, message: Message, payload: Sequence[memoryview] = ()) -> None:
        """Send one frame.

        Raises:
            DaemonConnectionError: the other side is gone or has stopped reading.
        """
        with self._send_lock:
            self._send(message, payload)

    def try_send(self, message: Message) -> bool:
        """Send unless somebody is sending just now; never waits, so a finalizer may call it."""
        if not self._send_lock.acquire(blocking=False):
            return False
        try:
            self._send(message, ())
        finally:
            self._send_lock.release()
        return True

    def _send(self, message: Message, payload: Sequence[memoryview]) -> None:
        head = encode_frame(message, sum(part.nbytes for part in payload))
        try:
            self._sock.sendall(head)
            for part in payload:
                for start in range(0, part.nbytes, _CHUNK):
                    self._sock.sendall(part[start : start + _CHUNK])
        except (OSError, ValueError) as error:
            raise DaemonConnectionError(f"connection lost while sending: {error}") from error
        except BaseException:
            # Ctrl-C in the middle of a frame: whatever followed would be read as the rest of it.
            self.close()
            raise

    def receive(self, timeout_s: float | None = None) -> tuple[Message, memoryview] | None:
        """The next frame and its inline payload, or ``None`` if it is not complete within ``timeout_s``.

        Raises:
            DaemonConnectionError: the other side closed.
            ProtocolError: it sent something that is not LDP/1.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            with self._receive_lock:
                while not self._complete():
                    if self._closed:
                        raise ConnectionResetError("it was closed here")
                    if self._take_decrypted():
                        continue
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    if not self._selector.select(left):
                        return None
                    self._read_some()
        except LunaError:
            raise  # some are ValueErrors too
        except (OSError, ValueError) as error:
            raise DaemonConnectionError(f"connection lost while receiving: {error}") from error
        finally:
            if self._closed:
                self._sock.close()
        message, payload = self._message, self._payload
        assert message is not None
        self._message, self._payload, self._filled = None, memoryview(b""), 0
        return message, payload

    @property
    def sending(self) -> bool:
        """Whether a thread is sending just now."""
        return self._send_lock.locked()

    def ended(self) -> bool:
        """Whether the other side has closed, and nothing is left to read; looks without waiting."""
        try:
            if not self._selector.select(0):
                return False
            if isinstance(self._sock, TlsSocket):
                self._sock.feed()
                return self._sock.ended()
            return self._sock.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True

    def close(self) -> None:
        """Close; a thread that receives gets ``DaemonConnectionError``."""
        self._closed = True
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        # A selector forgets a socket that is closed under it, and its reader would sleep on: the reader closes it.
        if self._receive_lock.acquire(blocking=False):
            self._receive_lock.release()
            self._sock.close()

    def __del__(self) -> None:
        # A client that is dropped without a close: the daemon sees the end, and nobody needs a warning.
        self._sock.close()

    def abandon(self) -> None:
        """Let go of the socket without a word: after a fork it is the parent's."""
        self._closed = True
        self._sock.close()

    def _complete(self) -> bool:
        """Whether a whole frame has arrived; takes the frame's head out of the buffer first."""
        if self._message is None:
            if self._have < PREFIX_SIZE:
                return False
            header, payload = parse_prefix(self._buffer, MAX_HEADER, self._max_payload)
            end = PREFIX_SIZE + header
            if self._have < end:
                if len(self._buffer) < end:
                    self._buffer.extend(bytes(end - len(self._buffer)))
                return False
            with memoryview(self._buffer) as view:
                # Copied: a message may keep raw parts of the bytes that it was decoded from.
                self._message = decode_message(bytes(view[PREFIX_SIZE:end]))
            self._payload = self._buffers.take(payload)
            here = min(payload, self._have - end)
            self._payload[:here] = self._buffer[end : end + here]
            self._filled = here
            self._buffer[: self._have - end - here] = self._buffer[end + here : self._have]
            self._have -= end + here
        return self._filled == self._payload.nbytes

    def _read_some(self) -> None:
        """Take what the socket has; a selector has said that there is something."""
        if isinstance(self._sock, TlsSocket):
            self._sock.feed()
        else:
            self._fill(self._sock.recv_into)

    def _take_decrypted(self) -> bool:
        """Whether TLS holds bytes that arrived before, which the selector does not see."""
        return isinstance(self._sock, TlsSocket) and self._fill(self._sock.take)

    def _fill(self, read: Callable[[memoryview], int | None]) -> bool:
        """Read into the frame's payload if it is its turn, else into the buffer; whether there was something."""
        if self._message is not None:
            got = read(self._payload[self._filled :])
            self._filled += got or 0
        else:
            with memoryview(self._buffer) as view:
                got = read(view[self._have :])
            self._have += got or 0
        if got == 0:
            raise ConnectionResetError("the other side closed the connection")
        return got is not None
