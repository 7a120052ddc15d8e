"""Inside a worker: jobs, what is said of failures, and where results go."""

from __future__ import annotations

import logging

import pytest

from luna_daemon.backends.echo import EchoModel
from luna_daemon.core import ConfigError, OutOfMemory
from luna_daemon.pool.child import Worker, WorkerConfig
from luna_daemon.pool.compute import Result
from luna_daemon.wire import messages as m
from luna_daemon.wire.frame import encode_call

SPEC = m.LoadSpec("echo", "echo", "", (), "cpu", "auto")


class Arena:
    """Memory by offset."""

    def __init__(self) -> None:
        self.written: dict[int, bytearray] = {}

    def slice(self, segment: str, offset: int, nbytes: int) -> memoryview:
        return memoryview(self.written.setdefault(offset, bytearray(nbytes)))


class Channel:
    """Keeps what is sent; ``message`` is the last one."""

    def __init__(self) -> None:
        self.sent: list[m.Message] = []

    def send(self, message, payload=()) -> None:
        self.message, self.payload = message, list(payload)
        self.sent.append(message)


class Echo:
    """Loads echo models; ``error`` is raised instead, ``broken`` by the model."""

    def __init__(self, error: Exception | None = None, broken: Exception | None = None) -> None:
        self.error, self.broken = error, broken

    def load(self, spec: m.LoadSpec) -> EchoModel:
        if self.error is not None:
            raise self.error
        model = EchoModel()
        if self.broken is not None:
            model.echo = self._break  # type: ignore[method-assign]
        return model

    def _break(self, *args: object) -> memoryview:
        assert self.broken is not None
        raise self.broken


def new_worker(backend: str = "echo") -> Worker:
    """A worker whose daemon is a list of messages."""
    worker = Worker.__new__(Worker)
    worker.config = WorkerConfig("", 0, "", backend)
    worker.arena, worker.channel, worker.models, worker.cancelled = None, Channel(), {}, set()
    worker._reported = 0.0
    return worker


def job(number: int = 1, call: m.Call | None = None, **more) -> m.Job:
    return m.Job(number, encode_call(call or m.Echo(4)), SPEC, **more)


def test_a_granted_slot_is_used_for_one_tensor():
    """Two results of one size do not land in the slot that came with the job: one would overwrite the other."""
    worker = Worker.__new__(Worker)
    worker.arena, worker.channel = Arena(), Channel()
    worker._reserve = lambda nbytes: m.TensorRef("uint8", (nbytes,), nbytes, 8192, 2, "seg")
    size = 128 << 10
    grant = m.TensorRef("uint8", (size,), size, 0, 1, "seg")
    ref = m.TensorRef("uint8", (size,), size, 0)
    tensors = [(ref, memoryview(bytes([value]) * size)) for value in (1, 2)]
    worker._reply(m.Job(1, encode_call(m.Echo()), SPEC, grant=grant), Result(None, tensors))
    assert [(sent.slot, sent.offset) for sent in worker.channel.message.tensors] == [(1, 0), (2, 8192)]
    assert [bytes(worker.arena.written[offset][:1]) for offset in (0, 8192)] == [b"\x01", b"\x02"]


def test_a_job(caplog):
    """The model is loaded at its first job, with what the daemon shows meanwhile; then the reply."""
    worker = new_worker()
    worker._serve(Echo(), job(1), memoryview(b""))
    worker._serve(Echo(), job(2), memoryview(b""))
    kinds = [(type(message), getattr(message, "stage", "")) for message in worker.channel.sent]
    assert kinds == [
        (m.Progress, "loading"), (m.WorkerStatus, ""), (m.Progress, "running"), (m.Reply, ""), (m.Reply, ""),
    ]  # fmt: skip
    assert [message.id for message in worker.channel.sent if isinstance(message, m.Reply)] == [1, 2]


@pytest.mark.parametrize(
    ("backend", "code", "words"),
    [
        (Echo(error=ConfigError("no such family", "Name one")), "model_load", "no such family"),
        (Echo(error=OutOfMemory("full")), "out_of_memory", "full"),
        (Echo(broken=MemoryError()), "out_of_memory", "allocation failed"),
        (Echo(broken=KeyError("weights")), "internal", "KeyError: 'weights'"),
    ],
)
def test_failures_are_typed(backend, code, words, caplog):
    """Only a bug comes with its stack, without the message at its end: the caller's words stay out of it."""
    worker = new_worker()
    with caplog.at_level(logging.CRITICAL):
        worker._serve(backend, job(), memoryview(b""))
    failure = worker.channel.message
    assert (failure.id, failure.code) == (1, code) and words in failure.message
    assert ("in _break" in failure.trace) is (code == "internal") and "weights" not in failure.trace


def test_a_cancelled_job():
    """It ends at its next step; the next job of another number is not cancelled."""
    worker = new_worker()
    worker._dispatch(m.Cancel(1), memoryview(b""))
    worker._serve(Echo(), job(1, m.Echo(4, 0.1)), memoryview(b""))
    assert worker.channel.message.code == "cancelled" and not worker.cancelled
    worker._serve(Echo(), job(2, m.Echo(4, 0.02)), memoryview(b""))
    assert isinstance(worker.channel.message, m.Reply)


def test_unloading():
    """Models go, and those that stay are told which."""
    worker, told = new_worker(), []

    class Model(EchoModel):
        def forget(self, models):
            told.extend(models)

    gone = EchoModel()
    worker.models = {"gone": gone, "kept": Model()}
    worker._unload(["gone", "never there"])
    assert list(worker.models) == ["kept"] and told == [gone]


def test_a_tensor_that_cannot_be_seen():
    """Shared memory of another container: the caller is told, nothing is read."""
    worker = new_worker()
    worker._serve(Echo(), job(tensors=[m.TensorRef("uint8", (4,), 4, 0, 3, "seg")]), memoryview(b""))
    assert worker.channel.message.code == "bad_request" and "cannot use" in worker.channel.message.message


@pytest.mark.parametrize(("backend", "code"), [("no such backend", "config"), ("comfy", "internal")])
def test_a_backend_that_cannot_be_started(backend, code, caplog):
    """The daemon is told why before the process ends with an exit code."""
    worker = new_worker(backend)
    with caplog.at_level(logging.CRITICAL), pytest.raises(SystemExit) as caught:
        worker._start_backend()
    assert caught.value.code == 1
    assert (worker.channel.message.id, worker.channel.message.code) == (0, code)
