"""Prompts to chunks: expectations are what ComfyUI's tokenizer gives."""

from __future__ import annotations

import logging

import pytest

from luna_daemon.backends.diffusers.prompts import ChunkRules, chunk_tokens, empty_chunk, parse_weights, tokenize
from luna_daemon.core import BadRequest

CLIP = ChunkRules(start=100, end=101, pad=0, length=77)
T5 = ChunkRules(start=None, end=1, pad=0, length=99_999_999, min_length=20)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("a cat", [("a cat", 1.0)]),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("((red:1.3))", [("red", 1.3)]),
        ("(a (b:0.5) c:1.2)", [("a ", 1.2), ("b", 0.5), (" c", 1.2)]),
        ("(x:y)", [("x:y", 1.1)]),
        ("(:2)", [(":2", 1.1)]),
        ("(a:b:1.5)", [("a:b", 1.5)]),
        (r"a \(red\) cat", [("a (red) cat", 1.0)]),
        (r"(\(red\):1.2)", [("(red)", 1.2)]),
        ("(open", [("(open", 1.0)]),
        ("a) b (c)", [("a) b (c)", 1.0)]),
        ("()", []),
    ],
)
def test_weights(text: str, expected: list[tuple[str, float]]) -> None:
    assert parse_weights(text) == expected


def test_nesting_too_deep_is_refused() -> None:
    with pytest.raises(BadRequest, match="5000 parentheses"):
        parse_weights("(" * 5000 + "a" + ")" * 5000)


def test_short_prompt_is_one_padded_chunk() -> None:
    (chunk,) = tokenize("a (b:1.5)", lambda text: [ord(c) for c in text.strip()], CLIP)
    assert chunk[:4] == [(100, 1.0), (97, 1.0), (98, 1.5), (101, 1.0)]
    assert chunk[4:] == [(0, 1.0)] * 73


def test_seventy_five_tokens_fill_a_chunk_and_one_more_opens_the_next() -> None:
    full = [[(i, 1.0)] for i in range(75)]
    assert [len(chunk) for chunk in chunk_tokens(full, CLIP)] == [77]
    both = chunk_tokens([*full, [(75, 1.0)]], CLIP)
    assert [len(chunk) for chunk in both] == [77, 77]
    assert both[0][-2:] == [(74, 1.0), (101, 1.0)]
    assert both[1][:3] == [(100, 1.0), (75, 1.0), (101, 1.0)]


def test_a_short_segment_moves_whole_and_a_long_one_is_cut() -> None:
    filler = [(5, 1.0)] * 70
    short = chunk_tokens([filler, [(6, 1.1)] * 7], CLIP)
    assert (6, 1.1) not in short[0]
    assert short[0][71:] == [(101, 1.0)] + [(0, 1.0)] * 5
    assert short[1].count((6, 1.1)) == 7
    long = chunk_tokens([filler, [(6, 1.1)] * 8], CLIP)
    assert [chunk.count((6, 1.1)) for chunk in long] == [5, 3]
    assert long[0][-1] == (101, 1.0)


def test_t5_is_one_chunk_padded_to_its_minimum_and_never_cut() -> None:
    assert chunk_tokens([[(7, 1.0)] * 3], T5) == [[(7, 1.0)] * 3 + [(1, 1.0)] + [(0, 1.0)] * 16]
    assert [len(chunk) for chunk in chunk_tokens([[(7, 1.0)] * 300], T5)] == [301]


def test_embeddings_are_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def ids(text: str) -> list[int]:
        seen.append(text)
        return [1]

    with caplog.at_level(logging.WARNING):
        tokenize("a embedding:foo, b", ids, CLIP)
    assert seen == ["a", ", b"]
    assert "embedding:foo" in caplog.text


def test_empty_chunk() -> None:
    assert empty_chunk(CLIP, 4) == [100, 101, 0, 0]
    assert empty_chunk(T5, 3) == [1, 0, 0]
