"""Nodes that the tests put into a server's ``custom_nodes``: what a node made is kept as exact tensors.

ComfyUI loads this file by itself; nothing of the tests is imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import torch
from safetensors.torch import save_file

__all__ = ["NODE_CLASS_MAPPINGS"]


class Anything(str):
    """The type of an input that takes every output."""

    def __ne__(self, _: object) -> bool:
        return False


class Keep:
    """Writes every tensor within ``value`` to ``NAME.safetensors`` in the output folder, with where it was found."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "test", "keep", True, ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": (Anything("*"),), "name": ("STRING", {})}}

    def keep(self, value: Any, name: str) -> dict[str, Any]:
        tensors = dict(_tensors(value))
        save_file(tensors, str(Path(folder_paths.get_output_directory()) / f"{name}.safetensors"))
        return {"ui": {"kept": [len(tensors)]}}


def _tensors(value: Any, place: str = "value") -> Any:
    if isinstance(value, torch.Tensor):
        yield place, value.detach().clone().contiguous()
    elif isinstance(value, (int, float)):
        yield place, torch.tensor(float(value), dtype=torch.float64)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _tensors(item, f"{place}.{number}")


class Picture:
    """A seeded random picture."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "make", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {name: ("INT", {"default": 64}) for name in ("width", "height", "batch", "seed")}}

    def make(self, width: int, height: int, batch: int, seed: int) -> tuple[torch.Tensor]:
        return (torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed)),)


class SmallSD1:
    """SD1's UNet with few channels and seeded random weights, in ComfyUI's own model class."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "make", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def make(self) -> tuple[Any]:
        import comfy.model_patcher
        import comfy.supported_models

        config = comfy.supported_models.SD15({
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1, 1],
            "channel_mult": [1, 2, 2], "transformer_depth": [1, 1, 1], "transformer_depth_output": [1] * 6,
            "transformer_depth_middle": 1, "context_dim": 768, "use_spatial_transformer": True, "legacy": False,
            "adm_in_channels": None, "use_linear_in_transformer": False, "use_temporal_attention": False,
            "dtype": torch.float32,
        })  # fmt: skip
        config.set_inference_dtype(torch.float32, None)
        cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(4)
        model = config.get_model({}, "", device=cpu)
        for name, tensor in model.diffusion_model.named_parameters():
            if tensor.dim() > 1:
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
            else:
                tensor.data.fill_(1.0 if name.endswith("weight") else 0.0)
        return (comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu),)


NODE_CLASS_MAPPINGS = {"TestKeep": Keep, "TestPicture": Picture, "TestSmallSD1": SmallSD1}
