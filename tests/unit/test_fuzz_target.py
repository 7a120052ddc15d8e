"""The fuzzer's target on its kept corpus, on every op, and on damage: what a peer says never harms the service."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luna_daemon.wire.arena import Slot
from tests.fuzz.seeds import seeds
from tests.fuzz.target import Target

CORPUS = Path(__file__).resolve().parents[1] / "fuzz" / "corpus"
SEEDS = seeds()
DAMAGE = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4)


@pytest.fixture(scope="module")
def target():
    made = Target()
    yield made
    made.close()


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_every_op(target, name):
    """Each message and op, from a stranger and from a client, leaves nothing behind."""
    target.run(SEEDS[name])


def test_the_kept_corpus(target):
    """Inputs that the fuzzer found worth keeping, each of which reaches something new."""
    files = sorted(CORPUS.iterdir())
    assert len(files) >= len(SEEDS)
    for file in files:
        target.run(file.read_bytes())


def damaged(first, second, damage):
    """Two messages of one conversation, some bytes changed."""
    data = bytearray(SEEDS[first] + SEEDS[second][1:])
    for place, value in damage:
        data[place % len(data)] = value
    return bytes(data)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(SEEDS)), st.sampled_from(sorted(SEEDS)), DAMAGE)
def test_damaged_conversations(target, first, second, damage):
    """From whoever: typed errors at most; what fails is reduced to its least damage."""
    target.run(damaged(first, second, damage))


def test_thousands_of_damaged_conversations(target):
    """More of them, by a seeded generator that costs next to nothing."""
    generator, names = random.Random(0), sorted(SEEDS)
    for _ in range(3000):
        damage = [(generator.randrange(1 << 16), generator.randrange(256)) for _ in range(generator.randint(0, 4))]
        data = damaged(generator.choice(names), generator.choice(names), damage)
        try:
            target.run(data)
        except BaseException as error:
            raise AssertionError(f"{data!r}") from error


def test_it_would_notice(target, monkeypatch):
    """The target fails when the service forgets a slot: else it proves nothing."""
    monkeypatch.setattr(Slot, "release", lambda self: None)
    with pytest.raises(AssertionError, match="shared memory"):
        target.run(SEEDS["op-loraput"])
    monkeypatch.undo()
    target.service.state.memory.arena.close()
    target.service = target._make()
