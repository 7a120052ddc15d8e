"""Model files on disk: headers read and checked before anything is loaded, tensors mapped instead of copied."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...core import ModelLoadError

_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightFiles:
    """One model's tensors, in one file or several shards, known by their headers only."""

    source: Path
    """What the user gave: a file, or a folder of the diffusers layout."""
    entries: dict[str, _Entry]
    config: dict[str, Any] = field(default_factory=dict)
    """The folder's ``config.json``; empty for a single file."""

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor that exists; no data is read."""
        return self.entries[key].shape

    def below(self, prefix: str) -> list[str]:
        """Keys that start with ``prefix``."""
        return [key for key in self.entries if key.startswith(prefix)]

    def load(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors as views of the memory-mapped file: copy before writing.

        Raises:
            ModelLoadError: the file changed since its header was read.
        """
        wanted: dict[Path, list[str]] = {}
        for key in keys:
            wanted.setdefault(self.entries[key].file, []).append(key)
        tensors: dict[str, torch.Tensor] = {}
        for path, names in wanted.items():
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    tensors.update((name, file.get_tensor(name)) for name in names)
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(f"{path} cannot be read: {error}") from error
        return tensors


def open_weights(path: Path) -> WeightFiles:
    """Read the headers of a ``.safetensors`` file, or of a folder that holds one model's.

    Raises:
        ModelLoadError: missing, empty, truncated, another format, or a folder without weights.
    """
    if not path.is_dir():
        return WeightFiles(path, _read_header(path))
    entries: dict[str, _Entry] = {}
    for shard in _shards(path):
        entries.update(_read_header(shard))
    return WeightFiles(path, entries, _read_config(path / "config.json"))


def component_folders(folder: Path, stem: str) -> list[Path]:
    """A pipeline's components (``text_encoder``, ``text_encoder_2`` ...), or the folder itself if it has none."""
    found = [folder / f"{stem}{suffix}" for suffix in ("", "_2", "_3")]
    return [path for path in found if path.is_dir()] or [folder]


def _shards(folder: Path) -> list[Path]:
    """The weight files of one variant: the plain one if there is one, not its ``fp16`` twin."""
    variants: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        variants.setdefault(path.stem.split("-0")[0], []).append(path)
    if not variants:
        names = sorted(path.name for path in folder.iterdir())
        found = ", ".join(names[:6]) if names else "nothing"
        raise ModelLoadError(f"{folder} has no .safetensors file; found {found}")
    return variants[min(variants, key=len)]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _read_header(path: Path) -> dict[str, _Entry]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            text = file.read(length) if length <= _MAX_HEADER else b""
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}") from error
    if size == 0:
        raise ModelLoadError(f"{path} is empty")
    try:
        if len(text) != length or not text:
            raise ValueError
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _Entry(path, tuple(map(int, entry["shape"]))) for name, entry in header.items()}
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelLoadError(f"{path} is {_guess(path, head)}", "Give a .safetensors file") from None
    if size < 8 + length + end:
        raise ModelLoadError(
            f"{path} is truncated: {size} bytes of {8 + length + end}", "Copy or download the file again"
        )
    return entries


def _guess(path: Path, head: bytes) -> str:
    if head.startswith((b"PK", b"\x80")):
        return "a PyTorch pickle, which is not loaded because it can run code"
    if head.startswith(b"GGUF"):
        return "a GGUF file, which this backend does not read"
    if head.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return f"a text file (starts with {head.decode('ascii')!r}), not a model"
    return f"not a .safetensors file or cut short ({path.stat().st_size} bytes)"
