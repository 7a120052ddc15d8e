"""Blocking LDP/1 connection of clients and workers. Sending is thread-safe; only one thread may receive."""

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
        # A frame whose payload is still arriving: kept here, so that a timeout within a frame loses nothing.
        self._message: Message | None = None
        self._payload = memoryview(b"")
        self._filled = 0
        self._buffers = Buffers()

    def send(self, message: Message, payload: Sequence[memoryview] = ()) -> None:
        """Send one frame.

        Raises:
            DaemonConnectionError: the connection broke, or the other side has stopped reading.
        """
        with self._send_lock:
            self._send(message, payload)

    def try_send(self, message: Message) -> bool:
        """Send unless another send is in progress (then ``False``); never waits, so finalizers may call this method.

        Raises:
            DaemonConnectionError: as ``send``.
        """
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
            # Ctrl-C in the middle of a frame: the other side would read the next frame as the rest of this frame.
            self.close()
            raise

    def receive(self, timeout_s: float | None = None) -> tuple[Message, memoryview] | None:
        """The next frame and its inline payload, or ``None`` if the frame is not complete within ``timeout_s``.

        Raises:
            DaemonConnectionError: the connection broke or was closed.
            ProtocolError: the other side sent data that is not LDP/1.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            with self._receive_lock:
                while not self._complete():
                    if self._closed:
                        raise ConnectionResetError("this side closed it")
                    if self._take_decrypted():
                        continue
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    if not self._selector.select(left):
                        return None
                    self._read_some()
        except LunaError:
            raise  # some LunaErrors are ValueErrors too
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
        """Whether a send is in progress."""
        return self._send_lock.locked()

    def ended(self) -> bool:
        """Whether the other side has closed and nothing is left to read; does not wait."""
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
        """Close the connection; a thread in ``receive`` gets ``DaemonConnectionError``."""
        self._closed = True
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        # A selector drops a socket that is closed during select(), which would then not return: so a thread in
        # receive() closes the socket itself.
        if self._receive_lock.acquire(blocking=False):
            self._receive_lock.release()
            self._sock.close()

    def __del__(self) -> None:
        # A client that was deleted without close(): closes the socket without a ResourceWarning.
        self._sock.close()

    def abandon(self) -> None:
        """Close this process' copy of the socket without a shutdown: after a fork, the parent uses the connection."""
        self._closed = True
        self._sock.close()

    def _complete(self) -> bool:
        """Whether a whole frame has arrived; decodes its message as soon as the message has arrived."""
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
                # Copied: a decoded message may refer to the bytes (``msgspec.Raw``).
                self._message = decode_message(bytes(view[PREFIX_SIZE:end]))
            self._payload = self._buffers.take(payload)
            here = min(payload, self._have - end)
            self._payload[:here] = self._buffer[end : end + here]
            self._filled = here
            self._buffer[: self._have - end - here] = self._buffer[end + here : self._have]
            self._have -= end + here
        return self._filled == self._payload.nbytes

    def _read_some(self) -> None:
        """Read the bytes that the selector has announced."""
        if isinstance(self._sock, TlsSocket):
            self._sock.feed()
        else:
            self._fill(self._sock.recv_into)

    def _take_decrypted(self) -> bool:
        """Read bytes that TLS has buffered, which the selector does not see; returns whether there were any."""
        return isinstance(self._sock, TlsSocket) and self._fill(self._sock.take)

    def _fill(self, read: Callable[[memoryview], int | None]) -> bool:
        """Read into the frame's payload, or before that into the buffer; returns whether there were bytes to read."""
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
