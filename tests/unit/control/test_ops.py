"""Ops that the control process answers without a worker."""

from __future__ import annotations

import asyncio

import pytest

from luna_daemon.wire import messages as m


@pytest.fixture
def client(join):
    """A client that has greeted."""
    return join()


def ask(client, call, number: int = 1):
    """The answer to a call, at once or once the loop has run."""

    async def main():
        client.ask(number, call)
        for _ in range(200):
            if client.outbox.sent:
                break
            await asyncio.sleep(0.005)
        return client.outbox.sent.pop()

    return asyncio.run(main())


def test_ping_and_register_are_answered(client):
    """The predecessor's registration succeeds and does nothing."""
    assert ask(client, m.Ping()).result is None
    answer = ask(client, m.Register("vae", "sdxl"), 2).result
    assert answer == {"success": True, "kind": "vae", "type": "sdxl", "note": "models load by configuration"}


def test_reports_add_up_and_never_subtract(client, state):
    """A client may send any number."""
    for number, report in enumerate((m.Report(2, 1), m.Report(-5, -5), m.Report(1, 0)), 1):
        ask(client, report, number)
    assert (state.fallbacks, state.materialised) == (3, 1)


@pytest.mark.parametrize("nbytes", [1, 100])
def test_a_client_that_does_not_see_the_memory_gets_no_slot(client, nbytes):
    """It would write into a file that is not the daemon's."""
    failure = ask(client, m.Alloc(nbytes))
    assert failure.code == "bad_request" and "has not proved" in failure.message


@pytest.mark.parametrize("nbytes", [0, -1, 1 << 60])
def test_a_slot_has_a_possible_size(client, nbytes):
    """The error names size and limit."""
    client.session.sees_arena = True
    failure = ask(client, m.Alloc(nbytes))
    assert failure.code == "limit" and f"a slot of {nbytes} bytes" in failure.message


def test_a_client_holds_at_most_its_share(client, state):
    """What is asked for and not granted yet counts."""
    client.session.sees_arena = True
    client.session.reserving = state.limits.arena_bytes_per_client
    failure = ask(client, m.Alloc(1))
    assert failure.code == "limit" and "this client holds" in failure.message
    assert client.session.reserving == state.limits.arena_bytes_per_client


def test_full_memory_is_an_error_and_the_reservation_ends(client):
    """The client then sends its tensors inline."""
    client.session.sees_arena = True
    failure = ask(client, m.Alloc(8))
    assert failure.message == "shared memory is full" and client.session.reserving == 0


def test_a_wrong_nonce_proves_nothing(client):
    """Nor does any nonce where there is no shared memory."""
    failure = ask(client, m.ArenaProof("guess"))
    assert failure.code == "bad_request" and not client.session.sees_arena


def test_patch_sets_name_text_encoders_only(client):
    """A VAE has no LoRA."""
    failure = ask(client, m.PatchPut("hash", [], [m.ModelRef("vae", name="sdxl")]))
    assert failure.code == "bad_request" and "kind 'vae'" in failure.message


def test_drain_refuses_new_work_and_says_what_runs(client, state):
    """Shutdown does the same and ends the daemon."""
    assert ask(client, m.Drain()).result == {"in_flight": 0} and not state.pool.accepting
