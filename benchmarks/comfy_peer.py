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


def in_turn(local: Side, daemon: Side, pairs: int, client: Any) -> dict[str, Any]:
    """Both sides do the same work, one after the other; who begins alternates.

    ``cpu_s`` is the CPU time of a call on each side, of all processes that had to do with it: what others do on the
    machine hardly shows in it.
    """
    import torch

    sides = {"local": local, "daemon": daemon}
    times: dict[str, list[float]] = {name: [] for name in sides}
    spent = dict.fromkeys(sides, 0.0)
    equal = True
    with torch.inference_mode():  # as ComfyUI runs nodes
        for number in range(-1, pairs):
            found = {}
            for name in sorted(sides, reverse=bool(number % 2)):
                start, used = time.perf_counter(), time.process_time()
                found[name] = sides[name](number)
                if number >= 0:  # the first pair has loaded the models
                    times[name].append(time.perf_counter() - start)
                    spent[name] += time.process_time() - used
            equal = equal and torch.equal(found["local"], found["daemon"])
            if number < 0:
                before = cpu_elsewhere(client)
    spent["daemon"] += cpu_elsewhere(client) - before
    return {**times, "equal": equal, "cpu_s": {name: total / pairs for name, total in spent.items()}}


def cpu_elsewhere(client: Any) -> float:
    """Seconds of CPU that daemon and workers have used."""
    import psutil

    info = client.get_daemon_info()
    spent = [psutil.Process(pid).cpu_times() for pid in (info["pid"], *(worker["pid"] for worker in info["workers"]))]
    return sum(each.user + each.system for each in spent)


def clips(comfy: Any, files: list[str], family: str, client: Any) -> tuple[Side, Side]:
    """Encoding a prompt, tokenizing included, as CLIPTextEncode does it: all prompts are distinct."""
    from luna_daemon.shells.build import make_clip

    shell = make_clip(files, family, client=client)
    types = comfy.sd.CLIPType
    own = comfy.sd.load_clip(files, clip_type=getattr(types, family.upper(), types.STABLE_DIFFUSION))

    def side(clip: Any) -> Side:
        return lambda number: clip.encode_from_tokens_scheduled(clip.tokenize(f"a picture of {number} foxes"))[0][0]

    return side(own), side(shell)


def vaes(comfy: Any, file: str, channels: int, side: int, client: Any) -> tuple[Side, Side]:
    """Decoding latents of a picture with that many pixels along its sides."""
    import torch

    from luna_daemon.shells.build import make_vae

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
    found = {name: in_turn(*makers[name](), pairs, client) for name, pairs in given.pairs.items()}
    print(json.dumps({"found": found, "fallbacks": client.fallbacks}))


if __name__ == "__main__":
    main()
