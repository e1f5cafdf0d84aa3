"""MazeChase: our own small maze game, exact to the pixel and to the last bit of its generator.

A player eats dots in a maze of corridors with loops while ghosts follow. Everything that decides the next frame is in
:class:`MazeState`, so that a state can be forked and every action tried from it: that is what measures whether a world
model obeys its controls. Frames are lossless and one token of a patch-4 model is one cell of the maze.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from rqvae.errors import BadInput

Frame = npt.NDArray[np.uint8]
Grid = npt.NDArray[np.bool_]
Colour = tuple[int, int, int]

ACTION_NAMES: tuple[str, ...] = ("NOOP", "UP", "RIGHT", "LEFT", "DOWN")
NOOP, UP, RIGHT, LEFT, DOWN = range(5)
MOVES = {UP: (-1, 0), RIGHT: (0, 1), LEFT: (0, -1), DOWN: (1, 0)}
OPPOSITE = {NOOP: NOOP, UP: DOWN, RIGHT: LEFT, LEFT: RIGHT, DOWN: UP}

CELL = 4
"""Pixels of a cell's side."""

FLOOR: Colour = (14, 16, 30)
WALL: Colour = (62, 82, 158)
WALL_LIT: Colour = (104, 130, 214)
DOT: Colour = (246, 220, 150)
PLAYER: Colour = (98, 236, 148)
PLAYER_EYE: Colour = (10, 60, 40)
GHOST_EYE: Colour = (250, 250, 250)
GHOSTS: tuple[Colour, ...] = ((238, 70, 86), (240, 128, 40), (226, 104, 226), (70, 200, 240))

DOTS = 0.8
"""Share of the open cells that hold a dot at first. With a dot in each, 7 of 10 frames of the val and test
episodes of a 32-pixel recording of 20,000 frames also occur in its train episodes; so, 4 to 5."""

CHASE = 0.5
"""Share of a ghost's choices that lead towards the player; the others are random."""


@dataclass(frozen=True)
class MazeState:
    """Everything that decides what comes next. Cells are numbered row * cells + column.

    Args:
        maze: (cells per side, maze seed): which maze the state belongs to.
        player: the player's cell.
        facing: the direction in which the player goes on.
        ghosts: each ghost's cell.
        headings: each ghost's direction, NOOP before its first move.
        dots: one byte a cell, 1 where a dot is left.
        steps: steps since the reset.
        over: whether the episode has ended.
        generator: state of the numpy bit generator.
    """

    maze: tuple[int, int]
    player: int
    facing: int
    ghosts: tuple[int, ...]
    headings: tuple[int, ...]
    dots: bytes
    steps: int
    over: bool
    generator: Mapping[str, Any]


class MazeChase:
    """The game, in the spirit of Gymnasium: `reset` and `step`.

    The player keeps its direction: NOOP goes on, an action turns at once if the way is open and is ignored if a wall is
    there, and a player that runs into a wall stands. Each dot is worth 1. The episode is terminated when a ghost
    catches the player (same cell, or cells swapped) or no dot is left, and truncated after `max_steps`.

    Args:
        size: side of the frame in pixels, a multiple of 4 and at least 32; a cell is 4 pixels.
        num_ghosts: how many ghosts, at least 1.
        max_steps: steps after which an episode is cut.
        seed: of the first episode; `reset(seed)` seeds another.
        maze_seed: of the maze. It is no part of `seed`, so that all recordings of a size show one maze unless asked
            otherwise, and a model trained on one of them knows the others.

    Raises:
        BadInput: an argument out of its range.
    """

    action_names = ACTION_NAMES
    version = 1
    """Changes when the same seed and actions would give other frames."""

    def __init__(
        self, size: int = 32, num_ghosts: int = 1, max_steps: int = 400, seed: int = 0, maze_seed: int = 0
    ) -> None:
        if size < 8 * CELL or size % CELL:
            raise BadInput(f"size: expected a multiple of {CELL} that is at least {8 * CELL}, got {size}")
        if num_ghosts < 1:
            raise BadInput(f"num_ghosts: expected at least 1, got {num_ghosts}")
        if max_steps < 1:
            raise BadInput(f"max_steps: expected at least 1, got {max_steps}")
        self.size, self.num_ghosts, self.max_steps = size, num_ghosts, max_steps
        self.cells = size // CELL
        self.maze = (self.cells, maze_seed)
        self.walls = make_maze(*self.maze)
        self._ways = _ways(self.walls)
        self._open = [int(i) for i in np.flatnonzero(~self.walls)]
        self._empty = _draw_walls(self.walls)
        self._player_sprites = {facing: _player_sprite(facing) for facing in MOVES}
        self._ghost_sprites = [_ghost_sprite(GHOSTS[i % len(GHOSTS)]) for i in range(num_ghosts)]
        self.reset(seed)

    def reset(self, seed: int) -> Frame:
        """Start the episode of `seed` (>= 0): player on any open cell, ghosts far from it. Returns its first frame."""
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._player = self._pick(self._open)
        far = sorted(self._open, key=self._distance)[-max(1, len(self._open) // 4) :]
        self._ghosts = [self._pick(far) for _ in range(self.num_ghosts)]
        self._facing = self._pick(list(self._ways[self._player]))
        self._headings = [NOOP] * self.num_ghosts
        self._steps, self._over = 0, False
        self._dots = bytearray(self.cells**2)
        for cell in self._open:
            self._dots[cell] = self._rng.random() < DOTS and cell != self._player
        self._paint()
        return self.render()

    def step(self, action: int) -> tuple[Frame, float, bool, bool]:
        """Play one step.

        Args:
            action: index into `ACTION_NAMES`.

        Returns:
            The new frame (size, size, 3) uint8, the reward, whether the episode is terminated, whether it is truncated.

        Raises:
            BadInput: an unknown action.
            RuntimeError: the episode is over.
        """
        if not 0 <= action < len(ACTION_NAMES):
            raise BadInput(f"action: expected 0 to {len(ACTION_NAMES) - 1}, got {action}")
        if self._over:
            raise RuntimeError("MazeChase.step: the episode is over, reset it first")
        before = self._player
        self._move_player(action)
        reward = self._eat()
        caught = self._move_ghosts(before)
        self._steps += 1
        terminated = bool(caught or not any(self._dots))
        truncated = not terminated and self._steps >= self.max_steps
        self._over = terminated or truncated
        return self.render(), reward, terminated, truncated

    def render(self) -> Frame:
        """The frame of the present state, (size, size, 3) uint8, a new array."""
        frame = self._canvas.copy()
        self._blit(frame, self._player, self._player_sprites[self._facing])
        for cell, sprite in zip(self._ghosts, self._ghost_sprites, strict=True):
            self._blit(frame, cell, sprite)
        return frame

    def clone_state(self) -> MazeState:
        """The complete state, generator included; later steps do not change it."""
        return MazeState(
            maze=self.maze,
            player=self._player,
            facing=self._facing,
            ghosts=tuple(self._ghosts),
            headings=tuple(self._headings),
            dots=bytes(self._dots),
            steps=self._steps,
            over=self._over,
            generator=self._rng.bit_generator.state,
        )

    def restore_state(self, state: MazeState) -> None:
        """Go back to `state`: the same actions then give the same frames.

        Raises:
            BadInput: a state of another maze or of another number of ghosts.
        """
        here, there = (self.maze, self.num_ghosts), (state.maze, len(state.ghosts))
        if here != there:
            raise BadInput(f"state: expected ((cells, maze seed), ghosts) = {here}, got {there}")
        self._player, self._facing = state.player, state.facing
        self._ghosts, self._headings = list(state.ghosts), list(state.headings)
        self._dots = bytearray(state.dots)
        self._steps, self._over = state.steps, state.over
        self._rng = np.random.Generator(np.random.PCG64())
        self._rng.bit_generator.state = state.generator
        self._paint()

    def is_safe(self, action: int) -> bool:
        """Whether no ghost can catch the player in a step with `action`."""
        ways = self._ways[self._player]
        there = ways.get(action if action in ways else self._facing, self._player)
        return not any(ghost == there or there in self._ways[ghost].values() for ghost in self._ghosts)

    def _pick(self, cells: list[int]) -> int:
        # Only `random()`: of numpy's generator methods it alone is 53 raw bits, without an algorithm that may change.
        return cells[int(self._rng.random() * len(cells))]

    def _distance(self, cell: int) -> int:
        """Steps from `cell` to the player without walls."""
        (r0, c0), (r1, c1) = divmod(cell, self.cells), divmod(self._player, self.cells)
        return abs(r0 - r1) + abs(c0 - c1)

    def _move_player(self, action: int) -> None:
        ways = self._ways[self._player]
        if action in ways:
            self._facing = action
        self._player = ways.get(self._facing, self._player)

    def _eat(self) -> float:
        if not self._dots[self._player]:
            return 0.0
        self._dots[self._player] = 0
        self._fill(self._player)
        return 1.0

    def _move_ghosts(self, player_before: int) -> bool:
        """Move every ghost; returns whether one caught the player, who came from `player_before`."""
        caught = False
        for i, cell in enumerate(self._ghosts):
            ways = self._ways[cell]
            forward = [d for d in ways if d != OPPOSITE[self._headings[i]]]
            if self._rng.random() < CHASE:
                heading = min(forward, key=lambda d: self._distance(ways[d]))  # noqa: B023  (called at once)
            else:
                heading = self._pick(forward)
            self._ghosts[i], self._headings[i] = ways[heading], heading
            swapped = ways[heading] == player_before and cell == self._player
            caught |= swapped or ways[heading] == self._player
        return caught

    def _paint(self) -> None:
        """Walls and the dots that are left."""
        self._canvas = self._empty.copy()
        for cell, dot in enumerate(self._dots):
            if dot:
                row, column = divmod(cell, self.cells)
                self._canvas[row * CELL + 1 : row * CELL + 3, column * CELL + 1 : column * CELL + 3] = DOT

    def _fill(self, cell: int) -> None:
        row, column = divmod(cell, self.cells)
        self._canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = FLOOR

    def _blit(self, frame: Frame, cell: int, sprite: Frame) -> None:
        row, column = divmod(cell, self.cells)
        frame[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = sprite


def _ways(walls: Grid) -> dict[int, dict[int, int]]:
    """For each open cell the cell that each open direction leads to."""
    n = len(walls)
    return {
        r * n + c: {d: (r + dr) * n + c + dc for d, (dr, dc) in MOVES.items() if not walls[r + dr, c + dc]}
        for r, c in zip(*(~walls).nonzero(), strict=True)
    }


@cache
def make_maze(cells: int, seed: int) -> Grid:
    """A maze (cells, cells), True where a wall is: connected, with loops, without dead ends, the same upside down.

    Of several tries (64 for 8 x 8 cells, fewer for larger mazes) the one with the fewest open 2x2 blocks is kept, and
    of those the one with the most junctions.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    tries = [_try_maze(cells, rng) for _ in range(max(1, 4096 // cells**2))]
    walls = min(tries, key=lambda maze: (_open_blocks(maze).sum(), -_junctions(maze), maze.sum()))
    walls.setflags(write=False)
    return walls


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
    return sum(len(way) > 2 for way in _ways(walls).values())


def _is_playable(walls: Grid) -> bool:
    """Whether every open cell has two ways or more and all are reached from one."""
    ways = _ways(walls)
    if any(len(way) < 2 for way in ways.values()):
        return False
    seen, edge = set(), [next(iter(ways))]
    while edge:
        cell = edge.pop()
        if cell not in seen:
            seen.add(cell)
            edge.extend(ways[cell].values())
    return len(seen) == len(ways)


def _draw_walls(walls: Grid) -> Frame:
    """Walls and floor (cells * 4, cells * 4, 3); a wall's upper edge is lit where the cell above is open."""
    big = walls.repeat(CELL, axis=0).repeat(CELL, axis=1)
    frame = np.where(big[..., None], np.array(WALL, dtype=np.uint8), np.array(FLOOR, dtype=np.uint8))
    lit = big & ~np.roll(big, 1, axis=0)
    frame[lit] = WALL_LIT
    return frame


def _sprite(rows: tuple[str, ...], colours: Mapping[str, Colour]) -> Frame:
    return np.array([[colours[mark] for mark in row] for row in rows], dtype=np.uint8)


def _player_sprite(facing: int) -> Frame:
    """A round body whose dark eyes look where it goes."""
    sprite = _sprite((".##.", "####", "####", ".##."), {".": FLOOR, "#": PLAYER})
    eyes = {UP: ((1, 1), (1, 2)), DOWN: ((2, 1), (2, 2)), LEFT: ((1, 1), (2, 1)), RIGHT: ((1, 2), (2, 2))}
    for row, column in eyes[facing]:
        sprite[row, column] = PLAYER_EYE
    return sprite


def _ghost_sprite(body: Colour) -> Frame:
    return _sprite((".##.", "#oo#", "####", "#..#"), {".": FLOOR, "#": body, "o": GHOST_EYE})
