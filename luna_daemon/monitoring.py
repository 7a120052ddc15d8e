"""What the daemon tells about itself: the ``info`` answer, and over HTTP the page, the WebSocket, metrics and health.

The HTTP application starts after the socket listens: importing aiohttp takes longer than everything before it, so what
needs it (``web_app.py``) is imported when ``Monitor`` starts.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import psutil

from . import __version__
from .pool.events import base_name, without_folders
from .pool.launch import backend_of

if TYPE_CHECKING:
    import ssl

    from aiohttp import web

    from .control.service import Service
    from .pool.process import WorkerProcess

__all__ = ["Monitor", "collect_info", "open_info"]

_KEEPALIVE_S = 15.0
_CLOSE_S = 1.0
_AT_ONCE = 256
_GREET_S = 5.0
"""A connection that has asked for nothing by then is closed."""
_CONNECTIONS = 512
"""Most HTTP connections, watchers included: each costs a file descriptor, which the socket's clients need too."""


def collect_info(service: Service) -> dict[str, Any]:
    """Everything, as plain data. Sizes are bytes, times seconds."""
    pool, settings = service.pool, service.settings
    now = time.monotonic()
    return {
        "status": "running" if pool.accepting else "draining",
        "version": __version__,
        "pid": os.getpid(),
        "uptime_s": round(time.time() - service.born, 3),
        "ws_port": service.ws_port,
        "tls": settings.tls_cert is not None,
        "start_id": os.environ.get("LUNA_START_ID", ""),
        "rss": psutil.Process().memory_info().rss,
        "service_type": settings.service_type.value,
        "backend": backend_of(settings),
        "idle_timeout_s": settings.idle_timeout_sec,
        "requests": dict(service.requests),
        "errors": dict(service.errors),
        "in_flight": pool.in_flight,
        "fallbacks": service.fallbacks,
        "materialised": service.materialised,
        "coalesced": service.coalesced,
        "queue": {
            "waiting": len(pool.queue),
            "oldest_s": round(max((now - work.born for work in pool.queue), default=0.0), 3),
            "average_wait_s": round(pool.queue.average_wait_s, 4),
            "limit": settings.queue_limit,
        },
        "workers": [_worker(service, worker, now) for worker in pool.workers],
        "crashes": pool.crashes,
        "retries": pool.retries,
        "models": {
            "named": sorted(service.resolver.named),
            "loaded": sorted({key for worker in pool.workers for key in worker.models}),
            "pinned": sorted(pool.pinned),
        },
        "caches": {"conditioning": service.cache.stats(), "lora": service.loras.stats()},
        "arena": _arena(service),
        "clients": [
            {"session": s.number, "name": s.name, "pid": s.pid, "shared_memory": s.sees_arena,
             "leased_bytes": s.leases.nbytes, "since": s.since, "in_flight": len(s.requests)}
            for s in service.sessions.values()
        ],
        "gpus": service.gpus,
        "latency": service.events.latency(),
        "throughput_per_s": service.events.throughput_per_s,
        "scaling": list(service.events.recent),
        "limits": {name: getattr(service.limits, name) for name in service.limits.__struct_fields__},
    }  # fmt: skip


def _worker(service: Service, worker: WorkerProcess, now: float) -> dict[str, Any]:
    events = service.events
    key = str(worker.key)
    error, at = events.last_errors.get(key, ("", None))
    return {
        "number": worker.number,
        "pid": worker.pid,
        "key": key,
        "device": worker.device,
        "state": worker.state.value,
        "models": dict(worker.models),
        "rss": worker.rss,
        "requests": worker.served,
        "idle_s": 0.0 if worker.work else round(now - worker.idle_since, 3),
        "threads": worker.threads,
        "versions": worker.versions,
        "last_error": error,
        "last_error_at": at,
        "crashes": events.crashes[key],
        "restarts": events.restarts[key],
        "comfyui": _comfyui(worker),
    }


def _comfyui(worker: WorkerProcess) -> dict[str, Any] | None:
    comfy = worker.comfy
    return None if comfy is None else {"root": comfy.root, "python": comfy.python, "flags": list(comfy.flags)}


def _arena(service: Service) -> dict[str, Any]:
    arena = service.memory.arena
    if arena is None:
        return {"folder": None, "why": service.memory.why, "reserved": 0, "used": 0, "max_bytes": 0}
    return {
        "folder": str(arena.folder), "why": "", "reserved": arena.bytes_reserved, "used": arena.bytes_used,
        "max_bytes": arena.max_bytes,
    }  # fmt: skip


def open_info(service: Service) -> dict[str, Any]:
    """The same for everybody who reaches the page: without folders of this machine."""
    info: dict[str, Any] = _with_base_names(collect_info(service))
    info["arena"]["why"] = without_folders(info["arena"]["why"])
    return info


def _with_base_names(document: Any) -> Any:
    """A document in which each absolute path is its last part only."""
    if isinstance(document, dict):
        return {_with_base_names(key): _with_base_names(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [_with_base_names(value) for value in document]
    return base_name(document) if isinstance(document, str) else document


class Monitor:
    """HTTP on the second port.

    Args:
        host, port: where to listen; ``port`` is the real one once it does.
        tls: speak https and wss.
    """

    def __init__(self, service: Service, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.service = service
        self.host = host
        self.port = port
        self.tls = tls
        self._runner: web.AppRunner | None = None
        self._silent: set[Any] = set()
        """Connections that have not asked for anything yet."""
        self._ends = AsyncExitStack()

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the port is taken.
        """
        from aiohttp import web

        from .status.app import make_app
        from .status.watchers import Watchers

        service, loop = self.service, asyncio.get_running_loop()
        watchers = Watchers(lambda: open_info(service), service.settings.max_watchers)
        app = make_app(
            service, watchers, lambda: open_info(service), lambda: (self.host, self.port), self._silent.discard
        )
        async with AsyncExitStack() as ends:
            self._runner = web.AppRunner(
                app, access_log=None, keepalive_timeout=_KEEPALIVE_S, shutdown_timeout=_CLOSE_S
            )
            await self._runner.setup()
            ends.push_async_callback(self._runner.cleanup)
            server = await loop.create_server(self._connect, self.host, self.port, backlog=_AT_ONCE, ssl=self.tls)
            ends.callback(server.close)
            self.port = server.sockets[0].getsockname()[1]
            service.events.listen(watchers.hear)
            ends.callback(service.events.unlisten, watchers.hear)
            ends.callback(watchers.close)
            teller = loop.create_task(watchers.run())
            ends.callback(teller.cancel)
            self._ends = ends.pop_all()

    async def stop(self) -> None:
        await self._ends.aclose()

    def _connect(self) -> asyncio.BaseProtocol:
        """A connection for a socket that was just accepted; past the limit one that hangs up."""
        assert self._runner is not None and self._runner.server is not None
        # Those of one burst are not among the server's yet.
        if len(self._silent.union(self._runner.server.connections)) >= _CONNECTIONS:
            return _Full()
        connection = self._runner.server()
        self._silent.add(connection)
        asyncio.get_running_loop().call_later(_GREET_S, self._expect_request, connection)
        return connection

    def _expect_request(self, connection: Any) -> None:
        if connection in self._silent:
            self._silent.discard(connection)
            connection.force_close()


class _Full(asyncio.Protocol):
    """Hangs up."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
