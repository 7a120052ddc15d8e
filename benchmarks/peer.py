"""One process of a benchmark: SDXL's text encoders and VAE, its own or the daemon's.

``own`` loads them the stock way: weights are copied into the process, as ComfyUI and ``load_state_dict`` do.
Reads orders as JSON lines from standard input and answers each with one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any


def own_models() -> tuple[Any, Any]:
    from common import CLIP_G, CLIP_L, ROOT, VAE

    sys.path.insert(0, str(ROOT / "demo"))
    from stock import copy_weights

    from luna_daemon.backends.local import LocalCLIP, LocalVAE

    vae, clip = LocalVAE(VAE), LocalCLIP(CLIP_L, CLIP_G, type="sdxl")
    copy_weights()
    return vae, clip


def daemon_models(port: int, runtime: Path) -> tuple[Any, Any]:
    from luna_daemon.client import DaemonClient
    from luna_daemon.proxy import DaemonCLIP, DaemonVAE

    client = DaemonClient("127.0.0.1", port, runtime_dir=runtime, name="peer")
    return DaemonVAE(vae_type="sdxl", client=client), DaemonCLIP(clip_type="sdxl", client=client)


def obey(order: dict[str, Any], vae: Any, clip: Any) -> Any:
    start = time.perf_counter()
    if order["do"] == "prompts":
        for number in range(order["count"]):
            clip.encode(f"{order['text']} {number}")
    elif order["do"] == "decode":
        import torch

        vae.decode(torch.zeros(1, 4, order["side"], order["side"]))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--runtime-dir", type=Path)
    arguments = parser.parse_args()
    vae, clip = daemon_models(arguments.port, arguments.runtime_dir) if arguments.port else own_models()
    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line), vae, clip)), flush=True)


if __name__ == "__main__":
    main()
