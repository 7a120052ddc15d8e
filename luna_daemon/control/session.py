"""An authenticated client's session: its leases, and its requests that wait for an answer."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

import psutil

from ..wire import messages as m
from ..wire.arena import Leases
from ..wire.connection import Connection


class Cancellable(Protocol):
    """A request that waits for its answer."""

    def cancel(self) -> None:
        """Stop computing for the request, which needs no answer any more."""
        ...


class Session:
    """A client from its greeting to the end of its connection.

    Args:
        number: identifies the session; not used again while the daemon runs.
        connection: where answers are sent.
        hello: the client's greeting.
    """

    def __init__(self, number: int, connection: Connection, hello: m.Hello) -> None:
        self.number = number
        self.connection = connection
        self.name = hello.name
        self.pid = hello.pid
        self.since = time.time()
        """When the session began, in seconds since 1970."""
        self.sees_arena = False
        """Whether the client has proved that it can map the daemon's shared memory."""
        self.comfy: dict[m.ComfyId, m.ComfyId] = {}
        """The ComfyUI that a worker runs, by the ComfyUI that the client runs."""
        self.said_bye = False
        self.outdated = False
        """Whether the token was renewed: requests in flight are answered, further requests are refused."""
        self.reserving = 0
        """Bytes of shared memory requested and not yet granted."""
        self.leases = Leases()
        self.requests: dict[int, Cancellable] = {}
        """Requests that wait for their answer, by their ids."""

    @property
    def is_local(self) -> bool:
        """Whether the client is on this host: has mapped the shared memory, or connected to a loopback address."""
        return self.sees_arena or self.connection.is_loopback

    async def release_after_exit(self) -> None:
        """Release the client's leases once its process has exited: until then the process may use that memory."""
        pause = 0.05
        while _is_alive(self.pid, self.since):
            await asyncio.sleep(pause)
            pause = min(5.0, pause * 1.5)
        self.leases.release_all()


def _is_alive(pid: int, since: float) -> bool:
    """Whether the process that greeted at ``since`` still runs; another process may have got the same pid."""
    try:
        process = psutil.Process(pid)
        # psutil's start times are accurate to about a second.
        return bool(process.create_time() <= since + 2 and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, ValueError, OverflowError):
        return False
