"""Placeholder on an output that this pack does not serve: any use of the placeholder raises an error that says so."""

from __future__ import annotations

from typing import Any, NoReturn


class NotServed:
    """Value that raises an error on any use, with what to do instead.

    Args:
        output: the name of the node's output.
        why: why the output is empty, and the alternative.

    Raises:
        AttributeError: an attribute is read, so that ComfyUI's ``hasattr`` works.
        TypeError: the value is called or indexed.
    """

    def __init__(self, output: str, why: str) -> None:
        self._text = f"output {output!r} is empty: {why}"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(self._text)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(self._text)

    def __getitem__(self, key: Any) -> NoReturn:
        raise TypeError(self._text)

    def __repr__(self) -> str:
        return f"<{self._text}>"
