"""Fixtures for the tests of the shells: ComfyUI's modules, real models, small LoRAs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.comfy.shell_helpers import DEMO_VAE, ROOT


@pytest.fixture(scope="session")
def stock(comfy: SimpleNamespace) -> SimpleNamespace:
    """ComfyUI's modules that shells meet."""
    more = {name: importlib.import_module(f"comfy.{name}") for name in ("hooks", "lora", "utils")}
    return SimpleNamespace(**vars(comfy), **more)


@pytest.fixture(scope="session")
def clip_l() -> Path:
    """A text encoder with CLIP-L's real architecture and seeded random weights, made once per checkout."""
    path = ROOT / "build" / "models" / "clip_l.safetensors"
    if not path.exists():
        sys.path.insert(0, str(ROOT / "demo"))
        from make_text_encoder import make_clip_l

        path.parent.mkdir(parents=True, exist_ok=True)
        make_clip_l(path)
    return path


@pytest.fixture(scope="session")
def local_clip(stock: SimpleNamespace, clip_l: Path) -> Any:
    """The real CLIP, loaded by ComfyUI; use clones."""
    return stock.sd.load_clip([str(clip_l)], clip_type=stock.sd.CLIPType.STABLE_DIFFUSION)


@pytest.fixture(scope="session")
def local_vae(stock: SimpleNamespace) -> Any:
    """The real demo VAE, loaded by ComfyUI."""
    return stock.sd.VAE(sd=stock.utils.load_torch_file(str(DEMO_VAE)))


@pytest.fixture
def inference(stock: SimpleNamespace) -> Iterator[None]:
    """As ComfyUI runs nodes."""
    with stock.torch.inference_mode():
        yield


MakeLora = Callable[..., dict[str, Any]]


@pytest.fixture
def make_lora(stock: SimpleNamespace) -> MakeLora:
    """A LoRA for CLIP-L, seeded."""
    torch = stock.torch

    def make(seed: int, layers: Sequence[int] = (0, 5, 11), part: str = "clip_l") -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        lora: dict[str, Any] = {}
        for layer in layers:
            for name, size in {"self_attn.q_proj": 768, "mlp.fc1": 3072}.items():
                key = f"text_encoders.{part}.transformer.text_model.encoder.layers.{layer}.{name}"
                lora[f"{key}.lora_up.weight"] = torch.randn(size, 4, generator=generator) * 0.2
                lora[f"{key}.lora_down.weight"] = torch.randn(4, 768, generator=generator) * 0.2
                lora[f"{key}.alpha"] = torch.tensor(2.0)
        return lora

    return make


@pytest.fixture(scope="session")
def checkpoint(stock: SimpleNamespace, clip_l: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of SD3's layout: a tiny diffusion model, CLIP-L, and the demo VAE."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
    from comfy.ops import disable_weight_init

    torch = stock.torch
    context = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}}
    network = OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, depth=2, num_patches=32 * 32, pos_embed_max_size=32,
        adm_in_channels=64, context_embedder_config=context, dtype=torch.float16, device="cpu",
        operations=disable_weight_init,
    )  # fmt: skip
    state = {f"model.diffusion_model.{name}": torch.zeros_like(value) for name, value in network.state_dict().items()}
    encoder, vae = (stock.utils.load_torch_file(str(path)) for path in (clip_l, DEMO_VAE))
    state |= {f"text_encoders.clip_l.transformer.{name}": value for name, value in encoder.items()}
    state |= {f"first_stage_model.{name}": value for name, value in vae.items()}
    path: Path = tmp_path_factory.mktemp("checkpoints") / "tiny_sd3.safetensors"
    stock.utils.save_torch_file({name: value.contiguous() for name, value in state.items()}, str(path))
    return path
