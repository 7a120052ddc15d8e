"""Whether a loaded network has the very weights of a file: compared tensor by tensor, a few or all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from luna_daemon.comfyui.meta import read_tensor
from luna_daemon.core import LunaError
from luna_daemon.files.safetensors import Header, open_header
from luna_daemon.wire.messages import TensorRef

from .. import host, models
from .origins import Origin

__all__ = ["differs", "find_by_contents", "is_whole"]

Place = tuple[str, TensorRef]
"""A file, and where a tensor lies in it."""

_SAMPLE = 12
_MOST_SAMPLED = 1 << 20
"""Elements of a tensor that is sampled: small ones (norms, biases) tell fine-tuned models apart as well."""
_PREFIXES = ("", "first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.embedders.0.")
"""What checkpoints put before the names of the parts that they carry."""
_MAY_LACK = ("position_ids", "logit_scale", "text_projection.weight", "vae_scale", "vae_shift")
"""What ComfyUI makes itself if a file does not have it."""


def differs(patcher: Any, files: Iterable[str]) -> bool:
    """Whether a sample of the network's weights is in the files with other values; what is not found is not judged."""
    places = _places(patcher, files)
    sizes = {key: math.prod(found[0][1].shape) for key, found in places.items() if found}
    small = [key for key, size in sizes.items() if 1 < size <= _MOST_SAMPLED]
    return any(not _is_equal(patcher, key, places[key]) for key in small[:: max(1, len(small) // _SAMPLE)])


def is_whole(patcher: Any, files: Iterable[str]) -> bool:
    """Whether each of the network's weights is in the files with this very value."""
    places = _places(patcher, files)
    if not any(places.values()) or any(not found and not key.endswith(_MAY_LACK) for key, found in places.items()):
        return False
    return all(_is_equal(patcher, key, found) for key, found in places.items() if found)


def find_by_contents(patcher: Any, folders: Iterable[str]) -> Iterator[Origin]:
    """Files below ComfyUI's folders that hold the network's weights; of text encoders, each family there is."""
    for folder in folders:
        for name in host.names(folder):
            path = host.path(folder, name)
            if differs(patcher, [path]) or not is_whole(patcher, [path]):
                continue
            if folder == "text_encoders":
                yield from (Origin((path,), family=family) for family in models.clip_types())
            else:
                yield Origin((path,), checkpoint=folder == "checkpoints")


def _headers(files: Iterable[str]) -> list[tuple[str, Header]]:
    """Those files whose header can be read, with it."""
    found = []
    for file in files:
        try:
            found.append((file, open_header(file)))
        except LunaError:
            continue
    return found


def _places(patcher: Any, files: Iterable[str]) -> dict[str, list[Place]]:
    """For each of the network's weights where it may be: tensors of its shape and name."""
    headers = _headers(files)
    return {key: _find(key, tuple(value.shape), headers) for key, value in patcher.model.state_dict().items()}


def _find(key: str, shape: tuple[int, ...], headers: list[tuple[str, Header]]) -> list[Place]:
    """Under its name, with a checkpoint's prefix, or without the network's: two encoders' files have equal names."""
    found, rest = [], key
    while rest:
        for file, header in headers:
            refs = (header.tensors[prefix + rest] for prefix in _PREFIXES if prefix + rest in header.tensors)
            found += [(file, ref) for ref in refs if ref.shape == shape]
        rest = rest.partition(".")[2] if rest.count(".") > 1 else ""
    return found


def _is_equal(patcher: Any, key: str, places: list[Place]) -> bool:
    """In the network's own precision; what a LoRA has changed in place is compared as it was before."""
    kept = patcher.backup.get(key)
    mine = (kept.weight if kept is not None else patcher.model.state_dict()[key]).cpu()
    return any(bool((mine == read_tensor(*place).to(mine.dtype)).all()) for place in places)
