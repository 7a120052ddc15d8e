"""ComfyUI's own modules in this process, on the CPU, and small models with seeded random weights.

``COMFYUI_PATH`` says where ComfyUI lies; without it every test here is skipped, with one line that says so.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

COMFYUI_PATH = os.environ.get("COMFYUI_PATH", "")
HERE = Path(__file__).parent


def pytest_report_header() -> str:
    packs = os.environ.get("COMFYUI_PACKS") or "COMFYUI_PACKS is not set, tests/comfy/test_packs.py is skipped"
    return f"ComfyUI: {COMFYUI_PATH or 'COMFYUI_PATH is not set, tests/comfy is skipped'}; node packs: {packs}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests, filter warnings that are ComfyUI's and torch's own, skip without a ComfyUI."""
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.comfy)
        item.add_marker(pytest.mark.filterwarnings("ignore"))
        item.add_marker(pytest.mark.filterwarnings("error:::luna_daemon"))
        if not COMFYUI_PATH:
            item.add_marker(pytest.mark.skip(reason="COMFYUI_PATH is not set: needs a real ComfyUI"))


@pytest.fixture(scope="session")
def comfy() -> SimpleNamespace:
    """ComfyUI's modules, imported as a library: its root first on the path, its arguments those of ``--cpu``."""
    sys.path.insert(0, COMFYUI_PATH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import comfy.model_management
        import comfy.model_patcher
        import comfy.patcher_extension
        import comfy.sample
        import comfy.samplers
        import comfy.sd
        import comfy.supported_models
        import torch
    torch.set_num_threads(1)
    return SimpleNamespace(
        torch=torch, sd=comfy.sd, sample=comfy.sample, samplers=comfy.samplers, management=comfy.model_management,
        ModelPatcher=comfy.model_patcher.ModelPatcher, models=comfy.supported_models,
        WrappersMP=comfy.patcher_extension.WrappersMP,
    )  # fmt: skip


class TinyModel(SimpleNamespace):
    """A small MODEL with what sampling it needs.

    ``model`` is the ModelPatcher, ``positive`` and ``negative`` its conditioning, ``latent`` its input [B, C, ...],
    ``blocks`` the modules whose evaluations count as the model's work.
    """

    def sample(
        self, model: Any = None, steps: int = 12, cfg: float = 3.0, sampler: str = "euler", seed: int = 1
    ) -> Any:
        """What ComfyUI's own ``comfy.sample.sample`` makes of it, [B, C, ...]."""
        sample = self.comfy.sample
        noise = sample.prepare_noise(self.latent, seed)
        return sample.sample(
            model or self.model, noise, steps, cfg, sampler, "simple", self.positive, self.negative, self.latent,
            seed=seed, disable_pbar=True,
        )  # fmt: skip

    def apply(self, model: Any = None, **inputs: Any) -> Any:
        """One evaluation as samplers make it, outside of any sampler: wrappers of the MODEL included, [B, C, ...]."""
        model = model or self.model
        options = {"wrappers": model.wrappers, "cond_or_uncond": [0], "sigmas": self.comfy.torch.ones(1)}
        model.pre_run()
        return model.model.apply_model(**{**self.inputs(), **inputs}, transformer_options=options)

    def inputs(self) -> dict[str, Any]:
        """``apply_model``'s arguments: x [B, C, ...], t [B], and the conditioning."""
        repeat = self.comfy.torch.cat
        context = repeat([self.positive[0][0], self.negative[0][0]][: self.rows])
        x = repeat([self.latent + 0.5] * self.rows)
        return {"x": x, "t": x.new_full((self.rows,), 0.5), "c_crossattn": context, **self.extra}

    @contextmanager
    def counting(self) -> Iterator[list[int]]:
        """``[n]``, where n grows with each block that is evaluated."""
        count = [0]

        def add(*_: Any) -> None:
            count[0] += 1

        handles = [block.register_forward_hook(add) for block in self.blocks]
        try:
            yield count
        finally:
            for handle in handles:
                handle.remove()


Make = Callable[..., TinyModel]


@pytest.fixture
def tiny(comfy: SimpleNamespace) -> Make:
    """Build a small model of a family by name; the same name and seed give the same weights."""

    def make(family: str, seed: int = 0, **changes: Any) -> TinyModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return globals()[f"_{family}"](comfy, seed, **changes)

    return make


def _finished(
    comfy: SimpleNamespace, model: Any, seed: int, blocks: list[Any], latent: tuple[int, ...], context: tuple[int, int],
    pooled: int = 0, std: float = 0.05, rows: int = 1, **extra: Any,
) -> TinyModel:  # fmt: skip
    torch = comfy.torch
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.model.diffusion_model.named_parameters(), *model.model.diffusion_model.named_buffers()]:
        if not tensor.is_floating_point() or "freqs" in name:
            continue
        if tensor.dim() > 1:
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * std)
        else:
            tensor.data.fill_(1.0 if name.endswith(("weight", "scale")) else 0.0)
    conds = []
    for _ in range(2):
        options = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        options |= {name: value for name, value in extra.items() if name == "attention_mask"}
        conds.append([[torch.randn(1, *context, generator=generator), options]])
    if pooled:
        extra["y"] = conds[0][0][1]["pooled_output"]
    return TinyModel(
        comfy=comfy, model=model, positive=conds[0], negative=conds[1], latent=torch.zeros(latent), blocks=blocks,
        extra=extra, rows=rows,
    )  # fmt: skip


def _from_config(comfy: SimpleNamespace, name: str, **unet_config: Any) -> Any:
    config = getattr(comfy.models, name)({"dtype": comfy.torch.float32, **unet_config})
    config.set_inference_dtype(comfy.torch.float32, None)
    cpu = comfy.torch.device("cpu")
    return comfy.ModelPatcher(config.get_model({}, "", device=cpu), load_device=cpu, offload_device=cpu)


def _sd3(comfy: SimpleNamespace, seed: int, depth: int = 4, size: int = 16) -> TinyModel:
    """SD3's MMDiT, found and loaded by ComfyUI's own detection from a state dict."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
    from comfy.ops import disable_weight_init

    torch = comfy.torch
    context = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 64 * depth}}
    network = OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, depth=depth, num_patches=32 * 32, pos_embed_max_size=32,
        adm_in_channels=64, context_embedder_config=context, dtype=torch.float32, device="cpu",
        operations=disable_weight_init,
    )  # fmt: skip
    state = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    model = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.float32})
    blocks = list(model.model.diffusion_model.joint_blocks)
    return _finished(comfy, model, seed, blocks, (1, 16, size, size), (8, 64), pooled=64)


def _unet(comfy: SimpleNamespace, seed: int, size: int = 16, channels: int = 32) -> TinyModel:
    """SD1's UNet with few channels, in ComfyUI's SD15 model class."""
    model = _from_config(
        comfy, "SD15", image_size=32, in_channels=4, out_channels=4, model_channels=channels, num_res_blocks=[2, 2, 2],
        channel_mult=[1, 2, 4], transformer_depth=[1, 1, 1, 1, 1, 1], transformer_depth_output=[1] * 9,
        transformer_depth_middle=1, context_dim=64, use_spatial_transformer=True, legacy=False, adm_in_channels=None,
        use_linear_in_transformer=False, use_temporal_attention=False,
    )  # fmt: skip
    network = model.model.diffusion_model
    blocks = [block[0] for block in (*network.input_blocks, network.middle_block, *network.output_blocks)]
    return _finished(comfy, model, seed, blocks, (1, 4, size, size), (8, 64), std=0.03)


def _flux(comfy: SimpleNamespace, seed: int, name: str = "Flux", **changes: Any) -> TinyModel:
    options: dict[str, Any] = {
        "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 64, "context_in_dim": 64,
        "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 3,
        "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True, "guidance_embed": False,
    } | changes  # fmt: skip
    model = _from_config(comfy, name, **options)
    network = model.model.diffusion_model
    return _finished(
        comfy, model, seed, [*network.double_blocks, *network.single_blocks], (1, 16, 16, 16), (8, 64), pooled=64
    )


def _chroma(comfy: SimpleNamespace, seed: int) -> TinyModel:
    """Flux' relative with other modulation."""
    model = _from_config(
        comfy, "Chroma", in_channels=64, out_channels=64, patch_size=2, context_in_dim=64, hidden_size=64,
        mlp_ratio=2.0, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=[8, 12, 12], theta=10000, qkv_bias=True,
        in_dim=64, out_dim=64, hidden_dim=64, n_layers=2,
    )  # fmt: skip
    network = model.model.diffusion_model
    blocks = [*network.double_blocks, *network.single_blocks]
    return _finished(comfy, model, seed, blocks, (1, 16, 16, 16), (8, 64), pooled=64, guidance=comfy.torch.zeros(1))


def _hunyuan3d(comfy: SimpleNamespace, seed: int) -> TinyModel:
    """Blocks of another kind, with skip connections, that answer with a tensor; takes cond and uncond as one batch."""
    model = _from_config(
        comfy, "Hunyuan3Dv2_1", in_channels=64, hidden_size=64, context_dim=64, depth=5, num_heads=2,
        num_moe_layers=1, guidance_cond_proj_dim=64, num_experts=2,
    )  # fmt: skip
    return _finished(comfy, model, seed, list(model.model.diffusion_model.blocks), (1, 64, 16), (8, 64), rows=2)


def _hunyuan_video(comfy: SimpleNamespace, seed: int) -> TinyModel:
    model = _from_config(
        comfy, "HunyuanVideo", in_channels=16, out_channels=16, vec_in_dim=64, context_in_dim=64, hidden_size=64,
        mlp_ratio=2.0, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=[8, 12, 12], theta=256,
        patch_size=[1, 2, 2], qkv_bias=True, guidance_embed=False, byt5=False, meanflow=False,
    )  # fmt: skip
    network = model.model.diffusion_model
    blocks = [*network.double_blocks, *network.single_blocks]
    return _finished(comfy, model, seed, blocks, (1, 16, 2, 8, 8), (8, 64), pooled=64)


def _wan(comfy: SimpleNamespace, seed: int) -> TinyModel:
    model = _from_config(
        comfy, "WAN21_T2V", model_type="t2v", in_dim=16, out_dim=16, dim=64, ffn_dim=128, freq_dim=64, text_dim=64,
        num_heads=2, num_layers=4,
    )  # fmt: skip
    return _finished(comfy, model, seed, list(model.model.diffusion_model.blocks), (1, 16, 2, 8, 8), (8, 64))


def _qwen_image(comfy: SimpleNamespace, seed: int) -> TinyModel:
    model = _from_config(
        comfy, "QwenImage", in_channels=64, out_channels=16, num_layers=4, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=64, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    blocks = list(model.model.diffusion_model.transformer_blocks)
    return _finished(comfy, model, seed, blocks, (1, 16, 1, 16, 16), (8, 64))


def _ltxv(comfy: SimpleNamespace, seed: int) -> TinyModel:
    model = _from_config(
        comfy, "LTXV", in_channels=128, cross_attention_dim=64, attention_head_dim=32, num_attention_heads=2,
        caption_channels=64, num_layers=4,
    )  # fmt: skip
    blocks = list(model.model.diffusion_model.transformer_blocks)
    mask = comfy.torch.ones(1, 8, dtype=comfy.torch.int)
    return _finished(comfy, model, seed, blocks, (1, 128, 2, 8, 8), (8, 64), attention_mask=mask)


def _aura_flow(comfy: SimpleNamespace, seed: int) -> TinyModel:
    model = _from_config(
        comfy, "AuraFlow", in_channels=4, out_channels=4, dim=64, n_layers=4, n_double_layers=2, n_heads=2,
        global_conddim=64, cond_seq_dim=64, max_seq=256,
    )  # fmt: skip
    network = model.model.diffusion_model
    blocks = [*network.double_layers, *network.single_layers]
    return _finished(comfy, model, seed, blocks, (1, 4, 16, 16), (8, 64))


def _lumina2(comfy: SimpleNamespace, seed: int) -> TinyModel:
    """A transformer without block hooks, whose forward ComfyUI's wrappers do reach."""
    model = _from_config(
        comfy, "Lumina2", patch_size=2, in_channels=16, dim=64, cap_feat_dim=64, n_layers=4, n_heads=2, n_kv_heads=2,
        qk_norm=True, axes_dims=[8, 12, 12], axes_lens=[300, 512, 512],
    )  # fmt: skip
    mask = comfy.torch.ones(1, 8, dtype=comfy.torch.int)
    blocks = list(model.model.diffusion_model.layers)
    return _finished(comfy, model, seed, blocks, (1, 16, 16, 16), (8, 64), attention_mask=mask, num_tokens=8)


def _pixart(comfy: SimpleNamespace, seed: int) -> TinyModel:
    """A transformer without any hooks."""
    model = _from_config(
        comfy, "PixArtSigma", input_size=32, patch_size=2, in_channels=4, hidden_size=64, depth=4, num_heads=2,
        caption_channels=64, micro_condition=False, pe_interpolation=1, pe_precision=None, model_max_length=8,
    )  # fmt: skip
    return _finished(comfy, model, seed, list(model.model.diffusion_model.blocks), (1, 4, 64, 64), (8, 64))
