"""Model families' rules for combining text encoders: which layers, which pooled vector, joined in which way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...core import BadRequest
from ...wire.messages import Tokens
from .loading import memory_errors
from .prompts import tokenize
from .textencoders import TextEncoder

Encoded = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Per encoder: states ``[1,T,D]`` and pooled ``[1,P]``."""

_SD3_WIDTH = 4096
_SD3_POOLED = {"l": 768, "g": 1280}


@dataclass(frozen=True)
class Use:
    """A family's use of one text encoder."""

    layer: int | None
    """The hidden layer whose output is used, negative from the end; ``None`` is the last."""
    normed: bool
    """Whether the final layer norm is applied to a layer that is not the last."""
    projected: bool
    """Whether the text projection is applied to the pooled vector."""
    min_length: int = 0
    """Number of tokens that a short prompt is padded to; 0 for CLIP, which pads to its number of positions."""


@dataclass(frozen=True)
class Family:
    """A model family's text encoders."""

    uses: dict[str, Use]
    """Use of each encoder by the encoder's name, in the family's order."""
    required: tuple[frozenset[str], ...]
    """Sets of encoders of which one must be there; any encoder will do if the set is empty."""
    join: Callable[[Encoded], tuple[torch.Tensor, torch.Tensor]]
    """Maps the encoders' results to ``cond`` ``[1,T,D]`` and ``pooled_output`` ``[1,P]``."""


def _first(encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(encoded.values()))


def _sdxl(encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
    if "l" not in encoded:  # the refiner has CLIP-G alone
        return encoded["g"]
    return _side_by_side(encoded["l"][0], encoded["g"][0]), encoded["g"][1]


def _side_by_side(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    length = min(left.shape[1], right.shape[1])
    return torch.cat([left[:, :length], right[:, :length]], dim=-1)


def _sd3(encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
    """Join both CLIPs side by side, padded to T5's width, then T5 along the tokens; a missing CLIP counts as zeros."""
    t5 = encoded["t5xxl"][0] if "t5xxl" in encoded else None
    width = _SD3_WIDTH if t5 is None else t5.shape[-1]
    pooled = torch.cat(
        [encoded[name][1] if name in encoded else torch.zeros(1, size) for name, size in _SD3_POOLED.items()], dim=-1
    )
    clip: torch.Tensor | None = None
    if "l" in encoded and "g" in encoded:
        clip = _side_by_side(encoded["l"][0], encoded["g"][0])
    elif "l" in encoded:
        clip = encoded["l"][0]
    elif "g" in encoded:
        clip = F.pad(encoded["g"][0], (_SD3_POOLED["l"], 0))
    states = [] if clip is None else [F.pad(clip, (0, width - clip.shape[-1]))]
    states += [] if t5 is None else [t5]
    return torch.cat(states, dim=-2) if states else torch.zeros(1, 77, width), pooled


def _flux(encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
    return encoded["t5xxl"][0], encoded["l"][1]


FAMILIES = {
    "sd15": Family({"l": Use(None, True, False)}, (frozenset("l"),), _first),
    "sdxl": Family({"g": Use(-2, False, True), "l": Use(-2, False, False)}, (frozenset("lg"), frozenset("g")), _sdxl),
    "sd3": Family(
        {"g": Use(-2, False, True), "l": Use(-2, False, False), "t5xxl": Use(None, True, False, 77)},
        (frozenset(),),
        _sd3,
    ),
    "flux": Family(
        {"l": Use(None, True, False), "t5xxl": Use(None, True, False, 256)}, (frozenset(["l", "t5xxl"]),), _flux
    ),
}


class TextEncoders:
    """A family's encoders as one text model.

    Args:
        name: a key of ``FAMILIES``.
        encoders: by name; those that the family does not use are left out.
    """

    def __init__(self, name: str, encoders: dict[str, TextEncoder]) -> None:
        self._name = name
        self._family = FAMILIES[name]
        self._encoders = {key: encoders[key] for key in self._family.uses if key in encoders}
        self.nbytes = sum(encoder.nbytes for encoder in self._encoders.values())

    def properties(self) -> dict[str, Any]:
        """Describe the model as ``TextModel`` does; the sizes come from joining zeros as the family joins results."""
        blank = {
            name: (torch.zeros(1, 1, encoder.width), torch.zeros(1, encoder.pooled_width))
            for name, encoder in self._encoders.items()
        }
        cond, pooled = self._family.join(blank)
        encoders = self._encoders.values()
        return {
            "encoders": list(self._encoders),
            "cond_dim": cond.shape[-1],
            "pooled_dim": pooled.shape[-1],
            "dtype": ",".join(dict.fromkeys(str(encoder.dtype).removeprefix("torch.") for encoder in encoders)),
            "device": str(next(iter(encoders)).device),
            "class": f"TextEncoders({self._name})",
        }

    def tokenize(self, text: str) -> Tokens:
        """Parse weights and split the text into padded chunks for each encoder; raises as ``parse_weights``."""
        return {name: tokenize(text, encoder.ids, encoder.rules) for name, encoder in self._encoders.items()}

    @torch.inference_mode()
    def encode(self, tokens: Tokens, layer: int | None, unprojected: bool) -> dict[str, torch.Tensor]:
        """Encode as ``TextModel`` does; tokens of encoders that are not loaded are ignored."""
        encoded: Encoded = {}
        no_clip = self._name == "sd3" and not tokens.get("l") and not tokens.get("g")
        for name, encoder in self._encoders.items():
            if no_clip and name != "t5xxl":
                continue
            if name not in tokens:
                raise BadRequest(f"the tokens lack encoder {name}; they are for {', '.join(tokens) or 'no encoder'}")
            use = self._family.uses[name]
            wanted, projected = use.layer if layer is None else layer, use.projected and not unprojected
            with memory_errors(f"encoding {len(tokens[name])} chunks with {name} on {encoder.device}"):
                encoded[name] = encoder.encode(tokens[name], wanted, use.normed, projected)
        cond, pooled = self._family.join(encoded)
        return {"cond": cond.contiguous(), "pooled_output": pooled.contiguous()}
