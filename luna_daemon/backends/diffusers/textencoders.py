"""A text encoder that maps chunks of weighted tokens to hidden states and pooled vector, as ComfyUI's does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...core import BadRequest, ModelLoadError
from .casting import cast_at_use
from .conversions import Tensors, clip_config, part_tensors, t5_config, text_projection
from .layouts import Part
from .loading import assign_weights
from .prompts import ChunkRules, empty_chunk
from .segmenters import Ids


class TextEncoder:
    """A CLIP or T5 encoder on a device, with its tokenizer.

    Args:
        name: ``l``, ``g`` or ``t5xxl``.
        model: transformers' module, whose layers cast weights at use.
        norm: the model's final layer norm.
        projection: ``[P,D]`` for CLIP's pooled vector, or ``None``.
        ids: the tokenizer.
        rules: framing and padding of chunks.
    """

    def __init__(
        self, name: str, model: nn.Module, norm: nn.Module, projection: torch.Tensor | None, ids: Ids, rules: ChunkRules
    ) -> None:
        self.name = name
        self.ids = ids
        self.rules = rules
        self._model = model
        self._norm = norm
        self._projection = projection
        config: Any = model.config
        self._layers: int = config.num_hidden_layers
        self._vocabulary: int = config.vocab_size
        self.width: int = config.hidden_size
        self.pooled_width = self.width if projection is None else projection.shape[0]
        weights = [*model.parameters(), *([] if projection is None else [projection])]
        self.dtype = weights[0].dtype
        self.device = weights[0].device
        self.nbytes = sum(weight.nbytes for weight in {weight.data_ptr(): weight for weight in weights}.values())

    def encode(
        self, chunks: Sequence[Sequence[tuple[int, float]]], layer: int | None, normed: bool, projected: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode all chunks as one batch and apply the tokens' weights.

        Args:
            chunks: equally long lists of (token id, weight); without chunks the empty prompt is encoded.
            layer: the hidden layer whose output is used: -2 is the penultimate, ``None`` or too deep the last.
            normed: whether the final layer norm is applied to a layer that is not the last.
            projected: whether the pooled vector goes through the text projection.

        Returns:
            ``[1,T,D]``, chunks joined, and the first chunk's pooled ``[1,P]``; float32 on the CPU.

        Raises:
            BadRequest: this encoder does not have a token, chunk length or layer of the call.
        """
        rows = self._check(chunks)
        weights = torch.tensor([[weight for _, weight in chunk] for chunk in chunks], dtype=torch.float32)
        weighted = bool((weights != 1.0).any())
        if weighted or not rows:
            rows = [*rows, empty_chunk(self.rules, len(rows[0]) if rows else 0)]
        states, last = self._run(torch.tensor(rows, device=self.device), layer, normed)
        pooled = self._pool(last[:1], rows[0], projected)
        if weighted:
            factor = weights.to(states.device)[..., None]
            empty = states[-1]
            states = torch.where(factor != 1.0, (states[:-1] - empty) * factor + empty, states[:-1])
        return states.reshape(1, -1, self.width).cpu().contiguous(), pooled.cpu().contiguous()

    def _check(self, chunks: Sequence[Sequence[tuple[int, float]]]) -> list[list[int]]:
        # On CUDA an id outside the vocabulary fails a device assert, after which the process must be restarted.
        rows = [[token for token, _ in chunk] for chunk in chunks]
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1 or (lengths and not 1 <= lengths[0] <= self.rules.length):
            raise BadRequest(
                f"chunks of {self.name} have {lengths} tokens",
                f"They must be equally long, and {self.rules.length} at most",
            )
        for token in (token for row in rows for token in row):
            if not 0 <= token < self._vocabulary:
                raise BadRequest(f"token {token} of {self.name} is not in its vocabulary of {self._vocabulary}")
        return rows

    def _run(self, rows: torch.Tensor, layer: int | None, normed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the output of ``layer`` and the normed output of the last layer, both ``[S,T,D]`` float32."""
        index = self._layer_index(layer)
        result = self._model(input_ids=rows, output_hidden_states=index is not None)
        last: torch.Tensor = result.last_hidden_state
        if index is None or (normed and index == self._layers - 1):
            return last, last
        # The first hidden state is the embedding.
        states: torch.Tensor = result.hidden_states[index + 1]
        if normed:
            states = self._norm(states)
        return states, last

    def _layer_index(self, layer: int | None) -> int | None:
        if layer is None or abs(layer) > self._layers:
            return None
        if layer == self._layers:
            raise BadRequest(f"layer is {layer}, {self.name} has {-self._layers} to {self._layers - 1}")
        return layer % self._layers

    def _pool(self, last: torch.Tensor, row: list[int], projected: bool) -> torch.Tensor:
        """Pool to the hidden state at the first end token, as CLIP does."""
        end = row.index(self.rules.end) if self.rules.end in row else len(row) - 1
        pooled = last[:, end]
        if projected and self._projection is not None:
            pooled = F.linear(pooled, self._projection.to(pooled.dtype))
        return pooled


def load_text_encoder(
    part: Part, dtype: torch.dtype | None, device: torch.device, ids: Ids, min_length: int
) -> TextEncoder:
    """Build an encoder; on the CPU and in the file's dtype the weights stay mapped.

    Args:
        part: ``l``, ``g`` or ``t5xxl``.
        dtype: dtype in which weights are kept; ``None`` for ComfyUI's choice. Activations are float32.
        ids: the tokenizer.
        min_length: number of tokens that T5 pads short prompts to; CLIP pads to its number of positions.

    Raises:
        ModelLoadError: weights are missing, have other shapes, or are quantised with scales.
    """
    tensors = part_tensors(part)
    dtype = dtype or _kept_dtype(part, tensors)
    projection: torch.Tensor | None = None
    if part.name == "t5xxl":
        model, norm = _new_t5(part, tensors)
        rules = ChunkRules(None, 1, 0, 99_999_999, min_length)
    else:
        model, norm, positions = _new_clip(part, tensors)
        rules = ChunkRules(49406, 49407, 0 if part.name == "g" else 49407, positions)
        if part.name == "g":
            projection = text_projection(part).to(device, dtype)
    assign_weights(part, model, tensors, dtype, device)
    cast_at_use(model)
    return TextEncoder(part.name, model, norm, projection, ids, rules)


def _kept_dtype(part: Part, tensors: Tensors) -> torch.dtype:
    """Choose float16 for CLIP, and for T5 the file's dtype or float16, whichever is smaller."""
    if "scaled_fp8" in tensors:
        raise ModelLoadError(f"{part.weights.source} is scaled float8", "Give the fp16 or the plain float8 file")
    norm = tensors.get("encoder.final_layer_norm.weight")
    return torch.float16 if norm is None or norm.element_size() > 2 else norm.dtype


def _new_clip(part: Part, tensors: Tensors) -> tuple[nn.Module, nn.Module, int]:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(**clip_config(part, tensors), bos_token_id=49406, eos_token_id=49407)
    with torch.device("meta"):
        model: Any = CLIPTextModel(config)
    # transformers 4 has one more level than 5.
    core: Any = getattr(model, "text_model", model)
    positions = int(config.max_position_embeddings)
    # This buffer is not part of the weights, so loading them leaves it on the meta device.
    core.embeddings.position_ids = torch.arange(positions)[None]
    return core, core.final_layer_norm, positions


def _new_t5(part: Part, tensors: Tensors) -> tuple[nn.Module, nn.Module]:
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model: Any = T5EncoderModel(T5Config(**t5_config(part, tensors)))
    return model, model.encoder.final_layer_norm
