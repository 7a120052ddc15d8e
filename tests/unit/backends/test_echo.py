"""The diagnostic backend, and the choice of backends by name."""

from __future__ import annotations

import pytest

from luna_daemon.backends import make_backend
from luna_daemon.backends.echo import EchoBackend
from luna_daemon.core import ConfigError, RequestCancelled
from luna_daemon.wire.messages import LoadSpec

SPEC = LoadSpec("echo", "echo", "", (), "cpu", "auto")


def test_echo_is_a_backend_of_that_name():
    backend = make_backend("echo")
    assert isinstance(backend, EchoBackend) and backend.devices() == ["cpu"]
    with pytest.raises(ConfigError, match=r"'tensorrt' does not exist.*echo, diffusers, comfy"):
        make_backend("tensorrt")


def test_as_many_bytes_as_asked_for():
    model = EchoBackend().load(SPEC)
    first = model.echo(12, 0, lambda done, total: None)
    assert first == bytes(12) and model.echo(12, 0, lambda done, total: None) is first
    assert model.echo(0, 0, lambda done, total: None) == b""


def test_pretended_work_shows_progress_and_can_be_cancelled():
    steps: list[tuple[int, int]] = []
    model = EchoBackend().load(SPEC)
    model.echo(4, 0.06, lambda done, total: steps.append((done, total)))
    assert steps == [(0, 3), (1, 3), (2, 3)]

    def leave(done: int, total: int) -> None:
        raise RequestCancelled("the caller left")

    with pytest.raises(RequestCancelled):
        model.echo(4, 60, leave)
