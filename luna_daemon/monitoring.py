"""The ``info`` answer, and the HTTP server with status page, WebSocket, metrics and health.

aiohttp takes longer to import than the rest of the daemon, so ``Monitor.start`` imports the HTTP application, after the
daemon's socket listens.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import psutil

from . import __version__
from .control.state import State
from .pool.events import Events, base_name, without_folders
from .pool.launch import backend_of
from .pool.process import WorkerProcess

if TYPE_CHECKING:
    import ssl

    from aiohttp import web

__all__ = ["Monitor", "collect_info", "open_info"]

_KEEPALIVE_S = 15.0
_CLOSE_S = 1.0
_BACKLOG = 256
_FIRST_REQUEST_S = 5.0
"""A connection without a TLS handshake or a request by then is closed."""
_CONNECTIONS = 512
"""Limit of HTTP connections, WebSockets included: clients need file descriptors too."""


def collect_info(state: State) -> dict[str, Any]:
    """Make the ``info`` answer: the daemon's state as plain data, sizes in bytes and times in seconds."""
    pool, events, settings = state.pool, state.events, state.settings
    now = time.monotonic()
    return {
        "status": "running" if pool.accepting else "draining",
        "version": __version__,
        "pid": os.getpid(),
        "uptime_s": round(time.time() - state.started_at, 3),
        "ws_port": state.ws_port,
        "tls": settings.tls_cert is not None,
        "start_id": os.environ.get("LUNA_START_ID", ""),
        "rss": psutil.Process().memory_info().rss,
        "service_type": settings.service_type.value,
        "backend": backend_of(settings),
        "idle_timeout_s": settings.idle_timeout_sec,
        "requests": {op: count for (op, result), count in events.results.items() if result == "ok"},
        "errors": _errors(events.results),
        "in_flight": pool.in_flight,
        "fallbacks": state.fallbacks,
        "materialised": state.materialised,
        "coalesced": state.coalesced,
        "queue": {
            "waiting": len(pool.queue),
            "oldest_s": round(max((now - work.born for work in pool.queue), default=0.0), 3),
            "average_wait_s": round(pool.queue.average_wait_s, 4),
            "limit": settings.queue_limit,
        },
        "workers": [_worker(worker, events, now) for worker in pool.workers],
        "crashes": events.crashes.total(),
        "retries": pool.retries,
        "models": {
            "named": sorted(state.resolver.named),
            "loaded": sorted({key for worker in pool.workers for key in worker.models}),
            "pinned": sorted(pool.pinned),
        },
        "caches": {"conditioning": state.conditionings.stats(), "lora": state.loras.stats()},
        "arena": _arena(state),
        "clients": [
            {"session": s.number, "name": s.name, "pid": s.pid, "shared_memory": s.sees_arena,
             "leased_bytes": s.leases.nbytes, "since": s.since, "in_flight": len(s.requests)}
            for s in state.sessions.values()
        ],
        "gpus": state.gpus,
        "latency": events.latency(),
        "throughput_per_s": events.throughput_per_s,
        "scaling": list(events.recent),
        "limits": {name: getattr(state.limits, name) for name in state.limits.__struct_fields__},
    }  # fmt: skip


def _errors(results: Counter[tuple[str, str]]) -> dict[str, int]:
    """Number of failed requests by error code, all ops together."""
    counts: Counter[str] = Counter()
    for (_, result), count in results.items():
        if result not in ("ok", "cancelled"):
            counts[result] += count
    return dict(counts)


def _worker(worker: WorkerProcess, events: Events, now: float) -> dict[str, Any]:
    key = str(worker.key)
    error, at = events.last_errors.get(key, ("", None))
    comfy = worker.comfy
    return {
        "number": worker.number, "pid": worker.pid, "key": key, "device": worker.device, "state": worker.state.value,
        "models": dict(worker.models), "rss": worker.rss, "requests": worker.served,
        "idle_s": 0.0 if worker.work else round(now - worker.idle_since, 3),
        "threads": worker.threads, "versions": worker.versions, "last_error": error, "last_error_at": at,
        "crashes": events.crashes[key], "restarts": events.restarts[key],
        "comfyui": comfy and {"root": comfy.root, "python": comfy.python, "flags": list(comfy.flags)},
    }  # fmt: skip


def _arena(state: State) -> dict[str, Any]:
    arena = state.memory.arena
    if arena is None:
        return {"folder": None, "why": state.memory.why, "reserved": 0, "used": 0, "max_bytes": 0}
    return {
        "folder": str(arena.folder), "why": "", "reserved": arena.bytes_reserved, "used": arena.bytes_used,
        "max_bytes": arena.max_bytes,
    }  # fmt: skip


def open_info(state: State) -> dict[str, Any]:
    """Make the public ``info`` document: without folders of this machine."""
    info: dict[str, Any] = _with_base_names(collect_info(state))
    info["arena"]["why"] = without_folders(info["arena"]["why"])
    return info


def _with_base_names(document: Any) -> Any:
    """Copy a document, with each absolute path cut to its last part."""
    if isinstance(document, dict):
        return {_with_base_names(key): _with_base_names(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [_with_base_names(value) for value in document]
    return base_name(document) if isinstance(document, str) else document


class Monitor:
    """The HTTP server on the second port.

    Args:
        host, port: where to listen; ``start`` replaces port 0 by the port it got.
        tls: serve https and wss.
    """

    def __init__(self, state: State, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.state = state
        self.host = host
        self.port = port
        self.tls = tls
        self._runner: web.AppRunner | None = None
        self._silent: set[Any] = set()
        """Connections that have not sent a request yet."""
        self._ends = AsyncExitStack()

    async def start(self) -> None:
        """Listen, and start updating the watchers.

        Raises:
            OSError: the port is in use.
        """
        from aiohttp import web

        from .status.app import make_app
        from .status.watchers import Watchers

        state, loop = self.state, asyncio.get_running_loop()
        watchers = Watchers(lambda: open_info(state), state.settings.max_watchers)
        app = make_app(state, watchers, lambda: open_info(state), lambda: (self.host, self.port), self._silent.discard)
        async with AsyncExitStack() as ends:
            self._runner = web.AppRunner(
                app, access_log=None, keepalive_timeout=_KEEPALIVE_S, shutdown_timeout=_CLOSE_S
            )
            await self._runner.setup()
            ends.push_async_callback(self._runner.cleanup)
            server = await loop.create_server(
                self._connect, self.host, self.port, backlog=_BACKLOG, ssl=self.tls,
                ssl_handshake_timeout=_FIRST_REQUEST_S if self.tls else None,
            )  # fmt: skip
            ends.callback(server.close)
            self.port = server.sockets[0].getsockname()[1]
            state.events.listen(watchers.on_event)
            ends.callback(state.events.unlisten, watchers.on_event)
            ends.callback(watchers.close)
            reporting = loop.create_task(watchers.run())
            ends.callback(reporting.cancel)
            self._ends = ends.pop_all()

    async def stop(self) -> None:
        """Close all connections and the port."""
        await self._ends.aclose()

    def _connect(self) -> asyncio.BaseProtocol:
        """Make the connection for a socket that was just accepted; beyond the limit one that closes at once."""
        assert self._runner is not None and self._runner.server is not None
        # The server counts a connection only once its handshake is done.
        if len(self._silent.union(self._runner.server.connections)) >= _CONNECTIONS:
            return _Full()
        connection = self._runner.server()
        self._silent.add(connection)
        asyncio.get_running_loop().call_later(_FIRST_REQUEST_S, self._expect_request, connection)
        return connection

    def _expect_request(self, connection: Any) -> None:
        if connection in self._silent:
            self._silent.discard(connection)
            connection.force_close()


class _Full(asyncio.Protocol):
    """A connection beyond the limit, which closes at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close the connection."""
        transport.close()
