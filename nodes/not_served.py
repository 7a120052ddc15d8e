"""What stands on an output that this pack does not serve: it says so as soon as a node uses it."""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = ["NotServed"]


class NotServed:
    """Fails on any use, with what to do instead.

    It is an ``AttributeError``, as of any object without the attribute, so that ComfyUI may look it over.
    """

    def __init__(self, output: str, why: str) -> None:
        self._text = f"output {output!r} holds nothing: {why}"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(self._text)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(self._text)

    def __getitem__(self, key: Any) -> NoReturn:
        raise TypeError(self._text)

    def __repr__(self) -> str:
        return f"<{self._text}>"
