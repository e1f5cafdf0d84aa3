"""The mazes: connected, with loops, without dead ends, with a tunnel from side to side.

Cells are numbered row * cells + column.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

Grid = npt.NDArray[np.bool_]

ACTION_NAMES: tuple[str, ...] = ("NOOP", "UP", "RIGHT", "LEFT", "DOWN")
NOOP, UP, RIGHT, LEFT, DOWN = range(5)
MOVES = {UP: (-1, 0), RIGHT: (0, 1), LEFT: (0, -1), DOWN: (1, 0)}
OPPOSITE = {NOOP: NOOP, UP: DOWN, RIGHT: LEFT, LEFT: RIGHT, DOWN: UP}


def find_ways(walls: Grid) -> dict[int, dict[int, int]]:
    """For each open cell the cell that each open direction leads to; the border wraps round, as tunnels do."""
    n = len(walls)
    return {
        int(r * n + c): {
            d: int((r + dr) % n * n + (c + dc) % n)
            for d, (dr, dc) in MOVES.items()
            if not walls[(r + dr) % n, (c + dc) % n]
        }
        for r, c in zip(*(~walls).nonzero(), strict=True)
    }


def find_distances(ways: dict[int, dict[int, int]]) -> dict[int, dict[int, int]]:
    """Steps between any two open cells: `distances[a][b]`, by breadth-first search."""
    distances = {}
    for start in ways:
        reached, edge = {start: 0}, [start]
        while edge:
            fresh = {there: reached[cell] + 1 for cell in edge for there in ways[cell].values() if there not in reached}
            reached |= fresh
            edge = list(fresh)
        distances[start] = reached
    return distances


@cache
def make_maze(cells: int, seed: int) -> Grid:
    """A maze (cells, cells), True where a wall is: connected, with loops, without dead ends, one tunnel.

    Inside its border it is the same upside down. Of several tries (64 for 8 x 8 cells, fewer for larger mazes) those
    where a tunnel is possible are kept, of these the one with the fewest open 2x2 blocks, and of those the one with
    the most junctions.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    tries = [_try_maze(cells, rng) for _ in range(max(1, 4096 // cells**2))]
    key = lambda maze: (not _tunnel_rows(maze), _open_blocks(maze).sum(), -_junctions(maze), maze.sum())  # noqa: E731
    walls = min(tries, key=key)
    for row in _tunnel_rows(walls)[:1]:
        walls[row, [0, -1]] = False
    walls.setflags(write=False)
    return walls


def _tunnel_rows(walls: Grid) -> list[int]:
    """Rows in which both outer corridors can be joined through the border, those near the middle first."""
    rows = np.flatnonzero(~walls[:, 1] & ~walls[:, -2])
    return sorted((int(row) for row in rows), key=lambda row: (abs(2 * row + 1 - len(walls)), row))


def _try_maze(cells: int, rng: np.random.Generator) -> Grid:
    """Open all cells inside the border, then close opposite pairs in random order wherever they break up an open 2x2
    block and leave neither a dead end nor two parts: what remains are mostly corridors one cell wide.

    Opposite means turned by 180 degrees: with a left-right mirror and an even width the middle corridor would be two
    cells wide.
    """
    walls = np.ones((cells, cells), dtype=np.bool_)
    walls[1:-1, 1:-1] = False
    pairs = [(r, c) for r in range(1, cells - 1) for c in range(1, cells - 1)]
    for _, (r, c) in sorted((rng.random(), pair) for pair in pairs):
        if not _open_blocks(walls)[r - 1 : r + 1, c - 1 : c + 1].any():
            continue
        pair = [r, cells - 1 - r], [c, cells - 1 - c]
        walls[pair] = True
        walls[pair] = _is_playable(walls)
    return walls


def _open_blocks(walls: Grid) -> Grid:
    """(cells - 1, cells - 1): whether the 2x2 block with this upper left cell is open."""
    return ~(walls[:-1, :-1] | walls[1:, :-1] | walls[:-1, 1:] | walls[1:, 1:])


def _junctions(walls: Grid) -> int:
    return sum(len(way) > 2 for way in find_ways(walls).values())


def _is_playable(walls: Grid) -> bool:
    """Whether every open cell has two ways or more and all are reached from one."""
    ways = find_ways(walls)
    if any(len(way) < 2 for way in ways.values()):
        return False
    seen, edge = set(), [next(iter(ways))]
    while edge:
        cell = edge.pop()
        if cell not in seen:
            seen.add(cell)
            edge.extend(ways[cell].values())
    return len(seen) == len(ways)
