"""The tray's icons: each state has its own colour and shape, so that nobody depends on the colour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .state import TrayState

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

COLOURS = {
    TrayState.RUNNING: (0, 158, 96),
    TrayState.STARTING: (240, 173, 0),
    TrayState.STOPPING: (240, 173, 0),
    TrayState.STOPPED: (128, 132, 138),
    TrayState.ERROR: (208, 32, 40),
}
"""Colours of warning signs and traffic lights."""

_SIDE = 64
_FINE = 4
"""Factor by which icons are drawn larger and then scaled down, since Pillow does not smooth edges."""
_WHITE, _DARK = (255, 255, 255), (32, 24, 0)

Points = list[tuple[float, float]]


def draw_icon(state: TrayState) -> Image:
    """Draw the icon of a state: RGBA, 64 pixels square, on a transparent background."""
    from PIL import Image, ImageDraw

    size = (_SIDE * _FINE, _SIDE * _FINE)
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    _SHAPES[state](ImageDraw.Draw(image), COLOURS[state])
    return image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)


def _scaled(points: Points) -> Points:
    return [(x * _FINE, y * _FINE) for x, y in points]


def _polygon(draw: ImageDraw, points: Points, fill: tuple[int, int, int]) -> None:
    draw.polygon(_scaled(points), fill=fill)


def _running(draw: ImageDraw, colour: tuple[int, int, int]) -> None:
    """A disc with a tick."""
    draw.ellipse(_scaled([(2, 2), (62, 62)]), fill=colour, outline=_WHITE, width=2 * _FINE)
    draw.line(_scaled([(17, 33), (28, 44), (47, 20)]), fill=_WHITE, width=8 * _FINE, joint="curve")


def _diamond(draw: ImageDraw, colour: tuple[int, int, int]) -> None:
    _polygon(draw, [(32, 0), (64, 32), (32, 64), (0, 32)], _WHITE)
    _polygon(draw, [(32, 3), (61, 32), (32, 61), (3, 32)], colour)


def _starting(draw: ImageDraw, colour: tuple[int, int, int]) -> None:
    """A diamond with an arrowhead up."""
    _diamond(draw, colour)
    _polygon(draw, [(32, 16), (47, 40), (17, 40)], _DARK)


def _stopping(draw: ImageDraw, colour: tuple[int, int, int]) -> None:
    """A diamond with an arrowhead down."""
    _diamond(draw, colour)
    _polygon(draw, [(32, 48), (47, 24), (17, 24)], _DARK)


def _stopped(draw: ImageDraw, colour: tuple[int, int, int]) -> None:
    """A square with a square in it, as on a player's stop button."""
    corners = _scaled([(6, 6), (58, 58)])
    draw.rounded_rectangle(corners, radius=8 * _FINE, fill=colour, outline=_WHITE, width=2 * _FINE)
    draw.rectangle(_scaled([(22, 22), (42, 42)]), fill=_WHITE)


def _error(draw: ImageDraw, colour: tuple[int, int, int]) -> None:
    """A triangle with an exclamation mark."""
    _polygon(draw, [(32, 1), (64, 61), (0, 61)], _WHITE)
    _polygon(draw, [(32, 5), (61, 59), (3, 59)], colour)
    draw.rounded_rectangle(_scaled([(28, 21), (36, 43)]), radius=3 * _FINE, fill=_WHITE)
    draw.ellipse(_scaled([(28, 46), (36, 54)]), fill=_WHITE)


_SHAPES = {
    TrayState.RUNNING: _running,
    TrayState.STARTING: _starting,
    TrayState.STOPPING: _stopping,
    TrayState.STOPPED: _stopped,
    TrayState.ERROR: _error,
}
