"""What the tests share: a peer that says what it likes, calls in the background, servers that are not ours, TLS."""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from luna_daemon.client import DaemonClient
from luna_daemon.core import PROTOCOL_VERSION, RequestCancelled
from luna_daemon.system.runtime import find_token
from luna_daemon.wire import messages as m
from luna_daemon.wire.arena import process_space
from luna_daemon.wire.channel import Channel
from luna_daemon.wire.frame import encode_call

DEMO_VAE = Path(__file__).resolve().parents[2] / "demo" / "model" / "luna_demo_vae.safetensors"
DEMO_TOML = f'[models.demo]\nvae = ["{DEMO_VAE.as_posix()}"]\ntype = "sd3"\n'


class RawPeer:
    """A socket to a daemon and the means to say anything on it."""

    def __init__(self, daemon: Any) -> None:
        self.sock = socket.create_connection(("127.0.0.1", daemon.port), timeout=20)
        self.channel = Channel(self.sock)
        self._token = find_token(daemon.port, daemon.runtime_dir, {})

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.channel.close()

    def hello(self, token: str | None = None, protocol: int = PROTOCOL_VERSION, role: str = "client") -> m.Message:
        """Greet; the daemon's answer."""
        token = self._token if token is None else token
        self.channel.send(m.Hello(protocol, token, role, "raw peer", 2**22 + 1, "0.0.1"))
        return self.receive()

    def ask(self, call: Any, number: int = 1, tensors: list[m.TensorRef] | None = None, payload: bytes = b"") -> Any:
        """Send a request; its answer. ``call`` may be any bytes or structure."""
        raw = msgspec.Raw(msgspec.msgpack.encode(call)) if isinstance(call, dict) else encode_call(call)
        self.channel.send(m.Request(number, raw, tensors or []), [memoryview(payload)] if payload else [])
        return self.receive()

    def prove(self, number: int = 1000) -> None:
        """Show that shared memory is visible here, so that slots may be asked for."""
        folder = self.welcome.arena.folder
        self.ask(m.ArenaProof((Path(folder) / "nonce").read_text(), process_space()), number)

    @property
    def welcome(self) -> m.Welcome:
        """Greet, and expect to be let in."""
        answer = self.hello()
        assert isinstance(answer, m.Welcome)
        return answer

    def receive(self, timeout_s: float = 20.0) -> m.Message:
        """The next message that is no progress."""
        while True:
            received = self.channel.receive(timeout_s)
            assert received is not None, "no answer"
            if not isinstance(received[0], m.Progress):
                return received[0]


class Background:
    """A call in a thread of its own: its result or error, and when it ended."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error
        self.ended = time.monotonic()

    def wait(self, timeout_s: float = 20.0) -> Background:
        """Until it has ended, with a result or an error."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the call has not ended"
        return self

    def value(self, timeout_s: float = 20.0) -> Any:
        """Its result; its error is raised."""
        self.wait(timeout_s)
        if self.error is not None:
            raise self.error
        return self.result


def is_busy(info: dict[str, Any]) -> bool:
    """Whether a worker computes."""
    return any(worker["state"] == "busy" for worker in info["workers"])


_FLOOR_S = 0.004
"""Below it the scheduler of a busy machine decides, not the daemon."""


def ping_beside(client: DaemonClient, twin: DaemonClient, rounds: int = 300) -> tuple[list[float], list[float]]:
    """Seconds of so many pings of either, taken in turns: whatever else the machine does meets both."""
    times = [(client.ping(), twin.ping()) for _ in range(rounds)]
    return [mine for mine, _ in times], [other for _, other in times]


def assert_unharmed(client: DaemonClient, twin: DaemonClient) -> None:
    """A ping takes at most twice as long as one of ``twin``, a client of an idle daemon: the median, and 99 in 100.

    The best of six, since neighbours are noisy: a daemon that is harmed is slow every time.
    """
    seen = []
    for _ in range(6):
        mine, other = (statistics.quantiles(times, n=100) for times in ping_beside(client, twin))
        if all(mine[rank] <= max(2 * other[rank], _FLOOR_S) for rank in (49, 98)):
            return
        seen += [f"p{rank + 1} {mine[rank] * 1e3:.2f} ms beside {other[rank] * 1e3:.2f} ms" for rank in (49, 98)]
    raise AssertionError(f"a ping, here and to an idle daemon: {', '.join(seen)}")


@contextmanager
def occupied(daemon: Any) -> Iterator[Background]:
    """One worker computes until the block ends; the call that keeps it busy is then cancelled."""
    leave = threading.Event()
    call = Background(lambda: daemon.client().call(m.Echo(0, 60.0), is_cancelled=leave.is_set))
    daemon.wait_for(is_busy)
    try:
        yield call
    finally:
        leave.set()
        assert isinstance(call.wait().error, RequestCancelled)


def busy_pid(daemon: Any, not_: tuple[int, ...] = ()) -> int:
    """The pid of a worker that computes, once there is one."""
    info = daemon.wait_for(lambda info: any(w["state"] == "busy" and w["pid"] not in not_ for w in info["workers"]))
    return next(w["pid"] for w in info["workers"] if w["state"] == "busy" and w["pid"] not in not_)


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that is not ours: ``answer`` gets every connection; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                kept.append(connection)
                try:
                    answer(connection)
                except OSError:
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for _ in range(2):  # the first time wakes the thread, the second is for what it took meanwhile
            for connection in kept:
                connection.close()
            thread.join(2)


def tiny_clip(path: Path) -> Path:
    """A text encoder of CLIP-L's layout with two narrow layers."""
    sys.path.insert(0, str(DEMO_VAE.parents[1]))
    from make_text_encoder import make_tiny_clip

    return make_tiny_clip(path)


def make_certificate(folder: Path, name: str, san: str = "DNS:localhost,IP:127.0.0.1") -> tuple[Path, Path]:
    """A self-signed certificate for the names in ``san``, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", f"subjectAltName={san}", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key
