"""Ports: who has one, and whether it answers."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from luna_daemon.system import ports


def test_a_bound_port_is_taken():
    """A second socket is refused with EADDRINUSE while the first listens, and gets the port afterwards."""
    first = ports.bind("127.0.0.1", 0)
    number = first.getsockname()[1]
    first.listen()
    with first, pytest.raises(OSError) as caught:
        ports.bind("127.0.0.1", number)
    assert caught.value.errno == errno.EADDRINUSE
    with ports.bind("127.0.0.1", number) as second:
        assert second.getsockname() == ("127.0.0.1", number)


def test_a_host_of_another_machine():
    """An address that this machine does not have is not mistaken for a taken port."""
    with pytest.raises(OSError) as caught:
        ports.bind("203.0.113.9", 0)
    assert caught.value.errno != errno.EADDRINUSE


def test_an_address_with_colons_is_ipv6():
    """The family follows from the host."""
    try:
        bound = ports.bind("::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with bound:
        assert bound.family == socket.AF_INET6


def test_who_listens_and_whether_it_answers():
    """A listening socket answers and is this process'; once closed nobody listens."""
    with ports.bind("127.0.0.1", 0) as bound:
        number = bound.getsockname()[1]
        assert not ports.answers("127.0.0.1", number) and ports.listener(number) is None
        bound.listen()
        assert ports.answers("127.0.0.1", number)
        found = ports.listener(number)
        assert found is not None and found[1] == os.getpid()
    assert not ports.answers("127.0.0.1", number) and ports.listener(number) is None
