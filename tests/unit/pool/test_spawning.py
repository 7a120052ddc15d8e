"""A worker's process: how it is started, and that one that cannot be is an error at once."""

from __future__ import annotations

import socket
import sys

import pytest

from luna_daemon.pool.spawning import spawn


def test_a_process_reads_its_settings_and_prints_into_its_log(tmp_path):
    """It dials the port that it was told: nobody listens there, so it ends, and its log says why."""
    log = tmp_path / "worker.log"
    log.write_text("earlier\n")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        config = {"host": "127.0.0.1", "port": deaf.getsockname()[1], "token": "t", "backend": "echo"}
        process = spawn(sys.executable, config, log)
        assert process.pid > 0
        assert process.wait(60) == 1  # type: ignore[attr-defined]
    printed = log.read_text()
    assert printed.startswith("earlier\n") and "ConnectionRefusedError" in printed


def test_an_interpreter_that_is_not_there(tmp_path):
    """The caller learns it as an ``OSError``."""
    with pytest.raises(OSError, match="nowhere"):
        spawn(str(tmp_path / "nowhere"), {}, tmp_path / "log")
