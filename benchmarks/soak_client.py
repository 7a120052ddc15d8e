"""One client of the soak: asks for mixed work without end, checks every answer, and writes down what became of it.

Its orders come as one JSON line on standard input; it ends when standard input closes. Each request is a line when it
begins and a line when it ends, so that one that never ends is seen.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from luna_daemon.client import DaemonClient
from luna_daemon.core import Busy, LunaError
from luna_daemon.wire import messages as m

__all__ = ["PROMPTS", "SHAPES", "latents", "pixels", "versioned"]

PROMPTS = [f"a {colour} {thing}, (detailed:1.2)" for colour in ("red", "blue", "old", "wet", "tiny", "glass")
           for thing in ("cat", "harbour", "lantern", "forest")]  # fmt: skip
SHAPES = 4
SOON_S = 0.2


def latents(seed: int) -> torch.Tensor:
    """Latents [1,16,h,8] of the demo VAE; the seed decides size and values."""
    return torch.randn(1, 16, 4 + 2 * (seed % 3), 8, generator=torch.Generator().manual_seed(seed))


def pixels(seed: int) -> torch.Tensor:
    """Pixels [1,64,w,3] in 0..1."""
    return torch.rand(1, 64, 32 + 16 * (seed % 3), 3, generator=torch.Generator().manual_seed(seed))


def versioned(version: int) -> dict[str, torch.Tensor]:
    """A LoRA that shows which version of the file it is in every value."""
    return {f"unet.block.{layer}.lora_{part}.weight": torch.full((16, 320), float(version))
            for layer in range(8) for part in ("up", "down")}  # fmt: skip


class Worker:
    """The client's side of one request after another."""

    def __init__(self, orders: dict[str, Any]) -> None:
        self.client = DaemonClient(
            "127.0.0.1", orders["port"], runtime_dir=orders["runtime_dir"], name=f"soak-{orders['number']}"
        )
        self.expected = load_file(orders["expected"])
        self.version_file = Path(orders["version_file"])
        self.lora = orders["lora"]
        self.log = Path(orders["log"]).open("a", buffering=1)  # noqa: SIM115 (open as long as the process)
        self.chance = random.Random(orders["number"])
        self.made = 0

    def ask(self) -> None:
        """One request, from its choice to its line in the log."""
        kinds: list[tuple[str, Callable[[], str]]] = [
            ("vae.decode", self.decode), ("vae.decode", self.decode), ("vae.encode", self.encode),
            ("clip.encode", self.prompt), ("clip.encode", self.prompt), ("lora", self.lora_file), ("info", self.info),
        ]  # fmt: skip
        op, work = self.chance.choice(kinds)
        self.made += 1
        began = time.time()
        self.log.write(json.dumps({"n": self.made, "op": op, "t": began}) + "\n")
        try:
            outcome = work()
        except LunaError as error:
            outcome = error.code
            time.sleep(min(1.0, error.retry_after_s) if isinstance(error, Busy) else SOON_S)
        except Exception as error:
            outcome = f"untyped: {type(error).__name__}: {error}"
        self.log.write(json.dumps({"n": self.made, "op": op, "t": began, "end": time.time(), "is": outcome}) + "\n")

    def compare(self, name: str, got: torch.Tensor) -> str:
        return "right" if torch.equal(got, self.expected[name]) else f"wrong: {name}"

    def decode(self) -> str:
        seed = self.chance.randrange(SHAPES)
        return self.compare(f"decode-{seed}", self.client.vae_decode(latents(seed), "demo"))

    def encode(self) -> str:
        seed = self.chance.randrange(SHAPES)
        return self.compare(f"encode-{seed}", self.client.vae_encode(pixels(seed), "demo"))

    def prompt(self) -> str:
        number = self.chance.randrange(len(PROMPTS))
        found = self.client.call(m.ClipEncode(m.ModelRef("clip", "tiny"), PROMPTS[number]))
        named = dict(zip(found.result["names"], found.tensors))
        return self.compare(f"cond-{number}", named["cond"])

    def lora_file(self) -> str:
        """The file changes on disk: an answer is one whole version, not older than when it was asked for."""
        before = int(self.version_file.read_text())
        found = self.client.load_lora(self.lora)
        after = int(self.version_file.read_text())
        values = {float(value) for tensor in found.values() for value in (tensor.min(), tensor.max())}
        # The file is replaced just before its number is written.
        whole = len(values) == 1 and found.keys() == versioned(0).keys()
        return "right" if whole and before <= values.pop() <= after + 1 else f"wrong: LoRA {values}, {before}..{after}"

    def info(self) -> str:
        found = self.client.get_daemon_info()
        return "right" if found["status"] in ("running", "draining") and found["clients"] else f"wrong: {found}"


def main() -> None:
    torch.set_num_threads(1)
    worker = Worker(json.loads(sys.stdin.readline()))
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    while not ended.is_set():
        worker.ask()
    worker.client.close()


if __name__ == "__main__":
    main()
