"""How an answer's tensors reach the client, and what a cancelled request leaves."""

from __future__ import annotations

import pytest

from luna_daemon.control.request import ClientRequest
from luna_daemon.core import ModelKind
from luna_daemon.pool.work import Outcome, Piece, Work
from luna_daemon.wire import messages as m
from luna_daemon.wire.arena import Slot
from luna_daemon.wire.frame import encode_call
from luna_daemon.wire.layout import INLINE_BYTES
from tests.unit.fakes import Memory

SMALL, LARGE = 1 << 10, INLINE_BYTES + 4096
CALL = encode_call(m.Echo())


def request_of(state, client, number: int = 1) -> ClientRequest:
    """A request as it is after it was dispatched."""
    made = ClientRequest(state, client.session, m.Request(number, CALL), None)
    made.op = "echo"
    return made


def outcome_of(memory: Memory, *sizes: int, number: int = 1) -> Outcome:
    """An outcome whose tensors are filled with 0, 1, 2 ..."""
    pieces = [memory.piece(size, number) for size in sizes]
    for value, piece in enumerate(pieces):
        piece.slot.view[:] = bytes([value]) * piece.slot.nbytes
    return Outcome("result", pieces, ["note"])


@pytest.mark.parametrize("sees_arena", [True, False])
def test_small_tensors_come_inline_and_large_ones_by_shared_memory(state, join, sees_arena):
    """A client that does not see the memory gets all inline, one after the other; what is leased stays in use."""
    client, memory = join(), Memory()
    client.session.sees_arena = sees_arena
    request_of(state, client).finish(outcome_of(memory, SMALL, LARGE, SMALL), shared=False)
    (reply,) = client.outbox.sent
    first, second, third = reply.tensors
    assert (reply.id, reply.result, reply.notes) == (1, "result", ["note"])
    assert (first.slot, first.offset, third.slot) == (0, 0, 0)
    payload = b"\0" * SMALL + (b"" if sees_arena else b"\1" * LARGE) + b"\2" * SMALL
    assert client.outbox.payloads == [payload]
    assert third.offset == (SMALL if sees_arena else SMALL + LARGE)
    assert bool(second.slot) is sees_arena and client.session.leases.nbytes == (LARGE if sees_arena else 0)
    assert memory.live == (1 if sees_arena else 0)
    client.session.leases.release_all()
    assert memory.live == 0 and state.events.results == {("echo", "ok"): 1}


def test_more_than_a_client_may_hold_comes_inline(state, join):
    """The limit announced at the greeting holds for answers too; memory of the heap is never leased."""
    client, memory = join(), Memory()
    client.session.sees_arena = True
    limit = state.limits.arena_bytes_per_client
    request_of(state, client).finish(outcome_of(memory, limit - LARGE, LARGE, LARGE), shared=False)
    assert [bool(ref.slot) for ref in client.outbox.sent[0].tensors] == [True, True, False]
    other = join()
    other.session.sees_arena = True
    heap = Outcome(None, [Piece(m.TensorRef("uint8", (LARGE,), LARGE, 0), Slot.on_heap(LARGE))], [])
    request_of(state, other).finish(heap, shared=False)
    assert other.outbox.sent[0].tensors[0].slot == 0


@pytest.mark.parametrize("shared", [True, False])
def test_whose_memory_it_is(state, join, shared):
    """Shared: the client gets uses of its own. Else it takes over the outcome's, or they end if it has left."""
    client, left, memory = join(), join(), Memory()
    client.session.sees_arena = True
    left.leave()
    for receiver in (client, left):
        outcome = outcome_of(memory, LARGE)
        request_of(state, receiver).finish(outcome, shared)
        assert outcome.pieces[0].slot.users == (
            2 if shared and receiver is client else int(shared or receiver is client)
        )
    assert left.outbox.sent == []


def test_a_cancelled_request_is_not_answered(state, join):
    """Its work goes with its last waiter, the result is counted, and its number is free."""
    client, other = join(), join()
    spec = m.LoadSpec("echo", ModelKind.ECHO, "", (), "cpu", "auto")
    work = Work("echo", CALL, spec, [], 1, None, [])
    state.pool.queue.put_back(work)
    for owner in (client, other):
        request_of(state, owner).wait(work)
    client.peer.received(client.connection, m.Cancel(1), None)
    assert work in state.pool.queue and not client.session.requests and len(work.waiters) == 1
    other.leave()
    assert work not in state.pool.queue and not state.sessions.keys() - {client.session.number}
    assert client.outbox.sent == other.outbox.sent == []
    assert state.events.results == {("echo", "cancelled"): 2}
