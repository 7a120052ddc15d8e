"""A process that loads LoRAs from a daemon and does what it is told, one JSON line at a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import torch

from luna_daemon.client import DaemonClient


def main(port: int, runtime_dir: str) -> None:
    client = connect(port, runtime_dir)
    held: dict[str, torch.Tensor] = {}
    checksum({"warm": torch.ones(4096)})
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "connect":
            client.close()
            client = connect(order["port"], order["runtime_dir"])
        elif order["do"] == "load":
            held = client.load_lora(order["name"])
        elif order["do"] == "write":
            held[order["key"]].fill_(order["value"])
        elif order["do"] == "drop":
            held = {}
            client.ping()
        memory = psutil.Process().memory_full_info()
        answer = {"sum": checksum(held), "pss": getattr(memory, "pss", 0), "uss": memory.uss}
        print(json.dumps(answer), flush=True)


def connect(port: int, runtime_dir: str) -> DaemonClient:
    return DaemonClient("127.0.0.1", port, runtime_dir=Path(runtime_dir), name="lora peer")


def checksum(state: dict[str, torch.Tensor]) -> float:
    """Reads one value of each page of every tensor, and thereby all of their pages."""
    return sum(float(value.reshape(-1)[:: 4096 // value.element_size()].sum()) for value in state.values())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
