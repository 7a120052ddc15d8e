"""Model files whose headers are checked before a tensor is loaded, and whose tensors are mapped, not copied."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...core import ModelLoadError, ModelNotFound
from ...files.safetensors import open_header
from ...wire.messages import TensorRef


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a file, or of a folder's shards, as the headers list them."""

    source: Path
    """The file, or the folder of the diffusers layout."""
    entries: dict[str, tuple[Path, TensorRef]]
    """Per key the file that holds the tensor, and the tensor's header."""
    config: dict[str, Any] = field(default_factory=dict)
    """The folder's ``config.json``; empty for a single file."""

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def shape(self, key: str) -> tuple[int, ...]:
        """Look up the shape of a tensor.

        Raises:
            KeyError: the tensor does not exist.
        """
        return self.entries[key][1].shape

    def below(self, prefix: str) -> list[str]:
        """List the keys that start with ``prefix``."""
        return [key for key in self.entries if key.startswith(prefix)]

    def load(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Load tensors by key, as views of the memory-mapped file: copy before writing.

        Raises:
            ModelLoadError: the file changed since its header was read.
        """
        wanted: dict[Path, list[str]] = {}
        for key in keys:
            wanted.setdefault(self.entries[key][0], []).append(key)
        tensors: dict[str, torch.Tensor] = {}
        for path, names in wanted.items():
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    tensors.update((name, file.get_tensor(name)) for name in names)
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(f"{path} cannot be read: {error}") from error
        return tensors


def open_weights(path: Path) -> WeightFiles:
    """Read the headers of a ``.safetensors`` file, or of a folder of one model's shards.

    Raises:
        ModelLoadError: the file is missing, truncated or of another format, or the folder has no weights.
    """
    if not path.is_dir():
        return WeightFiles(path, _entries(path))
    entries: dict[str, tuple[Path, TensorRef]] = {}
    for shard in _shards(path):
        entries.update(_entries(shard))
    return WeightFiles(path, entries, _read_config(path / "config.json"))


def component_folders(path: Path, stem: str) -> list[Path]:
    """List a pipeline's folders ``text_encoder``, ``text_encoder_2`` ...; the path itself if it has none of them."""
    components = [path / f"{stem}{suffix}" for suffix in ("", "_2", "_3")]
    return [folder for folder in components if folder.is_dir()] or [path]


def _shards(folder: Path) -> list[Path]:
    """List the weight files of one variant, preferably of the one without a suffix such as ``fp16``."""
    variants: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        variants.setdefault(path.stem.split("-0")[0], []).append(path)
    if not variants:
        names = sorted(path.name for path in folder.iterdir())
        raise ModelLoadError(f"{folder} has no .safetensors file; found {', '.join(names[:6]) or 'nothing'}")
    return variants[min(variants, key=len)]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _entries(path: Path) -> dict[str, tuple[Path, TensorRef]]:
    try:
        tensors = open_header(path).tensors
    except ModelNotFound as error:
        raise ModelLoadError(error.message, error.hint) from error
    return {name: (path, ref) for name, ref in tensors.items()}
