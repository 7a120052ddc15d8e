"""Runs a VAE over overlapping tiles and blends the results, as ComfyUI's tiled encode and decode do.

Three passes with tiles of different shapes are averaged, which hides the seams of each pass.
"""

from __future__ import annotations

import functools
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
        """Replace the sizes that the caller asks for.

        Raises:
            BadRequest: the three passes are not defined for a size.
        """
        x = self.x if asked.tile_x is None else asked.tile_x
        y = self.y if asked.tile_y is None else asked.tile_y
        overlap = self.overlap if asked.overlap is None else asked.overlap
        for name, size in (("tile_x", x), ("tile_y", y)):
            if size < 2:  # one pass uses tiles of half the size
                raise BadRequest(f"{name} is {size}, must be at least 2")
            if not 0 <= overlap < size:
                raise BadRequest(f"overlap is {overlap}, must be at least 0 and smaller than {name} ({size})")
        return TileShape(x, y, overlap)

    def wide(self) -> TileShape:
        """Double the width and halve the height."""
        return TileShape(self.x * 2, self.y // 2, self.overlap)

    def tall(self) -> TileShape:
        """Halve the width and double the height."""
        return TileShape(self.x // 2, self.y * 2, self.overlap)


DECODE_TILES = TileShape(64, 64, 16)
ENCODE_TILES = TileShape(512, 512, 64)


def run_tiled(source: torch.Tensor, run: Run, shapes: list[TileShape], scale: float, step: Step) -> torch.Tensor:
    """Average one blended pass per shape.

    Args:
        source: ``[B,C,H,W]``.
        run: maps ``[1,C,h,w]`` to float32 ``[1,D,h*scale,w*scale]``, rounded down.
        shapes: the tile shape of each pass; the order of the passes is that of the sum, which the last bit depends on.
        scale: output size divided by input size: 8 for a decoder, 1/8 for an encoder.

    Returns:
        ``[B,D,H*scale,W*scale]`` float32 on the CPU.

    Raises:
        BadRequest: the overlap is as large as a tile, or the tiles leave a gap.
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

    passes = (
        torch.cat([_blend(source[i : i + 1], counted, shape, starts, scale) for i in range(source.shape[0])])
        for shape, starts in zip(shapes, places, strict=True)
    )
    return functools.reduce(torch.Tensor.add_, passes).div_(len(shapes))


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """List the starts of the tiles along one axis; a single 0 if one tile covers the axis.

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
    """Run one pass over one image ``[1,C,H,W]``."""
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
    """Make the error for tiles that leave gaps or run over the edge, since an encoder rounds their sizes."""
    return BadRequest(
        f"tiles of {shape.x}x{shape.y} with overlap {shape.overlap} do not meet",
        f"Use tile sizes that are multiples of {round(2 / scale)}",
    )


def _ramp(size: int, feather: int) -> torch.Tensor:
    """Make weights ``[size]`` in (0,1] that rise at the start and fall at the end over ``feather`` steps."""
    ramp = torch.ones(size)
    if 0 < feather < size:  # a tile narrower than its feather keeps full weight
        rise = torch.arange(1, feather + 1, dtype=torch.float64).div(feather).float()
        ramp[:feather] *= rise
        ramp[size - feather :] *= rise.flip(0)
    return ramp
