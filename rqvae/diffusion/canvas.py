"""Sampling a latent larger than the network's: every step another tiling, every position one step at a time.

DiffInfinite (Aversa et al. 2023, section 3.2) advances random patches and keeps a time for every position. Here the
patches of a step are a tiling at a random shift, and all of them read the state before the step: positions are advanced
once a step whatever the order of the patches, and no seam stays in its place from step to step.

Shapes: C channels, H W sides of the canvas, h w sides of a tile (the network's latent), B tiles of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rqvae.diffusion.denoiser import Denoiser
from rqvae.errors import BadInput
from rqvae.randomness import generator


@dataclass(frozen=True)
class Tile:
    """What the network sees, and what of it is kept.

    Args:
        top: first row of the window (h, w) on the canvas.
        left: first column of it.
        rows: first row that is kept, and the one after the last.
        columns: the same of columns.
    """

    top: int
    left: int
    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True)
class Tilings:
    """The tiling of each step, a function of (seed, step).

    Args:
        canvas: (H, W), at least the tile's sides.
        tile: (h, w).
        overlap: how many rows and columns a window sees beside what is kept of it, in both directions together.
        seed: of the shifts.
        shifted: false leaves every tiling where the first one is, for comparison.

    Raises:
        BadInput: a canvas smaller than a tile; an overlap that leaves nothing.
    """

    canvas: tuple[int, int]
    tile: tuple[int, int]
    overlap: int
    seed: int
    shifted: bool = True

    def __post_init__(self) -> None:
        if any(side < part for side, part in zip(self.canvas, self.tile, strict=True)):
            raise BadInput(f"canvas: expected sides of at least the tile's {self.tile}, got {self.canvas}")
        if not 0 <= self.overlap < min(self.tile):
            raise BadInput(f"overlap: expected a number in [0, {min(self.tile) - 1}], got {self.overlap}")

    def edges(self, step: int) -> tuple[list[int], list[int]]:
        """Rows and columns where what is kept begins anew, the first 0, the last the canvas's side."""
        host = generator(self.seed, "canvas shift", step)
        both = []
        for side, part in zip(self.canvas, self.tile, strict=True):
            stride = part - self.overlap
            shift = int(torch.randint(stride, (), generator=host)) if self.shifted else 0
            both.append([0, *range(shift or stride, side, stride), side])
        return both[0], both[1]

    def at(self, step: int) -> list[Tile]:
        """The tiles of a step, row by row; each position is kept by exactly one."""
        rows, columns = self.edges(step)
        return [
            Tile(self._start(top, bottom, 0), self._start(left, right, 1), (top, bottom), (left, right))
            for top, bottom in zip(rows, rows[1:], strict=False)
            for left, right in zip(columns, columns[1:], strict=False)
        ]

    def _start(self, first: int, end: int, axis: int) -> int:
        """Where the window around [first, end) begins: as much on either side, inside the canvas."""
        spare = self.tile[axis] - (end - first)
        return min(max(first - spare // 2, 0), self.canvas[axis] - self.tile[axis])


Order = Callable[[int, int], Sequence[int]]
"""(step, number of tiles) -> in which order they are computed; the result does not depend on it."""


@torch.no_grad()
def walk(
    noise_chw: Tensor,
    denoiser: Callable[[list[Tile]], Denoiser],
    times: Tensor,
    tilings: Tilings,
    batch_size: int,
    order: Order | None = None,
) -> tuple[Tensor, Tensor]:
    """DDIM without fresh noise (Song et al. 2021, eq. 12) over the canvas.

    Two states are kept, before and after the step, and the time index of each position.

    Args:
        noise_chw: (C, H, W) at `times[0]`.
        denoiser: of the windows of a batch of tiles.
        times: (steps + 1,) float64 on the host.
        tilings: which tiles there are.
        batch_size: tiles of one call; every call has as many, the last one's are filled up, so that floats do not
            depend on how the tiles fall into batches.
        order: of the tiles; None is row by row.

    Returns:
        (C, H, W) data, and (H, W) int64 how many steps each position has made.
    """
    before, after = noise_chw.clone(), torch.empty_like(noise_chw)
    index_hw = torch.zeros(noise_chw.shape[1:], dtype=torch.int64)
    h, w = tilings.tile
    for step, (t, until) in enumerate(zip(times[:-1], times[1:], strict=True)):
        tiles = tilings.at(step)
        for batch in _batches([tiles[i] for i in order(step, len(tiles))] if order else tiles, batch_size):
            full = [*batch, *[batch[-1]] * (batch_size - len(batch))]
            x = torch.stack([before[:, tile.top : tile.top + h, tile.left : tile.left + w] for tile in full])
            made = denoiser(full)
            data, eps = made.at(x, t, "x0", "eps")
            x = made.path.alpha(until).to(x) * data + made.path.sigma(until).to(x) * eps
            for tile, part in zip(batch, x, strict=False):
                (top, bottom), (left, right) = tile.rows, tile.columns
                inside = part[:, top - tile.top : bottom - tile.top, left - tile.left : right - tile.left]
                after[:, top:bottom, left:right] = inside
                index_hw[top:bottom, left:right] += 1
        before, after = after, before
    return before, index_hw


def _batches(tiles: list[Tile], size: int) -> Iterator[list[Tile]]:
    for first in range(0, len(tiles), size):
        yield tiles[first : first + size]
