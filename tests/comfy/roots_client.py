"""A client in a process of its own: one ComfyUI with its own flags, shells on a daemon, and the local models beside.

``python roots_client.py ROOT PORT RUNTIME_DIR VAE CLIP_L [ComfyUI's flags]`` prints one JSON document.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from typing import Any


def main(root: str, port: str, runtime_dir: str, vae_file: str, clip_file: str, *flags: str) -> None:
    warnings.simplefilter("ignore")
    sys.argv = ["comfyui", "--cpu", *flags]
    sys.path.insert(0, root)
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd
    import comfy.utils
    import torch
    from comfyui_version import __version__

    from luna_daemon.client import DaemonClient
    from luna_daemon.shells.build import make_clip, make_vae

    torch.set_num_threads(1)
    latent = torch.rand(1, 16, 12, 9, generator=torch.Generator().manual_seed(0)) * 4 - 2
    with DaemonClient("127.0.0.1", int(port), runtime_dir=runtime_dir) as client, torch.inference_mode():
        vae, clip = make_vae([vae_file], client=client), make_clip([clip_file], client=client)
        local_vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(vae_file))
        local_clip = comfy.sd.load_clip([clip_file], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
        pairs = []
        for prompt in ("a (cat:1.3)", "two foxes " * 50):
            mine, theirs = (
                each.encode_from_tokens(each.tokenize(prompt), return_pooled=True) for each in (clip, local_clip)
            )
            pairs += list(zip(mine, theirs))
        pixels, expected = vae.decode(latent), local_vae.decode(latent)
        pairs += [(pixels, expected), (vae.encode(pixels), local_vae.encode(expected))]
        found = {
            "version": __version__, "fallbacks": client.fallbacks,
            "equal": [torch.equal(a, b) and a.stride() == b.stride() for a, b in pairs],
            "bits": [_digest(a) for a, _ in pairs], "workers": client.get_daemon_info()["workers"],
        }  # fmt: skip
    print("FOUND " + json.dumps(found))


def _digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
