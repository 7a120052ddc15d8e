"""What the daemon tells about itself: the ``info`` answer, and the same over HTTP.

The HTTP application starts after the socket listens: importing aiohttp takes longer than everything before it.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import psutil

from . import __version__
from .gpu import gpu_memory
from .pool.launch import backend_of

if TYPE_CHECKING:
    from aiohttp import web

    from .pool.process import WorkerProcess
    from .service import Service

__all__ = ["Monitor", "collect_info"]


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
            "average_wait_s": round(pool.average_wait_s, 4),
            "limit": settings.queue_limit,
        },
        "workers": [_worker(worker, now) for worker in pool.workers],
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
        "gpus": gpu_memory(),
        "limits": {name: getattr(service.limits, name) for name in service.limits.__struct_fields__},
    }  # fmt: skip


def _worker(worker: WorkerProcess, now: float) -> dict[str, Any]:
    return {
        "number": worker.number,
        "pid": worker.pid,
        "key": worker.key,
        "device": worker.device,
        "state": worker.state.value,
        "models": dict(worker.models),
        "rss": worker.rss,
        "requests": worker.served,
        "idle_s": 0.0 if worker.work else round(now - worker.idle_since, 3),
        "threads": worker.threads,
        "versions": worker.versions,
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


class Monitor:
    """HTTP on the second port: ``/api/info``, ``/healthz``, ``/readyz``; ``/`` leads to the first."""

    def __init__(self, service: Service, host: str, port: int) -> None:
        self.service = service
        self.host = host
        self.port = port
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the port is taken.
        """
        from aiohttp import web

        app = web.Application()
        app.router.add_get("/", self._front)
        app.router.add_get("/api/info", self._info)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._ready)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _front(self, request: web.Request) -> web.Response:
        from aiohttp import web

        raise web.HTTPFound("/api/info")

    async def _info(self, request: web.Request) -> web.Response:
        from aiohttp import web

        return web.json_response(collect_info(self.service))

    async def _health(self, request: web.Request) -> web.Response:
        from aiohttp import web

        return web.Response(text="ok\n")

    async def _ready(self, request: web.Request) -> web.Response:
        from aiohttp import web

        accepting = self.service.pool.accepting
        return web.Response(text="ready\n" if accepting else "draining\n", status=200 if accepting else 503)
