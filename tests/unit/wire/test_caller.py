"""When a connection is made, made again, and when a call is sent a second time."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from luna_daemon.core import AuthenticationError, DaemonConnectionError, LunaError
from luna_daemon.wire import caller as module
from luna_daemon.wire import messages as m
from luna_daemon.wire.caller import Caller


class Links:
    """Stands in for the connections of one caller: answers each call of each from a list."""

    def __init__(self, *outcomes: LunaError | str) -> None:
        self.outcomes = list(outcomes)
        self.made: list[SimpleNamespace] = []

    def __call__(self, *where: object) -> SimpleNamespace:
        link = SimpleNamespace(broken=None, where=where, calls=0, closed=False)
        link.call = lambda *args: self._answer(link)
        link.close = lambda: setattr(link, "closed", True)
        self.made.append(link)
        return link

    def _answer(self, link: SimpleNamespace) -> str:
        link.calls += 1
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, LunaError):
            raise outcome
        return outcome


@pytest.fixture
def make(monkeypatch):
    """A caller, and what its connections answer."""

    def make(*outcomes: LunaError | str) -> tuple[Caller, Links]:
        links = Links(*outcomes)
        monkeypatch.setattr(module, "Link", links)
        return Caller("127.0.0.1", 5), links

    return make


def test_one_connection_for_many_calls(make):
    caller, links = make("a", "b")
    assert links.made == []
    assert [caller.call(m.Ping()), caller.call(m.Ping())] == ["a", "b"] and len(links.made) == 1


def test_a_broken_connection_is_made_again(make):
    """At the next call, not before; the call that broke it is the caller's to repeat: it may have been done."""
    caller, links = make(DaemonConnectionError("lost"), "b")
    with pytest.raises(DaemonConnectionError):
        caller.call(m.Ping())
    links.made[0].broken = DaemonConnectionError("lost")
    assert len(links.made) == 1 and caller.call(m.Ping()) == "b" and len(links.made) == 2


def test_a_renewed_token_is_read_again_once(make):
    """The daemon refused without doing anything: greet again and repeat. A second refusal is raised."""
    caller, links = make(AuthenticationError("renewed"), "b", AuthenticationError("x"), AuthenticationError("y"))
    assert caller.call(m.Ping()) == "b" and len(links.made) == 2
    with pytest.raises(AuthenticationError, match="y"):
        caller.call(m.Ping())
    assert len(links.made) == 3


def test_a_forked_child_dials_by_itself(make, monkeypatch):
    caller, links = make("a", "b")
    caller.call(m.Ping())
    monkeypatch.setattr(os, "getpid", lambda: -5)
    assert caller.call(m.Ping()) == "b" and len(links.made) == 2 and links.made[0].closed


def test_a_closed_caller_connects_at_its_next_call(make):
    caller, links = make("a", "b")
    with caller:
        caller.call(m.Ping())
    assert links.made[0].closed and caller.call(m.Ping()) == "b"


def test_where_the_daemon_is_comes_from_the_settings(monkeypatch, tmp_path):
    """What is not given; a listening address that names every interface is dialled at loopback."""
    for name, value in {"HOST": "0.0.0.0", "PORT": "77", "RUNTIME_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"LUNA_{name}", value)
    caller, given = Caller(tls_ca=""), Caller("10.0.0.1", 8, runtime_dir="/other")
    assert (caller.host, caller.port, caller.runtime_dir) == ("127.0.0.1", 77, tmp_path)
    assert (given.host, given.port, str(given.runtime_dir)) == ("10.0.0.1", 8, os.path.normpath("/other"))
