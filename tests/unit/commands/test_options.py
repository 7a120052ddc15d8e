"""Which daemon the options mean, and what is said when it does not answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from luna_daemon.commands.options import client_for, dial
from luna_daemon.core import ConfigError, DaemonConnectionError
from luna_daemon.system.ports import bind

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def port() -> int:
    """A port that nobody listens on."""
    with bind("127.0.0.1", 0) as probe:
        return int(probe.getsockname()[1])


def leave_behind(folder: Path, port: int, pid: int) -> None:
    """A runtime folder as a daemon with this pid writes it."""
    (folder / str(port)).mkdir(parents=True)
    (folder / str(port) / "daemon.json").write_text(f'{{"pid": {pid}}}')


def test_options_go_before_the_file(tmp_path):
    """Host, port and runtime folder of the file hold where no option is given; every address is dialled as loopback."""
    file = tmp_path / "luna.toml"
    file.write_text(f"host = '0.0.0.0'\nport = 5\nruntime_dir = '{tmp_path.as_posix()}'\n")
    client = client_for(None, None, file, None)
    assert (client.host, client.port, client.runtime_dir) == ("127.0.0.1", 5, tmp_path)
    client = client_for("10.0.0.1", 6, file, tmp_path / "other")
    assert (client.host, client.port, client.runtime_dir) == ("10.0.0.1", 6, tmp_path / "other")


def test_a_wrong_option_is_a_wrong_setting():
    """Before anything is dialled."""
    with pytest.raises(ConfigError, match="'port' is 70000"):
        client_for(None, 70000, None, None)


def test_without_a_daemon_the_cure_is_to_start_one(port, tmp_path):
    """Also where a daemon that was killed left its folder."""
    with pytest.raises(DaemonConnectionError, match="no Luna Daemon answers"):
        dial(None, port, None, tmp_path)
    leave_behind(tmp_path, port, 2**22 + 1)  # more than any pid
    with pytest.raises(DaemonConnectionError, match="no Luna Daemon answers"):
        dial(None, port, None, tmp_path)


def test_a_daemon_that_starts_or_stops_is_told_from_none(port, tmp_path):
    """Its process is alive: to start another would be wrong."""
    leave_behind(tmp_path, port, os.getpid())
    with pytest.raises(DaemonConnectionError, match=rf"\(pid {os.getpid()}\) does not answer") as caught:
        dial(None, port, None, tmp_path)
    assert "ask again" in caught.value.hint
