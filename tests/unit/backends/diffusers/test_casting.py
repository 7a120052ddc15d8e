"""Weights kept in a small dtype, computed with in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from luna_daemon.backends.diffusers.casting import cast_at_use

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(4, 3), lambda: nn.Linear(4, 3, bias=False), lambda: nn.LayerNorm(4)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_cast_their_weights_and_not_their_input(make, dtype: torch.dtype) -> None:
    layer = make().to(dtype).requires_grad_(False)
    expected = make()
    expected.load_state_dict({key: weight.float() for key, weight in layer.state_dict().items()})
    pointers = [weight.data_ptr() for weight in layer.parameters()]
    cast_at_use(layer)
    assert torch.equal(layer(X), expected(X))
    assert [weight.data_ptr() for weight in layer.parameters()] == pointers
    assert {weight.dtype for weight in layer.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_embeddings_give_float32(dtype: torch.dtype) -> None:
    layer = nn.Embedding.from_pretrained(X.to(dtype))
    cast_at_use(layer)
    rows = layer(torch.tensor([1, 0]))
    assert rows.dtype == torch.float32 and torch.equal(rows, X.to(dtype).float()[[1, 0]])


def test_t5s_norm_does_not_round_its_result() -> None:
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    norm = T5LayerNorm(4).half()
    assert norm(X).dtype == torch.float16
    cast_at_use(norm)
    expected = X * torch.rsqrt(X.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    assert torch.equal(norm(X), expected)


def test_an_unknown_layer_with_weights_is_refused() -> None:
    with pytest.raises(TypeError, match="1 is a Conv1d"):
        cast_at_use(nn.Sequential(nn.ReLU(), nn.Conv1d(1, 1, 1)))
