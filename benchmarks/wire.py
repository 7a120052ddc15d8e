"""What the daemon adds to a call: small calls, 12.6 MB out by shared memory and by TCP, the predecessor's way."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import threading
import time
from typing import Any

import psutil
import torch
from common import Result, client, daemon, median, percentile, result, times_ms

from luna_daemon.client import DaemonClient
from luna_daemon.wire import messages as m

NBYTES = 1024 * 1024 * 3 * 4
"""A 1024x1024 float32 image."""
HELD = 50
RUNS = 60


def measure() -> dict[str, Result]:
    found: dict[str, Result] = {}
    with daemon() as running:
        with client(running) as shared, client(running, use_arena=False) as tcp:
            pings = times_ms(shared.ping, 3000, 200)
            found["ping_ms"] = result(median(pings), "ms", "<= 0.1", p99=percentile(pings, 0.99), runs=3000)
            found.update(large(shared, tcp))
        found["clients64"] = many_clients(running)
    return found


def large(shared: DaemonClient, tcp: DaemonClient) -> dict[str, Result]:
    """All sides measured in turn, so that what disturbs one disturbs all."""
    latents = torch.zeros(1, 4, 64, 64)
    source = torch.rand(NBYTES // 4)
    target = torch.empty_like(source)
    copy_source, copy_target = memoryview(source.numpy()).cast("B"), memoryview(target.numpy()).cast("B")

    def copy() -> None:
        copy_target[:] = copy_source

    def by(which: DaemonClient) -> torch.Tensor:
        return which.call(m.Echo(NBYTES), [latents]).tensors[0]

    old = Predecessor(source)
    private = results_are_private(shared, latents)
    for _ in range(2):  # every slot that the held results will use has been touched
        held = [by(shared) for _ in range(HELD)]
        del held
    out, memcpy, over_tcp, pickled = [], [], [], []
    held = []
    for _ in range(RUNS):
        memcpy.append(times_ms(copy, 1, 0)[0])
        start = time.perf_counter()
        held.append(by(shared))
        out.append((time.perf_counter() - start) * 1e3)
        over_tcp.append(times_ms(lambda: by(tcp), 1, 0)[0])
        pickled.append(times_ms(lambda: old.call(latents), 1, 0)[0])
        held = held[-HELD:]
    old.close()
    base, ours = median(memcpy), median(out)
    sides = {"memcpy_ms": base, "runs": RUNS}
    return {
        "out_12mb_over_memcpy": result(
            ours / base, "x", "<= 1.6", shared_memory_ms=ours, held=HELD, private=private, **sides
        ),
        "pickle_over_out_12mb": result(median(pickled) / ours, "x", ">= 20", pickle_ms=median(pickled), **sides),
        "tcp_12mb_over_memcpy": result(median(over_tcp) / base, "x", "<= 12", tcp_ms=median(over_tcp), **sides),
    }


def results_are_private(which: DaemonClient, latents: torch.Tensor) -> bool:
    """Whether results held at once can be written without changing each other."""
    held = [which.call(m.Echo(NBYTES), [latents]).tensors[0] for _ in range(HELD)]
    for number, tensor in enumerate(held):
        tensor.fill_(number)
    return all(bool((tensor == number).all()) for number, tensor in enumerate(held))


class Predecessor:
    """The predecessor's way: a pickled request and answer, each call on a fresh TCP connection."""

    def __init__(self, answer: torch.Tensor) -> None:
        self._answer = {"image": answer.reshape(1, 1024, 1024, 3)}
        self._server = socket.create_server(("127.0.0.1", 0))
        self._child = os.fork() if hasattr(os, "fork") else None
        if self._child == 0:
            self._serve()
        if self._child is None:
            threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection:
                pickle.loads(_exactly(connection, _length(connection)))
                data = pickle.dumps(self._answer)
                connection.sendall(struct.pack(">I", len(data)) + data)

    def call(self, latents: torch.Tensor) -> Any:
        with socket.create_connection(self._server.getsockname()) as connection:
            data = pickle.dumps({"cmd": "vae_decode", "latents": latents})
            connection.sendall(struct.pack(">I", len(data)) + data)
            return pickle.loads(_exactly(connection, _length(connection)))

    def close(self) -> None:
        if self._child:
            os.kill(self._child, 15)
            os.waitpid(self._child, 0)
        self._server.close()


def _length(connection: socket.socket) -> int:
    return int(struct.unpack(">I", _exactly(connection, 4))[0])


def _exactly(connection: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view.nbytes:
        view = view[connection.recv_into(view) :]
    return data


def many_clients(running: Any, count: int = 64, calls: int = 20_000) -> Result:
    """Many connections, many small calls: errors, slowest answers, growth of the control process."""
    control = psutil.Process(running.pid)
    clients = [client(running) for _ in range(count)]
    for one in clients:
        one.ping()
    before = control.memory_info().rss
    times: list[float] = []
    errors: list[str] = []

    def work(one: DaemonClient) -> None:
        for _ in range(calls // count):
            try:
                times.append(one.ping() * 1e3)
            except Exception as error:
                errors.append(repr(error))

    threads = [threading.Thread(target=work, args=(one,)) for one in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    grown = control.memory_info().rss - before
    for one in clients:
        one.close()
    return result(
        len(errors), "errors", "0", p50_ms=median(times), p99_ms=percentile(times, 0.99), calls=len(times),
        connections=count, rss_growth_mb=grown / 2**20,
    )  # fmt: skip


if __name__ == "__main__":
    for key, row in measure().items():
        print(key, row)
