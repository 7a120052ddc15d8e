"""What a request's descriptors may name, and what new settings change in a running daemon."""

from __future__ import annotations

import asyncio

import pytest

from luna_daemon.config import Settings, load_settings
from luna_daemon.control.reloading import apply
from luna_daemon.core import AuthenticationError, BadRequest, LimitExceeded
from luna_daemon.pool.work import release
from luna_daemon.wire import messages as m
from tests.unit.fakes import Memory


def ref(nbytes: int, offset: int = 0, slot: int = 0) -> m.TensorRef:
    return m.TensorRef("uint8", (nbytes,), nbytes, offset, slot)


def test_pieces_of_the_payload_and_of_leased_slots(state, join):
    """Each with its own use of the memory, inline ones by their offset."""
    session, memory = join().session, Memory()
    payload, leased = memory.slot(8), memory.slot(6)
    payload.view[:], leased.view[:] = b"abcdefgh", b"123456"
    number = session.leases.add(leased)
    pieces = state.pieces(session, [ref(3, 2), ref(6, 0, number), ref(0)], payload)
    assert [bytes(piece.slot.view) for piece in pieces] == [b"cde", b"123456", b""]
    payload.release()
    session.leases.release_all()
    assert memory.live == 2
    release(pieces)
    assert memory.live == 0


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (ref(4, 5), BadRequest, r"5\.\.9 is outside"),
        (ref(4, 0, 99), BadRequest, "99 is not held"),
        (m.TensorRef("uint8", (3,), 4, 0), BadRequest, "4"),
        (ref((1 << 20) + 1), LimitExceeded, "limit is"),
    ],
)
def test_descriptors_that_are_refused_hold_nothing(state, join, bad, error, text):
    """The uses of the descriptors before the bad one end."""
    session, memory = join().session, Memory()
    payload = memory.slot(8)
    with pytest.raises(error, match=text):
        state.pieces(session, [ref(2), bad], payload)
    assert payload.users == 1
    with pytest.raises(BadRequest):
        state.pieces(session, [ref(1)], None)


def test_all_tensors_of_a_request_count_together(state, join):
    """The limit is for their sum; a negative size does not make room for another."""
    session, half = join().session, ref(600_000)
    with pytest.raises(LimitExceeded, match="1200000 bytes"):
        state.pieces(session, [half, m.TensorRef("uint8", (), -600_000, 0), half], None)


def test_a_patch_set_that_can_never_fit(state, join):
    """Refused by its name, and what was sent is released; the old one of its name stays."""
    client, memory = join(), Memory()
    state.patches.max_bytes = 8
    put = m.PatchPut("style", None, [])
    client.ask(1, put, memory.slot(8), tensors=[ref(8)])
    client.ask(2, put, memory.slot(9), tensors=[ref(9)])
    assert client.outbox.sent[0].id == 1 and client.outbox.sent[1].code == "limit"
    assert "'style'" in client.outbox.sent[1].message and "style" in state.patches and memory.live == 1


def test_the_token(state):
    """Says whether a token was missing or wrong, and where the right one lies; a renewed one counts at once."""
    state.access.check("token")
    for token, word in (("", "missing"), ("tokem", "wrong"), ("tök", "wrong"), ("\udcff", "wrong")):
        with pytest.raises(AuthenticationError, match=f"{word}.*nowhere"):
            state.access.check(token)
    state.access.renew()
    state.access.check("another")


def test_new_settings(state, join):
    """What can be taken is applied everywhere it is looked up; the rest stays as it was and is named."""

    async def main() -> None:
        session, memory = join().session, Memory()
        known = session.comfy
        known[m.ComfyId("/c", "/p")] = m.ComfyId("/c", "/p")
        state.conditionings.put(b"a", memory.outcome(1 << 20), 1 << 20)
        new = {"conditioning_cache_mb": 0, "lora_cache_entries": 3, "queue_limit": 5, "model_type": "flux", "port": 7}
        answer = apply(state, load_settings({**new, "max_tensor_mb": 1, "arena_client_mb": 1}, {}))
        assert answer == {
            "taken": ["conditioning_cache_mb", "lora_cache_entries", "model_type", "queue_limit"], "restart": ["port"]
        }  # fmt: skip
        assert state.settings is state.pool.settings and state.settings.queue_limit == 5
        assert state.settings.port == Settings.model_fields["port"].default
        assert memory.live == 0 and state.loras.max_entries == 3 and "flux" in state.resolver.named
        known[m.ComfyId("/d", "/p")] = m.ComfyId("/d", "/p")  # by a check that began before
        assert not session.comfy, "its ComfyUI is checked again"
        assert state.limits.queue == 5, "as clients that connect from now on are told"
        assert apply(state, state.settings) == {"taken": [], "restart": []}

    asyncio.run(main())
