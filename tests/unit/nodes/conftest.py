"""The node pack as ComfyUI loads it: by its folder, under a name of its own; and a ComfyUI of a few lines."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
NAME = "luna_pack_under_test"


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    """The root ``__init__.py``, executed."""
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def part(pack: ModuleType) -> Callable[[str], Any]:
    """A module of the pack by its name below ``nodes``."""
    return lambda name: importlib.import_module(f"{NAME}.nodes.{name}")


class FolderPaths(ModuleType):
    """ComfyUI's ``folder_paths`` over a table of folders."""

    def __init__(self, root: Path) -> None:
        super().__init__("folder_paths")
        self.root, self.models_dir, self.__file__ = root, str(root / "models"), str(root / "folder_paths.py")

    def get_folder_paths(self, folder: str) -> list[str]:
        return [str(self.root / "models" / folder)]

    def get_filename_list(self, folder: str) -> list[str]:
        top = self.root / "models" / folder
        if not top.is_dir():
            raise KeyError(folder)
        return sorted(str(path.relative_to(top)) for path in top.rglob("*") if path.is_file())

    def get_full_path_or_raise(self, folder: str, name: str) -> str:
        path = self.root / "models" / folder / name
        if not path.is_file():
            raise FileNotFoundError(f"Model in folder '{folder}' with filename '{name}' not found.")
        return str(path)

    def get_user_directory(self) -> str:
        return str(self.root / "user")


class StockVAELoader:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"vae_name": (["sdxl.safetensors", "taesd", "pixel_space"],)}}

    def load_vae(self, name: str) -> tuple[str]:
        return (f"stock {name}",)


class StockCLIPLoader:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"type": (["stable_diffusion", "sd3"],)}}


class NewDualCLIPLoader:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"type": ("COMBO", {"options": ["sdxl", "sd3", "flux"]})}}


@pytest.fixture
def comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A ComfyUI with a few empty model files and the stock loaders' lists."""
    for name in (
        "vae/sdxl.safetensors", "vae_approx/taesd_encoder.pth", "vae_approx/taesd_decoder.pth",
        "vae_approx/taew2_1.safetensors", "text_encoders/clip_l.safetensors", "text_encoders/clip_g.safetensors",
        "checkpoints/base.safetensors", "checkpoints/both.safetensors", "diffusion_models/both.safetensors",
        "unet_gguf/flux.gguf", "loras/style.safetensors", "LLM/qwen/model.safetensors", "LLM/qwen/notes.txt",
    ):  # fmt: skip
        path = tmp_path / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    paths, nodes = FolderPaths(tmp_path), ModuleType("nodes")
    nodes.NODE_CLASS_MAPPINGS = {  # type: ignore[attr-defined]
        "VAELoader": StockVAELoader, "CLIPLoader": StockCLIPLoader, "DualCLIPLoader": NewDualCLIPLoader,
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    monkeypatch.setitem(sys.modules, "nodes", nodes)
    return SimpleNamespace(root=tmp_path, models=tmp_path / "models", paths=paths, nodes=nodes.NODE_CLASS_MAPPINGS)
