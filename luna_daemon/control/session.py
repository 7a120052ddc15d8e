"""An authenticated client: what it holds, and which of its requests wait for an answer."""

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
        """Stop computing for the request; its caller wants no answer any more."""
        ...


class Session:
    """A client from its greeting to the end of its connection.

    Args:
        number: identifies the session for as long as the daemon lives.
        connection: carries the answers.
        hello: the client's greeting.
    """

    def __init__(self, number: int, connection: Connection, hello: m.Hello) -> None:
        self.number = number
        self.connection = connection
        self.name = hello.name
        self.pid = hello.pid
        self.since = time.time()
        """Seconds since 1970."""
        self.sees_arena = False
        """Whether the client has proved that it can map the daemon's shared memory."""
        self.comfy: dict[m.ComfyId, m.ComfyId] = {}
        """Per ComfyUI that the client runs the one that a worker runs for it."""
        self.said_bye = False
        self.outdated = False
        """Whether the token of the greeting is no longer good: what was asked is still answered, nothing more."""
        self.reserving = 0
        """Bytes of shared memory asked for and not yet granted."""
        self.leases = Leases()
        self.requests: dict[int, Cancellable] = {}
        """Requests that wait for their answer, by the client's numbers."""

    @property
    def is_here(self) -> bool:
        """Whether the client is on this host: it sees the shared memory, or dialled a loopback address."""
        return self.sees_arena or self.connection.is_loopback

    async def release_after_exit(self) -> None:
        """Give back what the client holds once its process has exited: until then its tensors may lie there."""
        pause = 0.05
        while _is_alive(self.pid, self.since):
            await asyncio.sleep(pause)
            pause = min(5.0, pause * 1.5)
        self.leases.release_all()


def _is_alive(pid: int, since: float) -> bool:
    """Whether the process that said hello at ``since`` still runs; another one may have its number by now."""
    try:
        process = psutil.Process(pid)
        # Start times are known to a second or so.
        return bool(process.create_time() <= since + 2 and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, ValueError, OverflowError):
        return False
