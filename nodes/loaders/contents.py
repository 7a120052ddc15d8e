"""Comparison of a loaded network's weights with files, tensor by tensor: a sample of the tensors, or all."""

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

Place = tuple[str, TensorRef]
"""A file, and the position of a tensor in that file."""

_SAMPLE = 12
_MOST_SAMPLED = 1 << 20
"""Most elements of a sampled tensor: small tensors (norms, biases) distinguish fine-tuned models as well."""
_PREFIXES = ("", "first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.embedders.0.")
"""Prefixes that checkpoints add to the names of a part's tensors."""
_MAY_LACK = ("position_ids", "logit_scale", "text_projection.weight", "vae_scale", "vae_shift")
"""Tensors that ComfyUI makes itself if a file lacks them."""


def differs(patcher: Any, files: Iterable[str]) -> bool:
    """Whether a sample of the network's weights has other values in the files; absent tensors are not compared."""
    places = _places(patcher, files)
    sizes = {key: math.prod(candidates[0][1].shape) for key, candidates in places.items() if candidates}
    small = [key for key, size in sizes.items() if 1 < size <= _MOST_SAMPLED]
    return any(not _is_equal(patcher, key, places[key]) for key in small[:: max(1, len(small) // _SAMPLE)])


def is_whole(patcher: Any, files: Iterable[str]) -> bool:
    """Whether the files hold every weight of the network with an equal value."""
    places = _places(patcher, files)
    absent = [key for key, candidates in places.items() if not candidates and not key.endswith(_MAY_LACK)]
    if absent or not any(places.values()):
        return False
    return all(_is_equal(patcher, key, candidates) for key, candidates in places.items() if candidates)


def find_by_contents(patcher: Any, folders: Iterable[str]) -> Iterator[Origin]:
    """Find files below ComfyUI's folders that hold the network's weights; a text encoder may be of any family."""
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
    """Read the headers of those files that have a valid one."""
    headers = []
    for file in files:
        try:
            headers.append((file, open_header(file)))
        except LunaError:
            continue
    return headers


def _places(patcher: Any, files: Iterable[str]) -> dict[str, list[Place]]:
    """List, for each weight of the network, the tensors of the same shape and a fitting name."""
    headers = _headers(files)
    return {key: _find(key, tuple(value.shape), headers) for key, value in patcher.model.state_dict().items()}


def _find(key: str, shape: tuple[int, ...], headers: list[tuple[str, Header]]) -> list[Place]:
    """Look for a weight under its name, with a checkpoint's prefix, or without parts of the network's own prefix.

    The files of two encoders have equal names, which the network distinguishes by a prefix.
    """
    places, rest = [], key
    while rest:
        for file, header in headers:
            refs = (header.tensors[prefix + rest] for prefix in _PREFIXES if prefix + rest in header.tensors)
            places += [(file, ref) for ref in refs if ref.shape == shape]
        rest = rest.partition(".")[2] if rest.count(".") > 1 else ""
    return places


def _is_equal(patcher: Any, key: str, places: list[Place]) -> bool:
    """Compare in the network's own precision; a weight that a LoRA has changed in place is compared as before."""
    kept = patcher.backup.get(key)
    mine = (kept.weight if kept is not None else patcher.model.state_dict()[key]).cpu()
    return any(bool((mine == read_tensor(*place).to(mine.dtype)).all()) for place in places)
