"""The predecessor's way: a pickled request and answer, each call on a fresh TCP connection. Prints milliseconds.

Run in processes of its own by ``benchmarks/wire.py``: a server that answers a 1024x1024 float32 image, and a client.

Pickle is what is measured here; nothing of the daemon imports this file. Loading a pickle runs what its sender likes:
for the second or two that the server lives on loopback, other users of the machine could send it one. That is the
predecessor's way, and a check that it did not have would make it slower than it was (by a tenth, when tried).
"""

from __future__ import annotations

import pickle
import socket
import statistics
import struct
import subprocess
import sys
import time
from typing import Any

import torch

CALLS = 20


def serve(port: int) -> None:
    image = torch.rand(1, 1024, 1024, 3)
    with socket.create_server(("127.0.0.1", port)) as server:
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                pickle.loads(exactly(connection, length(connection)))
                data = pickle.dumps(image)
                connection.sendall(struct.pack(">I", len(data)) + data)


def call(port: int, latents: torch.Tensor) -> Any:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        data = pickle.dumps({"cmd": "vae_decode", "latents": latents})
        connection.sendall(struct.pack(">I", len(data)) + data)
        return pickle.loads(exactly(connection, length(connection)))


def length(connection: socket.socket) -> int:
    return int(struct.unpack(">I", exactly(connection, 4))[0])


def exactly(connection: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view.nbytes:
        view = view[connection.recv_into(view) :]
    return data


def main() -> None:
    if len(sys.argv) > 1:
        serve(int(sys.argv[1]))
    from common import free_port

    port = free_port()
    server = subprocess.Popen([sys.executable, __file__, str(port)], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        server.stdout.readline()
        latents = torch.zeros(1, 4, 64, 64)
        times = []
        for _ in range(CALLS):
            start = time.perf_counter()
            call(port, latents)
            times.append((time.perf_counter() - start) * 1e3)
        print(statistics.median(times))
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
