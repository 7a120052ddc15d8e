"""Layers that keep their weights in the stored dtype and cast them to the activations' dtype at each use.

So a float16 file stays mapped and shared between processes while results are those of float32. The layers' classes are
swapped in place, without copies and reference cycles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class _Linear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class _LayerNorm(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class _Embedding(nn.Embedding):
    """Returns float32, in which the following layers compute."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.weight.element_size() == 1:
            # float8 has no row lookup of its own.
            return F.embedding(input, self.weight.view(torch.uint8)).view(self.weight.dtype).float()
        return F.embedding(input, self.weight).float()


class _T5Norm(nn.Module):
    """T5LayerNorm of transformers, without rounding the result to the weight's dtype."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight.to(hidden_states.dtype) * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


class _T5GatedFeedForward(nn.Module):
    """T5DenseGatedActDense of transformers, without rounding the input to the weight's dtype."""

    wi_0: nn.Module
    wi_1: nn.Module
    wo: nn.Module
    act: nn.Module

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.wo(self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states))
        return result


# By name: importing transformers' classes here would make it a dependency of this module.
_SWAPS: dict[str, type[nn.Module]] = {
    "Linear": _Linear,
    "LayerNorm": _LayerNorm,
    "Embedding": _Embedding,
    "T5LayerNorm": _T5Norm,
    "T5DenseGatedActDense": _T5GatedFeedForward,
}


def cast_at_use(model: nn.Module) -> None:
    """Make every layer of a CLIP or T5 encoder cast the layer's weights to the input's dtype.

    Raises:
        TypeError: a layer with weights is of a class for which there is no casting class.
    """
    for name, module in model.named_modules():
        swap = _SWAPS.get(type(module).__name__)
        if swap is not None:
            module.__class__ = swap
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"{name} is a {type(module).__name__}, which cannot cast its weights at use")
