"""What the daemon adds to a call inside ComfyUI: shells and ComfyUI's own objects in one process, in turn.

Run by ComfyUI's interpreter as a script; ``benchmarks/comfy.py`` starts it. Prints one JSON object: per call the
seconds of each side, pair by pair, and whether the results were equal bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Side = Callable[[int], Any]


def import_comfy(root: str) -> Any:
    """ComfyUI's modules as its server on the CPU has them; this folder has a ``comfy`` of its own and goes."""
    sys.path[:] = [root, *(entry for entry in sys.path if Path(entry or ".").resolve() != HERE), str(HERE.parent)]
    sys.argv = ["comfyui", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd
    import comfy.utils

    return comfy


def in_turn(local: Side, daemon: Side, pairs: int) -> dict[str, Any]:
    """Both sides do the same work, one after the other; who begins alternates."""
    import torch

    times: dict[str, list[float]] = {"local": [], "daemon": []}
    sides = {"local": local, "daemon": daemon}
    equal = True
    with torch.inference_mode():  # as ComfyUI runs nodes
        for number in range(-1, pairs):
            found = {}
            for name in sorted(sides, reverse=bool(number % 2)):
                start = time.perf_counter()
                found[name] = sides[name](number)
                if number >= 0:  # the first pair has loaded the models
                    times[name].append(time.perf_counter() - start)
            equal = equal and torch.equal(found["local"], found["daemon"])
    return {**times, "equal": equal}


def clips(comfy: Any, files: list[str], family: str, client: Any) -> tuple[Side, Side]:
    """Encoding a prompt, tokenizing included, as CLIPTextEncode does it: all prompts are distinct."""
    from luna_daemon.comfy_shells import make_clip

    shell = make_clip(files, family, client=client)
    types = comfy.sd.CLIPType
    own = comfy.sd.load_clip(files, clip_type=getattr(types, family.upper(), types.STABLE_DIFFUSION))

    def side(clip: Any) -> Side:
        return lambda number: clip.encode_from_tokens_scheduled(clip.tokenize(f"a picture of {number} foxes"))[0][0]

    return side(own), side(shell)


def vaes(comfy: Any, file: str, channels: int, side: int, client: Any) -> tuple[Side, Side]:
    """Decoding latents of a picture with that many pixels along its sides."""
    import torch

    from luna_daemon.comfy_shells import make_vae

    shell, own = make_vae([file], client=client), comfy.sd.VAE(sd=comfy.utils.load_torch_file(file))

    def latents(number: int) -> Any:
        return torch.randn(1, channels, side // 8, side // 8, generator=torch.Generator().manual_seed(number + 1))

    return lambda number: own.decode(latents(number)), lambda number: shell.decode(latents(number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("comfyui", "runtime-dir", "clip-l", "clip-g", "vae", "small-vae"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("port", "side"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--pairs", type=json.loads, required=True, help="how many of each call, by name")
    given = parser.parse_args()
    comfy = import_comfy(given.comfyui)
    from luna_daemon.client import DaemonClient

    client = DaemonClient("127.0.0.1", given.port, runtime_dir=Path(given.runtime_dir), name="bench")
    makers: dict[str, Callable[[], tuple[Side, Side]]] = {
        "clip_sdxl": lambda: clips(comfy, [given.clip_l, given.clip_g], "sdxl", client),
        "vae_sdxl": lambda: vaes(comfy, given.vae, 4, given.side, client),
        "clip_l": lambda: clips(comfy, [given.clip_l], "stable_diffusion", client),
        "vae_tiny": lambda: vaes(comfy, given.small_vae, 16, given.side, client),
    }
    found = {name: in_turn(*makers[name](), pairs) for name, pairs in given.pairs.items()}
    print(json.dumps({"found": found, "fallbacks": client.fallbacks}))


if __name__ == "__main__":
    main()
