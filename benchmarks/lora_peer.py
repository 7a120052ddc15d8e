"""One process of the LoRA benchmark: loads a LoRA from the daemon, or from the file as safetensors does.

Reads orders as JSON lines from standard input and answers each with one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from luna_daemon.client import DaemonClient

State = dict[str, torch.Tensor]


def opened(path: str) -> State:
    """As ComfyUI loads it."""
    with safe_open(path, framework="pt", device="cpu") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def torch_load(path: str) -> State:
    state: State = torch.load(path, map_location="cpu", weights_only=True)
    return state


def read(state: State) -> int:
    """Every page of every tensor."""
    whole = 0
    for value in state.values():
        whole += int(value.reshape(-1).view(torch.uint8)[::4096].sum())
    return whole


def obey(order: dict[str, Any], ways: dict[str, Callable[[str], State]], held: list[State]) -> Any:
    if order["do"] == "drop":
        held.clear()
        return None
    start = time.perf_counter()
    state = ways[order["way"]](order["path"])
    usable = time.perf_counter() - start
    read(state)
    whole = time.perf_counter() - start
    held[:] = [state]
    return {"usable_ms": usable * 1e3, "read_ms": whole * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int)
    parser.add_argument("--runtime-dir", type=Path)
    arguments = parser.parse_args()
    client = DaemonClient("127.0.0.1", arguments.port, runtime_dir=arguments.runtime_dir, name="lora peer")
    client.ping()
    read({"warm": torch.zeros(1 << 16)})
    ways = {"daemon": client.load_lora, "load_file": load_file, "safe_open": opened, "torch_load": torch_load}
    held: list[State] = []
    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line), ways, held)), flush=True)


if __name__ == "__main__":
    main()
