"""Something else listens on our port: the client says what it found, soon, and never mistakes it for a daemon."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest

from luna_daemon.client import DaemonClient
from luna_daemon.core import ConfigError, DaemonConnectionError, PortInUse, VersionMismatch
from luna_daemon.daemon_server import LunaDaemon
from luna_daemon.wire import messages as m
from luna_daemon.wire.frame import encode_frame
from tests.integration.conftest import SERVER
from tests.integration.helpers import listening
from tests.waiting import within

LIMITS = m.Limits(1 << 20, 1 << 20, 1 << 20, 1, 1)


def predecessor(connection):
    """The predecessor's daemon: a length in four big-endian bytes, then as much pickle; no answer before that."""
    (length,) = struct.unpack(">I", connection.recv(4))
    while length > 0 and (data := connection.recv(65536)):
        length -= len(data)


def closes_at_once(connection):
    connection.close()


def garbage(connection):
    connection.sendall(b"\x00\xffSSH-2.0-OpenSSH_9.6\r\n" + bytes(100))


def http(connection):
    connection.recv(100)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def endless_header(connection):
    connection.sendall(struct.pack("<4sIQ", b"LDP1", 2**32 - 1, 0))


def endless_payload(connection):
    connection.sendall(struct.pack("<4sIQ", b"LDP1", 10, 2**63))


def answers_something_else(connection):
    connection.sendall(encode_frame(m.Reply(1, "hello yourself")))


IMPOSTORS = {
    predecessor: "the predecessor's daemon",
    closes_at_once: "closed the connection instead of greeting",
    garbage: "something else than Luna Daemon",
    http: "something else than Luna Daemon.*HTTP",
    endless_header: "something else than Luna Daemon",
    endless_payload: "something else than Luna Daemon",
    answers_something_else: "did not greet",
}


@pytest.mark.parametrize("answer, words", IMPOSTORS.items(), ids=[call.__name__ for call in IMPOSTORS])
def test_the_client_says_what_it_found(tmp_path, answer, words):
    """Whatever answers in our place: DaemonConnectionError with port and finding, within a second and a half."""
    with listening(answer) as port, DaemonClient("127.0.0.1", port, runtime_dir=tmp_path) as client:
        with within(1.0), pytest.raises(DaemonConnectionError, match=words) as caught:
            client.ping()
        assert str(port) in str(caught.value)
        assert not client.is_running()


def test_a_daemon_of_another_version(tmp_path):
    """A newer daemon's frames are a version mismatch that names both, not garbage."""
    frame = b"LDP2" + encode_frame(m.Failure(0, "x", "x"))[4:]
    with (
        listening(lambda connection: connection.sendall(frame)) as port,
        pytest.raises(VersionMismatch, match="LDP/2, this side LDP/1"),
    ):
        DaemonClient("127.0.0.1", port, runtime_dir=tmp_path).ping()


def test_garbage_after_the_welcome(tmp_path):
    """A daemon that goes mad in the middle breaks the call that waits, with an error that lets the local model in."""

    def answer(connection):
        connection.recv(1000)
        connection.sendall(encode_frame(m.Welcome(1, "9", LIMITS)))
        connection.recv(1000)
        connection.sendall(struct.pack("<4sIQ", b"LDP1", 2**32 - 1, 0))

    with listening(answer) as port:
        client = DaemonClient("127.0.0.1", port, runtime_dir=tmp_path)
        for _ in range(2):  # and the next call connects anew
            with pytest.raises(DaemonConnectionError, match="header of 4294967295 bytes"):
                client.ping()


def test_nobody_listens(tmp_path):
    """The error says where nobody answered and how to start a daemon."""
    with listening(closes_at_once) as port:
        pass
    with pytest.raises(DaemonConnectionError, match=f"127.0.0.1:{port}") as caught:
        DaemonClient("127.0.0.1", port, runtime_dir=tmp_path).ping()
    assert "luna-daemon serve" in caught.value.hint


def test_memory_of_another_machine(start_daemon):
    """A nonce that is not the daemon's (a container with a /dev/shm of its own) means TCP, not an error."""
    daemon = start_daemon()
    (daemon.arena_dir / f"luna-daemon-{daemon.port}" / "nonce").write_text("of somebody else")
    info = daemon.client().get_daemon_info()
    assert info["transport"] == "tcp" and "not the daemon's" in info["transport_why"]
    assert daemon.client().call(m.Echo(1 << 20)).tensors[0].numel() == 1 << 18


def test_the_port_is_taken(start_daemon, tmp_path):
    """A second daemon on the port ends with code 3 and says who has it; the first goes on."""
    daemon = start_daemon()
    second = start_daemon(port=daemon.port, wait=False)
    second.expected_to_die = True
    assert second.process.wait(20) == 3
    text = second.log.read_text()
    assert f"port {daemon.port}" in text and f"pid {daemon.process.pid}" in text and "Traceback" not in text
    assert daemon.client().ping() > 0


def test_the_port_is_taken_by_something_else(tmp_path):
    """The message names the program that has the port."""
    with listening(closes_at_once) as port:
        done = subprocess.run(
            [sys.executable, str(SERVER), "--port", str(port), "--runtime-dir", str(tmp_path)],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    assert done.returncode == 3
    assert f"port {port}" in done.stderr and "python" in done.stderr and "Traceback" not in done.stderr


def test_starting_from_python_tells_a_taken_port_from_a_wrong_setting(tmp_path, monkeypatch):
    """``start()`` raises what ended the daemon, with its message: whatever that says."""
    with listening(closes_at_once) as port:
        with pytest.raises(PortInUse, match=f"port {port}"):
            LunaDaemon(port=port, runtime_dir=tmp_path).start()
        with pytest.raises(ConfigError, match="tls_key"):
            LunaDaemon(port=port, runtime_dir=tmp_path, tls_key=tmp_path / "is in use by").start()


def test_a_start_that_times_out_leaves_another_daemon_running(start_daemon):
    """``start()`` stops only the daemon that it started, not one that answers on the same port."""
    running = start_daemon()
    with pytest.raises(DaemonConnectionError, match="within 0 s"):
        LunaDaemon(port=running.port, runtime_dir=running.runtime_dir).start(timeout_s=0.0)
    assert running.info()["status"] == "running"


def test_two_daemons_side_by_side(start_daemon):
    """Two daemons of one user on two ports have their own tokens, memory and workers; one ends, the other goes on."""
    first, second = start_daemon(), start_daemon()
    for daemon in (first, second):
        client = daemon.client()
        assert client.call(m.Echo(1 << 20)).tensors[0].numel() == 1 << 18
        assert client.get_daemon_info()["transport"] == "shared memory"
    assert first.info()["workers"][0]["pid"] != second.info()["workers"][0]["pid"]
    first.stop()
    assert second.client().call(m.Echo(1 << 20)).tensors[0].numel() == 1 << 18
