"""Tiles and their blending, with functions that need no model."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from luna_daemon.backends.diffusers.tiling import DECODE_TILES, ENCODE_TILES, TileShape, run_tiled, tile_starts  # noqa: E402
from luna_daemon.core import BadRequest, RequestCancelled  # noqa: E402
from luna_daemon.wire.messages import Tiling  # noqa: E402


def upscale(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(x * 2 + 1, scale_factor=8, mode="nearest")


def downscale(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(x, 8)


def passes(shape: TileShape) -> list[TileShape]:
    return [shape.tall(), shape.wide(), shape]


def ignore(done: int, total: int) -> None:
    pass


def test_defaults_are_comfyuis() -> None:
    assert TileShape(64, 64, 16) == DECODE_TILES
    assert TileShape(512, 512, 64) == ENCODE_TILES


@pytest.mark.parametrize("size", [(16, 16), (40, 23), (33, 70)])
@pytest.mark.parametrize("overlap", [0, 3, 5])
def test_tiled_equals_plain_for_a_pointwise_function(size: tuple[int, int], overlap: int) -> None:
    source = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    tiled = run_tiled(source, upscale, passes(TileShape(16, 16, overlap)), 8.0, ignore)
    torch.testing.assert_close(tiled, upscale(source), rtol=1e-6, atol=1e-6)


def test_encode_scale() -> None:
    source = torch.rand(1, 3, 200, 136, generator=torch.Generator().manual_seed(0))
    tiled = run_tiled(source, downscale, passes(TileShape(64, 64, 16)), 1 / 8, ignore)
    torch.testing.assert_close(tiled, downscale(source), rtol=1e-6, atol=1e-6)


def test_two_tiles_blend_along_a_ramp() -> None:
    """Tile 0 answers 0, tile 1 answers 1: the overlap of 4 rises by the two ramps' weights."""
    answers = iter([0.0, 1.0])
    one_pass = [TileShape(8, 8, 4)]
    result = run_tiled(torch.zeros(1, 1, 8, 12), lambda x: torch.full_like(x, next(answers)), one_pass, 1.0, ignore)
    rising, falling = torch.tensor([1, 2, 3, 4]) / 4, torch.tensor([4, 3, 2, 1]) / 4
    expected = torch.cat([torch.zeros(4), rising / (rising + falling), torch.ones(4)])
    torch.testing.assert_close(result[0, 0], expected.expand(8, 12))


def test_progress_counts_every_tile_of_every_pass_and_image() -> None:
    steps: list[tuple[int, int]] = []
    calls = 0

    def run(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        assert len(steps) == calls  # told before it runs
        return x

    run_tiled(torch.zeros(2, 1, 20, 40), run, passes(TileShape(16, 16, 4)), 1.0, lambda d, t: steps.append((d, t)))
    # Per image: tall 8x32 has 1 x 9 tiles, wide 32x8 has 4 x 2, square has 2 x 3.
    assert calls == 2 * (9 + 8 + 6)
    assert steps == [(i, calls) for i in range(calls)]


def test_leaving_between_tiles_stops_the_work() -> None:
    def leave(done: int, total: int) -> None:
        if done == 2:
            raise RequestCancelled("gone")

    with pytest.raises(RequestCancelled):
        run_tiled(torch.zeros(1, 1, 64, 64), lambda x: x, passes(TileShape(16, 16, 4)), 1.0, leave)


def test_tile_starts() -> None:
    assert tile_starts(64, 64, 16) == [0]
    assert tile_starts(65, 64, 16) == [0, 48]
    assert tile_starts(100, 40, 10) == [0, 30, 60]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (Tiling(tile_x=0), "tile_x is 0"),
        (Tiling(tile_x=1), "tile_x is 1"),
        (Tiling(tile_y=-8), "tile_y is -8"),
        (Tiling(overlap=-1), "overlap is -1"),
        (Tiling(tile_x=32, tile_y=32, overlap=32), "overlap is 32"),
    ],
)
def test_bad_sizes_are_named(asked: Tiling, named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        DECODE_TILES.merged(asked)


def test_given_sizes_replace_defaults() -> None:
    assert DECODE_TILES.merged(Tiling(tile_x=32)) == TileShape(32, 64, 16)


def test_overlap_of_half_a_tile_is_refused_where_a_pass_could_not_advance() -> None:
    shapes = passes(TileShape(32, 32, 16))
    with pytest.raises(BadRequest, match="overlap is 16"):
        run_tiled(torch.zeros(1, 1, 40, 40), lambda x: x, shapes, 1.0, ignore)
    run_tiled(torch.zeros(1, 1, 16, 16), lambda x: x, shapes, 1.0, ignore)


@pytest.mark.parametrize("ceil", [False, True])
def test_tiles_that_do_not_meet_are_an_error_and_not_a_nan(ceil: bool) -> None:
    """Some encoders round a tile's size down, which leaves a gap, others up, which runs over the edge."""

    def shrink(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x, 8, ceil_mode=ceil)

    with pytest.raises(BadRequest, match="44x44 with overlap 0 do not meet"):
        run_tiled(torch.zeros(1, 1, 88, 88), shrink, [TileShape(44, 44, 0)], 1 / 8, ignore)
