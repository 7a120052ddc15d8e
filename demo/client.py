"""One client of the demo: a photograph through the VAE and back, prompts through the text encoder.

Run by ``demo/run.py``. Prints one JSON line when its work is done, then keeps what it holds until its standard input
closes, so that memory can be measured while every client lives.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from photos import photographs, side_by_side
from stock import copy_weights

from luna_daemon.client import DaemonClient
from luna_daemon.proxy import DaemonCLIP, DaemonVAE

ROUNDS = 3
SHARED = "blurry, low quality, watermark"
PROMPTS = {
    "coffee": "a cup of (espresso:1.3) on a wooden table, morning light",
    "china": "a temple roof above trees, (clear sky:1.2), photograph",
    "roofs": "tiled roofs and (red walls:1.1) at noon",
}


def models(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """A VAE and a CLIP: the daemon's, or this process' own."""
    if arguments.port:
        client = DaemonClient("127.0.0.1", arguments.port, runtime_dir=arguments.runtime_dir, name=arguments.photo)
        return DaemonVAE(vae_type="demo", client=client), DaemonCLIP(clip_type="demo", client=client)
    from luna_daemon.backends.local import LocalCLIP, LocalVAE

    own = LocalVAE(arguments.vae), LocalCLIP(arguments.clip, type="sd15")
    copy_weights()
    return own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photo")
    parser.add_argument("--port", type=int, default=0, help="the daemon's port; without it models load here")
    parser.add_argument("--runtime-dir", type=Path)
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    pixels = photographs()[arguments.photo]
    times: dict[str, list[float]] = {"encode": [], "decode": [], "prompt": []}

    def timed(what: str, work: Any) -> Any:
        start = time.perf_counter()
        result = work()
        times[what].append(time.perf_counter() - start)
        return result

    vae, clip = models(arguments)
    for _ in range(ROUNDS):
        latents = timed("encode", lambda: vae.encode(pixels))
        decoded = timed("decode", lambda: vae.decode(latents))  # noqa: B023
        for prompt in (PROMPTS[arguments.photo], SHARED):
            timed("prompt", lambda: clip.encode(prompt))  # noqa: B023
    psnr = float(-10 * torch.log10(torch.mean((decoded - pixels) ** 2)))
    side_by_side(pixels, decoded).save(arguments.out / f"{arguments.photo}.png")
    print(json.dumps({"photo": arguments.photo, "times": times, "psnr": psnr}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
