"""Tiny model files in every layout, with seeded random weights. What is cached must not be changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from luna_daemon.backends.diffusers.backend import DiffusersBackend  # noqa: E402
from luna_daemon.wire.messages import LoadSpec  # noqa: E402

Load = Callable[..., Any]

# On tensors this small, threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, no ComfyUI of the machine's."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)


@pytest.fixture
def load() -> Load:
    """``load(kind, *files, type=..., device=..., precision=...)`` through the backend."""

    def _load(kind: str, *files: Path, type: str = "", device: str = "cpu", precision: str = "auto") -> Any:
        spec = LoadSpec(kind, kind, type, tuple(map(str, files)), device, precision)
        return DiffusersBackend().load(spec)

    return _load


@cache
def kl_weights(channels: int = 4) -> dict[str, torch.Tensor]:
    """State dict of a four-level ``AutoencoderKL`` of 32 channels, in diffusers' names."""
    from diffusers import AutoencoderKL

    torch.manual_seed(channels)
    quant = channels == 4
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=channels,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    return dict(model.state_dict())


@cache
def tiny_halves(channels: int = 4) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """TAESD's encoder and decoder in their authors' numbering."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(channels)
    model = AutoencoderTiny(latent_channels=channels)
    encoder = {key.removeprefix("layers."): weight for key, weight in model.encoder.state_dict().items()}
    decoder = {}
    for key, weight in model.decoder.state_dict().items():
        number, rest = key.removeprefix("layers.").split(".", 1)
        decoder[f"{int(number) + 1}.{rest}"] = weight
    return encoder, decoder


@cache
def clip_model(name: str) -> Any:
    """A CLIP of width 32 that counts as ``l`` (3 layers) or ``g`` (31 layers), float16 values in float32."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(len(name))
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=3 if name == "l" else 31,
        num_attention_heads=1,
        hidden_act="quick_gelu" if name == "l" else "gelu",
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return CLIPTextModelWithProjection(config).half().float().eval()


@cache
def t5_model() -> Any:
    """A T5 1.1 encoder of width 64, float16 values in float32."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    config = T5Config(
        vocab_size=200, d_model=64, d_kv=8, d_ff=96, num_layers=3, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).half().float().eval()


def save(path: Path, weights: dict[str, torch.Tensor], prefix: str = "", half: bool = True) -> Path:
    """Write a ``.safetensors`` file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + k: (w.half() if half else w).contiguous().clone() for k, w in weights.items()}
    save_file(tensors, path)
    return path


def no_step(done: int, total: int) -> None:
    """A caller that never leaves."""
