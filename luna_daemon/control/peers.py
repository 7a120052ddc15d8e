"""Peers of connections after the greeting: they receive the frames of a client or a worker."""

from __future__ import annotations

from collections.abc import Callable

from ..core import LimitExceeded, LunaError, ProtocolError
from ..pool.process import WorkerProcess
from ..wire import messages as m
from ..wire.arena import Slot
from ..wire.connection import Connection
from ..wire.frame import decode_call
from .answering import answer_later, begin
from .request import ClientRequest
from .session import Session
from .state import State

OnLost = Callable[[Connection], object]


class ClientPeer:
    """Receives the frames of a client.

    Args:
        session: the client's session.
        on_lost: called when the connection is lost.
    """

    def __init__(self, state: State, session: Session, on_lost: OnLost = lambda connection: None) -> None:
        self.state = state
        self.session = session
        self._on_lost = on_lost

    def place(self, connection: Connection, nbytes: int) -> Slot:
        """Memory for the tensors of a request."""
        return self.state.place(nbytes)

    def received(self, connection: Connection, message: m.Message, payload: Slot | None) -> None:
        """Handle a frame.

        Raises:
            ProtocolError: clients do not send this type of message, or a request's id is in use.
        """
        try:
            if isinstance(message, m.Request):
                self._begin(message, payload)
            elif isinstance(message, m.Release):
                for number in message.slots:
                    self.session.leases.release(number)
            elif isinstance(message, m.Bye):
                self.session.said_bye = True
            elif isinstance(message, m.Cancel):
                if (request := self.session.requests.get(message.id)) is not None:
                    request.cancel()
            else:
                raise ProtocolError(f"clients do not send {type(message).__name__}")
        finally:
            if payload is not None:
                payload.release()

    def _begin(self, message: m.Request, payload: Slot | None) -> None:
        if message.id < 1 or message.id in self.session.requests:
            raise ProtocolError(f"request id {message.id} is {'in use' if message.id > 0 else 'not positive'}")
        begin(self.state, ClientRequest(self.state, self.session, message, payload))

    def lost(self, connection: Connection, why: str) -> None:
        """Cancel the client's requests, and release its memory once its process can no longer write there."""
        state, session = self.state, self.session
        self._on_lost(connection)
        del state.sessions[session.number]
        state.pool.forget(session.number)
        for request in list(session.requests.values()):
            request.cancel()
        if session.said_bye or not session.leases:
            session.leases.release_all()
        else:
            state.spawn(session.release_after_exit())


class WorkerPeer:
    """Receives the frames of a worker: answers requests for shared memory, and passes other messages to the pool.

    Args:
        on_lost: called when the connection is lost.
    """

    def __init__(self, state: State, worker: WorkerProcess, on_lost: OnLost) -> None:
        self.state = state
        self.worker = worker
        self.connected = True
        self._on_lost = on_lost

    def place(self, connection: Connection, nbytes: int) -> Slot:
        """Memory for the tensors of an answer."""
        return self.state.place(nbytes)

    def received(self, connection: Connection, message: m.Message, payload: Slot | None) -> None:
        """Handle a frame."""
        if not isinstance(message, m.Request):
            self.state.pool.received(self.worker, message, payload)
            return
        if payload is not None:
            payload.release()
        self.state.spawn(answer_later(_WorkerRequest(connection, message.id), self._grant(connection, message)))

    async def _grant(self, connection: Connection, message: m.Request) -> None:
        """Lend the worker a slot for a result; the worker blocks until the answer."""
        call = decode_call(message.call)
        if not isinstance(call, m.Alloc):
            raise ProtocolError(f"workers do not send {type(call).__name__}")
        slot = await self.state.memory.allocate(call.nbytes)
        if slot is None:
            raise LimitExceeded("shared memory is full")
        if self.connected:
            connection.send(m.Reply(message.id, None, [self.worker.leases.lend(slot)]))
        else:
            slot.release()

    def lost(self, connection: Connection, why: str) -> None:
        """Report the loss to the pool, which retries the worker's request."""
        self.connected = False
        self._on_lost(connection)
        self.state.pool.lost(self.worker, why)


class _WorkerRequest:
    """A worker's request for shared memory, which waits for its answer."""

    op = "alloc"

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection = connection
        self._number = number

    def progress(self, stage: str, step: int, total: int) -> None:
        """Do nothing: workers need no progress messages."""

    def fail(self, error: LunaError) -> None:
        """Answer with an error."""
        self._connection.send(m.Failure(self._number, error.code, error.message, error.hint))
