"""The worker's side of the comfy backend, in this process."""

from __future__ import annotations

from types import SimpleNamespace

from luna_daemon.backends.comfy.backend import ComfyBackend
from luna_daemon.backends.comfy.vae import ComfyVae


def test_a_decoder_that_mixes_frames_gets_them_together(comfy):
    """SVD's decoder takes the batch as frames: one by one they would lose each other."""
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import torch

    vae = comfy.sd.VAE(sd={"decoder.mid.block_1.mix_factor": torch.tensor([0.5])})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vae.first_stage_model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.03)
    backend = SimpleNamespace(utils=comfy.utils, memory=comfy.model_management)
    backend.progress = lambda step: ComfyBackend.progress(backend, step)
    latents = torch.randn(3, 4, 4, 4, generator=generator)
    with torch.inference_mode():
        mine, _ = ComfyVae(backend, vae).decode(latents, None, lambda done, total: None)
        assert torch.equal(mine, vae.decode(latents).float())
        alone = torch.cat([vae.decode(latents[number : number + 1]) for number in range(3)])
    assert not torch.equal(mine, alone)
