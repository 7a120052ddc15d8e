"""A client's request on its way to the answer."""

from __future__ import annotations

import time
from typing import Any

from ..core import LunaError
from ..pool.work import Outcome, Piece, Work
from ..wire import messages as m
from ..wire.arena import Slot
from ..wire.layout import lay_out
from .session import Session
from .state import State


class ClientRequest:
    """A request that waits for its answer: a ``Waiter`` of the pool.

    Args:
        payload: the bytes that came with the message; its owner keeps it in use until the request is dispatched.
    """

    def __init__(self, state: State, session: Session, message: m.Request, payload: Slot | None) -> None:
        self.state = state
        self.session = session
        self.client = session.number
        self.number = message.id
        self.message = message
        self.payload = payload
        self.op = "unknown"
        self.model = ""
        """What people call the model, once it is known."""
        self.born = time.monotonic()
        self.work: Work | None = None

    def resolve(self, ref: m.ModelRef) -> m.LoadSpec:
        """The model that this request names; raises what ``State.resolve`` raises."""
        return self.state.resolve(self.session, ref)

    def pieces(self) -> list[Piece]:
        """The tensors of this request, each with a use of its memory; raises what ``State.pieces`` raises."""
        return self.state.pieces(self.session, self.message.tensors, self.payload)

    def wait(self, work: Work | None = None) -> None:
        """Be answered later, by ``work`` if it is given: the session knows the request until then."""
        self.session.requests[self.number] = self
        if work is not None:
            self.work = work
            work.waiters.append(self)

    def progress(self, stage: str, step: int, total: int) -> None:
        """Tell the client how far the request is, unless the client reads too slowly."""
        if not self.session.connection.crowded:
            self.session.connection.send(m.Progress(self.number, stage, step, total))

    def answer(self, result: Any, tensors: list[m.TensorRef] | None = None) -> None:
        """Answer without a worker."""
        self._leave()
        self.session.connection.send(m.Reply(self.number, result, tensors or []))
        self._count()

    def finish(self, outcome: Outcome, shared: bool) -> None:
        """Answer with tensors.

        Args:
            shared: others hold the same slots: this client gets uses of its own, to copy from. Otherwise the
                outcome's uses pass to this client.
        """
        self._leave()
        if not self.state.is_connected(self.session):
            if not shared:
                outcome.release()
            return
        held = [(piece.ref, piece.slot.retain() if shared else piece.slot) for piece in outcome.pieces]

        def in_slot(ref: m.TensorRef, slot: Slot) -> m.TensorRef | None:
            if not slot.number or not self._may_lease(slot):
                return None
            return ref.placed(slot.offset, self.session.leases.add(slot), slot.segment, shared)

        refs, inline = lay_out(held, in_slot)
        self.session.connection.send(m.Reply(self.number, outcome.result, refs, outcome.notes), inline)
        self._count()

    def _may_lease(self, slot: Slot) -> bool:
        """Whether this client may hold more shared memory; tensors beyond that come inline."""
        limit = self.state.limits.arena_bytes_per_client
        return self.session.sees_arena and self.session.leases.nbytes + slot.nbytes <= limit

    def fail(self, error: LunaError) -> None:
        """Answer with an error."""
        self._leave()
        retry = getattr(error, "retry_after_s", 0.0)
        self.session.connection.send(m.Failure(self.number, error.code, error.message, error.hint, retry))
        self._count(error.code)
        self.state.events.failed(error.code, error.message, self.op, self.model)

    def cancel(self) -> None:
        """Stop computing, and answer nothing; a request that no worker computes is answered all the same."""
        if self.work is not None:
            self.state.pool.cancel(self.work, self)
            self._leave()
            self._count("cancelled")

    def _count(self, result: str = "ok") -> None:
        self.state.events.request(self.op, self.model, time.monotonic() - self.born, result)

    def _leave(self) -> None:
        self.work = None
        if self.session.requests.get(self.number) is self:
            del self.session.requests[self.number]
