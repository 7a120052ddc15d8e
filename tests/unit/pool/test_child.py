"""Inside a worker: where results go."""

from __future__ import annotations

from luna_daemon.pool.child import Worker
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
    def send(self, message, payload=()) -> None:
        self.message, self.payload = message, list(payload)


def test_a_granted_slot_is_used_for_one_tensor():
    """Two results of one size do not land in the slot that came with the job: one would overwrite the other."""
    worker = Worker.__new__(Worker)
    worker.arena, worker.channel = Arena(), Channel()
    worker._reserve = lambda nbytes: m.TensorRef("uint8", (nbytes,), nbytes, 8192, 2, "seg")
    size = 64 << 10
    grant = m.TensorRef("uint8", (size,), size, 0, 1, "seg")
    ref = m.TensorRef("uint8", (size,), size, 0)
    tensors = [(ref, memoryview(bytes([value]) * size)) for value in (1, 2)]
    worker._reply(m.Job(1, encode_call(m.Echo()), SPEC, grant=grant), Result(None, tensors))
    assert [(sent.slot, sent.offset) for sent in worker.channel.message.tensors] == [(1, 0), (2, 8192)]
    assert [bytes(worker.arena.written[offset][:1]) for offset in (0, 8192)] == [b"\x01", b"\x02"]
