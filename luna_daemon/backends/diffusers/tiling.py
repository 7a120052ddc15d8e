"""Run a VAE over overlapping tiles and blend the results, as ComfyUI's tiled encode and decode do.

Three passes with tiles of different shapes are averaged, so that no pass's seams show. Pure tensor code: the model
is a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch

from ...core import BadRequest
from ...wire.messages import Tiling
from ..base import Step

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TileShape:
    """Tile width, height and overlap, in units of the input: pixels for encode, latents for decode."""

    x: int
    y: int
    overlap: int

    def merged(self, asked: Tiling) -> TileShape:
        """The shape with the caller's sizes in place of the defaults.

        Raises:
            BadRequest: a size for which the three passes are not defined.
        """
        sizes = {
            "tile_x": self.x if asked.tile_x is None else asked.tile_x,
            "tile_y": self.y if asked.tile_y is None else asked.tile_y,
        }
        overlap = self.overlap if asked.overlap is None else asked.overlap
        for name, size in sizes.items():
            # One pass uses tiles of half the size.
            if size < 2:
                raise BadRequest(f"{name} is {size}, must be at least 2")
            if not 0 <= overlap < size:
                raise BadRequest(f"overlap is {overlap}, must be at least 0 and smaller than {name} ({size})")
        return TileShape(sizes["tile_x"], sizes["tile_y"], overlap)

    def wide(self) -> TileShape:
        """The shape with twice the width and half the height."""
        return TileShape(self.x * 2, self.y // 2, self.overlap)

    def tall(self) -> TileShape:
        """The shape with half the width and twice the height."""
        return TileShape(self.x // 2, self.y * 2, self.overlap)


DECODE_TILES = TileShape(64, 64, 16)
ENCODE_TILES = TileShape(512, 512, 64)


def run_tiled(source: torch.Tensor, run: Run, shapes: list[TileShape], scale: float, step: Step) -> torch.Tensor:
    """Average one blended pass per shape.

    Args:
        source: ``[B,C,H,W]``.
        run: maps ``[1,C,h,w]`` to float32 ``[1,D,h*scale,w*scale]``, rounded down.
        shapes: the tile shape of each pass; results are summed in this order, which decides the last bit.
        scale: output size divided by input size: 8 for a decoder, 1/8 for an encoder.
        step: called with (done, total) before each tile.

    Returns:
        ``[B,D,H*scale,W*scale]`` float32 on the CPU.

    Raises:
        BadRequest: an overlap as large as a tile, or tiles that leave a gap.
    """
    height, width = source.shape[-2:]
    places = [
        list(product(tile_starts(height, shape.y, shape.overlap), tile_starts(width, shape.x, shape.overlap)))
        for shape in shapes
    ]
    total = source.shape[0] * sum(map(len, places))
    done = 0

    def counted(tile: torch.Tensor) -> torch.Tensor:
        nonlocal done
        step(done, total)
        done += 1
        return run(tile).to("cpu", torch.float32)

    result: torch.Tensor | None = None
    for shape, starts in zip(shapes, places, strict=True):
        rows = [_blend(source[i : i + 1], counted, shape, starts, scale) for i in range(source.shape[0])]
        blended = torch.cat(rows)
        result = blended if result is None else result.add_(blended)
    if result is None:
        raise ValueError("no tile shapes")
    return result.div_(len(shapes))


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Starts of the tiles along one axis; a single 0 if one tile covers the axis.

    Raises:
        BadRequest: the overlap is as large as the tile.
    """
    if size <= tile:
        return [0]
    if overlap >= tile:
        raise BadRequest(
            f"overlap is {overlap}, must be smaller than half of tile_x and of tile_y",
            "One of the three passes uses tiles of half the size",
        )
    return list(range(0, size - overlap, tile - overlap))


def _blend(
    source: torch.Tensor, run: Run, shape: TileShape, starts: list[tuple[int, int]], scale: float
) -> torch.Tensor:
    """One pass over one image ``[1,C,H,W]``."""
    height, width = source.shape[-2:]
    if height <= shape.y and width <= shape.x:
        return run(source)
    feather = round(scale * shape.overlap)
    total = weight = torch.empty(0)
    for top, left in starts:
        part = run(source[..., top : top + shape.y, left : left + shape.x])
        if not total.numel():
            total = torch.zeros(1, part.shape[1], round(scale * height), round(scale * width))
            weight = torch.zeros(1, 1, *total.shape[-2:])
        mask = _ramp(part.shape[-2], feather)[:, None] * _ramp(part.shape[-1], feather)
        y, x = round(scale * top), round(scale * left)
        area = (..., slice(y, y + part.shape[-2]), slice(x, x + part.shape[-1]))
        if total[area].shape[-2:] != mask.shape:
            raise _misfit(shape, scale)
        total[area] += part * mask
        weight[area] += mask
    if not bool((weight > 0).all()):
        raise _misfit(shape, scale)
    return total / weight


def _misfit(shape: TileShape, scale: float) -> BadRequest:
    """An encoder rounds its tiles' sizes, which leaves gaps or runs over the edge."""
    return BadRequest(
        f"tiles of {shape.x}x{shape.y} with overlap {shape.overlap} do not meet",
        f"Take tile sizes that are multiples of {round(2 / scale)}",
    )


def _ramp(size: int, feather: int) -> torch.Tensor:
    """Weights ``[size]`` in (0,1] that rise at the start and fall at the end over ``feather`` steps."""
    ramp = torch.ones(size)
    # A tile narrower than its feather keeps full weight.
    if 0 < feather < size:
        rise = torch.arange(1, feather + 1, dtype=torch.float64).div(feather).float()
        ramp[:feather] *= rise
        ramp[size - feather :] *= rise.flip(0)
    return ramp
