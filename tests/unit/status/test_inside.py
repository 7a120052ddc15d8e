"""Calls of the status page, made inside the control process."""

from __future__ import annotations

import asyncio

import pytest

from luna_daemon.core import LimitExceeded, LunaError
from luna_daemon.status.inside import InsideCaller
from luna_daemon.wire import messages as m
from tests.unit.control.conftest import state as state


def call(state, what: m.Call) -> m.Reply:
    async def main() -> m.Reply:
        return await InsideCaller(state, "the page").call(what)

    return asyncio.run(main())


def test_a_call_is_a_session_that_ends_with_its_answer(state):
    """Nothing of it stays."""
    assert call(state, m.Drain()).result == {"in_flight": 0}
    assert not state.sessions and not state.pool.accepting


@pytest.mark.parametrize("what", [m.LoraPin("absent"), m.ModelUnload(m.ModelRef("vae", name="absent"))])
def test_an_error_of_the_daemon_is_raised(state, what):
    """With its own class, and the session ends as well."""
    with pytest.raises(LunaError) as raised:
        call(state, what)
    assert raised.value.code == "model_not_found" and not state.sessions


def test_the_page_has_no_memory_of_its_own(state):
    """A browser may be on another host: the caller neither counts as local nor gets slots."""
    assert not InsideCaller.is_loopback
    with pytest.raises(LunaError) as raised:
        call(state, m.Alloc(8))
    assert not isinstance(raised.value, LimitExceeded)
