"""One client's connection, and one request of it on its way to an answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..core import LunaError
from ..pool.work import Outcome, Work
from ..wire import messages as m
from ..wire.arena import Leases, Slot
from ..wire.connection import Connection

if TYPE_CHECKING:
    from .service import Service

_INLINE_BYTES = 32 << 10
"""Smaller results travel in the message: mapping and releasing a slot would cost more."""


class Session:
    """An authenticated client."""

    def __init__(self, number: int, connection: Connection, hello: m.Hello) -> None:
        self.number = number
        self.connection = connection
        self.name = hello.name
        self.pid = hello.pid
        self.since = time.time()
        self.sees_arena = False
        self.comfy: dict[m.ComfyId, m.ComfyId] = {}
        """The ComfyUIs that this client runs, and what workers run for it."""
        self.said_bye = False
        self.outdated = False
        """Its token is no longer good: it may finish what it asked, and greet anew."""
        self.reserving = 0
        """Bytes of shared memory asked for and not yet granted."""
        self.leases = Leases()
        self.requests: dict[int, ClientRequest] = {}

    @property
    def is_here(self) -> bool:
        """Whether the client is on this host: it sees our memory, or dialled a loopback address."""
        return self.sees_arena or self.connection.is_loopback


class ClientRequest:
    """A request that waits for its answer: a ``Waiter`` of the pool."""

    def __init__(self, session: Session, message: m.Request, payload: Slot | None, service: Service) -> None:
        self.session = session
        self.client = session.number
        self.number = message.id
        self.message = message
        self.payload = payload
        """Its inline bytes; valid only while it is dispatched."""
        self.service = service
        self.op = "unknown"
        self.model = ""
        """What people call the model, once it is known."""
        self.born = time.monotonic()
        self.work: Work | None = None

    def join(self, work: Work) -> None:
        """Wait for this work."""
        self.work = work
        work.waiters.append(self)
        self.session.requests[self.number] = self

    def progress(self, stage: str, step: int, total: int) -> None:
        if not self.session.connection.crowded:
            self.session.connection.send(m.Progress(self.number, stage, step, total))

    def answer(self, result: Any, tensors: list[m.TensorRef] | None = None) -> None:
        """Answer without a worker."""
        self.session.connection.send(m.Reply(self.number, result, tensors or []))
        self._count()

    def finish(self, outcome: Outcome, shared: bool) -> None:
        """Answer with tensors.

        Args:
            shared: others hold the same slots: this client gets its own uses of them, to copy from. Otherwise the
                outcome's uses pass to this client.
        """
        self._leave()
        if not self.service.is_connected(self.session):
            if not shared:
                outcome.release()
            return
        refs: list[m.TensorRef] = []
        inline: list[Slot] = []
        at = 0
        for piece in outcome.pieces:
            ref, slot = piece.ref, piece.slot.retain() if shared else piece.slot
            if slot.number and ref.nbytes > _INLINE_BYTES and self._may_lease(slot):
                number = self.session.leases.add(slot)
                refs.append(ref.placed(slot.offset, number, slot.segment, shared))
            else:
                inline.append(slot)
                refs.append(ref.placed(at))
                at += ref.nbytes
        self.session.connection.send(m.Reply(self.number, outcome.result, refs, outcome.notes), inline)
        self._count()

    def _may_lease(self, slot: Slot) -> bool:
        """Whether this client may hold more shared memory; what it may not comes inline."""
        limit = self.service.limits.arena_bytes_per_client
        return self.session.sees_arena and self.session.leases.nbytes + slot.nbytes <= limit

    def fail(self, error: LunaError) -> None:
        self._leave()
        self.service.errors[error.code] += 1
        retry = getattr(error, "retry_after_s", 0.0)
        self.session.connection.send(m.Failure(self.number, error.code, error.message, error.hint, retry))
        self.service.events.request(self.op, self.model, time.monotonic() - self.born, error.code)
        self.service.events.failed(error.code, error.message, self.op, self.model)

    def give_up(self) -> None:
        """Its caller wants no answer any more."""
        self.service.events.request(self.op, self.model, time.monotonic() - self.born, "cancelled")

    def _count(self) -> None:
        self.service.requests[self.op] += 1
        self.service.events.request(self.op, self.model, time.monotonic() - self.born)

    def _leave(self) -> None:
        self.work = None
        self.session.requests.pop(self.number, None)
