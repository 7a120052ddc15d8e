"""Splits prompts into chunks of weighted tokens exactly as ComfyUI does: ``(word:1.3)``, nesting, escapes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ...core import BadRequest, logger

Chunk = list[tuple[int, float]]
"""Token ids and weights of one pass through an encoder."""

WORD_LIMIT = 8
"""A segment of this many tokens or more may be cut at a chunk's end; a shorter one moves to the next chunk."""

_ESCAPES = ((r"\)", "\0\1", ")"), (r"\(", "\0\2", "("))
_EMBEDDING = "embedding:"


@dataclass(frozen=True)
class ChunkRules:
    """An encoder's rules for framing and padding its tokens."""

    start: int | None
    end: int
    pad: int
    length: int
    """Number of tokens per chunk, start and end included."""
    min_length: int = 0
    """The number of tokens that the last chunk is padded to."""


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Split a prompt into segments and their weights, escapes resolved.

    Raises:
        BadRequest: parentheses are nested too deep.
    """
    for escaped, mark, _ in _ESCAPES:
        text = text.replace(escaped, mark)
    try:
        segments = _weighted(text, 1.0)
    except RecursionError:
        raise BadRequest(f"the prompt nests its {text.count('(')} parentheses too deep") from None
    for _, mark, plain in _ESCAPES:
        segments = [(segment.replace(mark, plain), weight) for segment, weight in segments]
    return segments


def _weighted(text: str, weight: float) -> list[tuple[str, float]]:
    segments: list[tuple[str, float]] = []
    for group in _groups(text):
        if len(group) < 2 or group[0] != "(" or group[-1] != ")":
            segments.append((group, weight))
            continue
        inner, inner_weight = group[1:-1], weight * 1.1
        colon = inner.rfind(":")
        if colon > 0:
            try:
                # An explicit weight replaces the surrounding one instead of multiplying it.
                inner_weight = float(inner[colon + 1 :])
                inner = inner[:colon]
            except ValueError:
                pass
        segments += _weighted(inner, inner_weight)
    return segments


def _groups(text: str) -> list[str]:
    """Cut a text at its outermost parentheses; an unopened ``)`` makes the depth negative, as in ComfyUI."""
    groups: list[str] = []
    depth = begin = 0
    for i, char in enumerate(text):
        if char == "(":
            if depth == 0 and i > begin:
                groups.append(text[begin:i])
                begin = i
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                groups.append(text[begin : i + 1])
                begin = i + 1
    return groups + ([text[begin:]] if begin < len(text) else [])


def tokenize(text: str, ids: Callable[[str], list[int]], rules: ChunkRules) -> list[Chunk]:
    """Turn a prompt into padded chunks.

    Args:
        ids: returns the tokens of a segment, without start and end token.

    Raises:
        BadRequest: parentheses are nested too deep.
    """
    groups = [
        [(token, weight) for token in ids(part)]
        for segment, weight in parse_weights(text)
        for part in _without_embeddings(segment)
    ]
    return chunk_tokens(groups, rules)


def _without_embeddings(segment: str) -> list[str]:
    """Cut a segment before each ``embedding:name`` and drop the name: this backend loads no embeddings."""
    head, *rest = re.split(rf" {_EMBEDDING}|\n{_EMBEDDING}", segment)
    parts: list[str] = []
    for part in [head, *(_EMBEDDING + piece for piece in rest)]:
        if part.startswith(_EMBEDDING):
            name, *words = part[len(_EMBEDDING) :].split() or [""]
            logger.warning("textual inversion is not supported by this backend: %s%s is ignored", _EMBEDDING, name)
            comma = name[len(name.strip(",")) :]
            part = " ".join([comma, *words] if comma else words)
        if part:
            parts.append(part)
    return parts


def chunk_tokens(groups: list[Chunk], rules: ChunkRules) -> list[Chunk]:
    """Distribute the segments' tokens over framed and padded chunks of ``rules.length``."""
    opening: Chunk = [] if rules.start is None else [(rules.start, 1.0)]
    end, pad = (rules.end, 1.0), (rules.pad, 1.0)
    chunks = [list(opening)]
    for group in groups:
        rest = group
        while rest:
            chunk = chunks[-1]
            room = rules.length - 1 - len(chunk)
            if len(rest) <= room:
                chunk += rest
                break
            if len(group) >= WORD_LIMIT:
                chunk += [*rest[:room], end]
                rest = rest[room:]
            else:
                chunk += [end] + [pad] * room
            chunks.append(list(opening))
    last = chunks[-1]
    last.append(end)
    target = rules.min_length or rules.length
    last += [pad] * (target - len(last))
    return chunks


def empty_chunk(rules: ChunkRules, length: int) -> list[int]:
    """Give the token ids of an empty prompt, padded to ``length``: weights interpolate from this prompt's encoding."""
    ids = [rules.end] if rules.start is None else [rules.start, rules.end]
    return ids + [rules.pad] * (length - len(ids))
