"""A request gets one answer, at once or later: whatever its handler does, and whenever its client leaves."""

from __future__ import annotations

import asyncio
import threading

import pytest

from luna_daemon.control import answering
from luna_daemon.core import LimitExceeded, ProtocolError
from luna_daemon.files.resolver import NeedsIO
from luna_daemon.wire import messages as m
from luna_daemon.wire.arena import Slot
from tests.unit.control.conftest import until
from tests.unit.fakes import Memory

PING = m.Ping()


def handle(monkeypatch, handler) -> None:
    """Have ``ping`` answered by another handler."""
    monkeypatch.setitem(answering.HANDLERS, m.Ping, handler)


def test_at_once(join):
    """The answer bears the request's number, which is free again."""
    client = join()
    for _ in range(2):
        client.ask(7, PING)
    assert client.outbox.sent == [m.Reply(7, None, []), m.Reply(7, None, [])]


def test_later_with_signs_of_life(join, monkeypatch):
    """While a handler's coroutine runs the client hears of it, and its number is taken."""
    monkeypatch.setattr(answering, "_PROGRESS_S", 0.01)

    async def main() -> None:
        client, done = join(), asyncio.Event()

        async def later(state, request, call) -> None:
            await done.wait()
            request.answer("done")

        handle(monkeypatch, later)
        client.ask(1, PING)
        await until(lambda: m.Progress(1, "loading", 0, 0) in client.outbox.sent)
        with pytest.raises(ProtocolError, match="in use"):
            client.ask(1, PING)
        client.peer.received(client.connection, m.Cancel(1), None)  # nothing to cancel: it is answered all the same
        done.set()
        await until(lambda: client.outbox.sent[-1] == m.Reply(1, "done", []))
        assert not client.session.requests

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (LimitExceeded("too much"), "limit", "too much"),
        (FileNotFoundError(2, "No such file", "/x/y"), "model_load", "/x/y: No such file"),
        (KeyError("a bug"), "internal", "a bug"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_errors_become_answers(state, join, monkeypatch, caplog, later, error, code, text):
    """Raised at once or later: the client gets the code, the events the result; only a bug is logged."""

    async def main() -> None:
        client = join()

        async def fails_later(state, request, call) -> None:
            raise error

        def fails(state, request, call) -> None:
            raise error

        handle(monkeypatch, fails_later if later else fails)
        client.ask(1, PING)
        await until(lambda: client.outbox.sent)
        (answer,) = client.outbox.sent
        assert (answer.id, answer.code) == (1, code) and text in answer.message
        assert state.events.results == {("ping", code): 1} and not client.session.requests

    asyncio.run(main())
    assert ("Traceback" in caplog.text) is (code == "internal")


@pytest.mark.parametrize("stays", [True, False])
def test_files_are_read_beside_the_loop_first(join, monkeypatch, stays):
    """Then the handler runs again, with the request's bytes; not for a client that has left, whose bytes are free."""
    memory, asked, known = Memory(), [], threading.Event()

    def needs_a_look(state, request, call) -> None:
        asked.append(None if request.payload is None else bytes(request.payload.view[:2]))
        if len(asked) == 1:
            raise NeedsIO("a file", known.wait)
        request.answer("known")

    async def main() -> None:
        client, slot = join(), memory.slot(2)
        slot.view[:] = b"ab"
        handle(monkeypatch, needs_a_look)
        client.ask(1, PING, slot)
        assert memory.live == 1 and not client.outbox.sent
        if not stays:
            client.leave()
        known.set()
        await until(lambda: not memory.live)
        await until(lambda: not client.session.requests or not stays)
        assert asked == ([b"ab", b"ab"] if stays else [b"ab"])
        assert client.outbox.sent == ([m.Reply(1, "known", [])] if stays else [])

    asyncio.run(main())


def test_an_outdated_client_gets_the_answer_it_waits_for(state, join, monkeypatch):
    """After the token was renewed: what was asked before is answered, then the connection closed; no more is taken."""

    async def main() -> None:
        client, idle, done = join(), join(), asyncio.Event()

        async def later(state, request, call) -> None:
            await done.wait()
            request.answer("done")

        handle(monkeypatch, later)
        client.ask(1, PING)
        assert state.renew_token() == 2 and state.access.token == "another"
        await until(lambda: idle.outbox.closed)
        assert not client.outbox.closed
        client.ask(2, PING)
        assert client.outbox.sent[-1].code == "authentication"
        done.set()
        await until(lambda: m.Reply(1, "done", []) in client.outbox.sent)
        state.close_outdated()
        assert client.outbox.closed

    asyncio.run(main())


def test_a_message_that_clients_do_not_send(join):
    """Refused, and its payload is released."""
    memory = Memory()
    with pytest.raises(ProtocolError, match="do not send Welcome"):
        join().peer.received(None, m.Welcome(1, "", m.Limits(1, 1, 1, 1, 1), None, ""), memory.slot())
    assert memory.live == 0
    with pytest.raises(ProtocolError, match="not positive"):
        join().ask(0, PING, Slot.on_heap(0))
