"""WebSockets that watch the daemon, and the messages sent to them. Slow readers are disconnected.

Messages are JSON texts ``{"v": 1, "type": ..., "data": ...}``: see docs/monitoring.md.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

from aiohttp import WSMsgType, web

from ..core import logger

_VERSION = 1
_STATUS_S = 1.0
_FLUSH_S = 0.2
_MAX_PER_FLUSH = 10
"""Limit of requests, and of errors, reported per flush: 50 per second. Further requests are only counted."""
_QUEUED = 64
"""Limit of messages that wait for a reader; beyond it the reader is disconnected."""
_SEND_S = 10.0
"""A reader that reads nothing for this long is disconnected, however few messages wait."""
_HEARTBEAT_S = 20.0
_FRESH_S = 0.2
"""Minimum time between two computations of the status, however many watchers ask."""
_MAX_MESSAGE = 4096
"""Limit of bytes of a message from a watcher."""
_KERNEL_BYTES = 64 << 10


class Watchers:
    """All open WebSockets.

    Args:
        status: makes the document of ``status`` messages.
        limit: how many may be open; further WebSockets are refused with 503.
    """

    def __init__(self, status: Callable[[], dict[str, Any]], limit: int) -> None:
        self.limit = limit
        self.dropped = 0
        """Number of watchers disconnected because they read too slowly."""
        self._status = status
        self._open: set[_Watcher] = set()
        self._waiting: dict[str, list[dict[str, Any]]] = {"request": [], "error": []}
        self._left_out = 0
        self._made = (-_FRESH_S, "")

    def __len__(self) -> int:
        return len(self._open)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Serve a WebSocket until it ends."""
        if len(self._open) >= self.limit:
            text = f"{self.limit} watchers are connected, which is the limit (max_watchers)\n"
            full = web.Response(status=503, text=text, headers={"Retry-After": "10"})
            full.force_close()
            return full
        websocket = web.WebSocketResponse(heartbeat=_HEARTBEAT_S, compress=False, max_msg_size=_MAX_MESSAGE)
        watcher = _Watcher(websocket, request)
        self._open.add(watcher)
        try:
            await websocket.prepare(request)
            watcher.start()
            self._send(watcher, self._status_text())
            async for message in websocket:
                if message.type is WSMsgType.TEXT and _type_of(message.data) == "get_status":
                    self._send(watcher, self._status_text())
                    await asyncio.sleep(_FRESH_S / 4)  # slows down only a watcher that asks continuously
        finally:
            self._open.discard(watcher)
            watcher.stop()
        return websocket

    def on_event(self, kind: str, data: dict[str, Any]) -> None:
        """Send an event of the daemon, at once or with the next flush; a listener of ``Events``."""
        if not self._open:
            return
        if kind not in self._waiting:
            self._send_all(_text(kind, data))
        elif len(self._waiting[kind]) < _MAX_PER_FLUSH:
            self._waiting[kind].append(data)
        elif kind == "request":
            self._left_out += 1

    async def run(self) -> None:
        """Send the status every second, and queued events every 0.2 s, until cancelled."""
        next_status = 0.0
        while True:
            await asyncio.sleep(_FLUSH_S)
            try:
                self._flush()
                if self._open and time.monotonic() >= next_status:
                    next_status = time.monotonic() + _STATUS_S - _FLUSH_S / 2
                    self._send_all(self._status_text())
            except Exception:
                logger.exception("the watchers could not be updated")

    def close(self) -> None:
        """Disconnect all watchers."""
        for watcher in list(self._open):
            watcher.drop()

    # --- sending ---

    def _flush(self) -> None:
        requests, self._waiting["request"] = self._waiting["request"], []
        errors, self._waiting["error"] = self._waiting["error"], []
        if requests:
            self._send_all(_text("request", {"requests": requests, "left_out": self._left_out}))
            self._left_out = 0
        for error in errors:
            self._send_all(_text("error", error))

    def _status_text(self) -> str:
        made, text = self._made
        if time.monotonic() - made >= _FRESH_S:
            text = _text("status", self._status())
            self._made = (time.monotonic(), text)
        return text

    def _send_all(self, text: str) -> None:
        for watcher in list(self._open):
            self._send(watcher, text)

    def _send(self, watcher: _Watcher, text: str) -> None:
        if watcher in self._open and not watcher.send(text):
            self.dropped += 1
            logger.info("disconnecting the watcher at %s, which reads too slowly", watcher.remote)
            self._open.discard(watcher)
            watcher.drop()


class _Watcher:
    """A WebSocket and the texts that wait to be sent."""

    def __init__(self, websocket: web.WebSocketResponse, request: web.Request) -> None:
        self.remote = request.remote
        self._websocket = websocket
        self._request = request
        self._texts: asyncio.Queue[str] = asyncio.Queue(_QUEUED)
        self._writer: asyncio.Task[None] | None = None
        self._stuck = False

    def start(self) -> None:
        """Start sending, with a small kernel buffer: a large one would hide a reader that does not read."""
        if self._request.transport is not None:
            kernel = self._request.transport.get_extra_info("socket")
            kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _KERNEL_BYTES)
        self._writer = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        try:
            while True:
                text = await self._texts.get()
                await asyncio.wait_for(self._websocket.send_str(text), _SEND_S)
        except asyncio.TimeoutError:
            self._stuck = True
        except ConnectionError:
            pass  # the reader has closed the connection

    def send(self, text: str) -> bool:
        """Queue a text; ``False`` if the reader is too slow."""
        if self._stuck or self._texts.full():
            return False
        self._texts.put_nowait(text)
        return True

    def stop(self) -> None:
        """Stop sending."""
        if self._writer is not None:
            self._writer.cancel()

    def drop(self) -> None:
        """Disconnect at once; a WebSocket close would wait for the reader."""
        self.stop()
        if self._request.transport is not None:
            self._request.transport.abort()


def _text(kind: str, data: dict[str, Any]) -> str:
    return json.dumps({"v": _VERSION, "type": kind, "data": data}, separators=(",", ":"))


def _type_of(text: str) -> str:
    """The type of message that a watcher sent; empty if the text is not such a message."""
    try:
        message = json.loads(text)
    except ValueError:
        return ""
    return str(message.get("type", "")) if isinstance(message, dict) else ""
