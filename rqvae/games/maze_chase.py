"""MazeChase: our own small maze game, exact to the pixel and to the last bit of its generator.

A player eats dots in a maze of corridors with loops and a tunnel while ghosts chase; a power pellet turns the chase
round for a while. Everything that decides the next frame is in :class:`MazeState`, so that a state can be forked and
every action tried from it: that is what measures whether a world model obeys its controls. Frames are lossless and one
token of a patch-4 model is one cell of the maze.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rqvae.errors import BadInput
from rqvae.games.maze import ACTION_NAMES, MOVES, NOOP, OPPOSITE, find_distances, find_ways, make_maze
from rqvae.games.sprites import (
    CELL,
    FRIGHTENED,
    GHOSTS,
    RECOVERING,
    Frame,
    dot_sprite,
    draw_walls,
    floor_sprite,
    ghost_sprite,
    pellet_sprite,
    player_sprite,
)

DOTS = 0.8
"""Share of the open cells that hold a dot at first. With a dot in each, 7 of 10 frames of the val and test
episodes of a 32-pixel recording of 20,000 frames also occur in its train episodes; so, 4 to 5."""

CHASE = 0.5
"""Share of a ghost's choices that lead towards the player, or away when it is frightened; the others are random."""

FLASH = 4
"""Last steps of a fright, in which the ghost is drawn in a paler colour: how long it lasts can be seen."""

DOT_REWARD, GHOST_REWARD = 1.0, 5.0


@dataclass(frozen=True)
class MazeState:
    """Everything that decides what comes next. Cells are numbered row * cells + column.

    Args:
        maze: (cells per side, maze seed): which maze the state belongs to.
        player: the player's cell.
        facing: the direction in which the player goes on.
        ghosts: each ghost's cell.
        headings: each ghost's direction, NOOP before its first move.
        frightened: for how many steps each ghost still flees, 0 where it chases.
        dots: one byte a cell, 1 where a dot is left, 2 where a power pellet is.
        caught: how often the player was caught since the reset.
        steps: steps since the reset.
        over: whether the episode has ended.
        generator: state of the numpy bit generator.
    """

    maze: tuple[int, int]
    player: int
    facing: int
    ghosts: tuple[int, ...]
    headings: tuple[int, ...]
    frightened: tuple[int, ...]
    dots: bytes
    caught: int
    steps: int
    over: bool
    generator: Mapping[str, Any]


class MazeChase:
    """The game, in the spirit of Gymnasium: `reset` and `step`.

    The player keeps its direction: NOOP goes on, an action turns at once if the way is open and is ignored if a wall is
    there, and a player that runs into a wall stands. A dot or a power pellet is worth 1. A pellet frightens all ghosts
    for 1.5 steps a cell of the maze's side: they flee at half speed, and one that is met is worth 5 and starts anew at
    the far end. A ghost that is not frightened catches the player (same cell, or cells swapped): it loses a life, and
    while one is left it starts anew on the open cell that is farthest from all ghosts. The episode is terminated with
    the last life or when nothing is left to eat, and truncated after `max_steps`.

    Args:
        size: side of the frame in pixels, a multiple of 4 and at least 32; a cell is 4 pixels.
        num_ghosts: how many ghosts, at least 1.
        max_steps: steps after which an episode is cut.
        seed: of the first episode; `reset(seed)` seeds another.
        lives: how often the player must be caught. Of no other effect on the frames: until the first catch the same
            seed and actions give the same ones.
        maze_seed: of the maze. It is no part of `seed`, so that all recordings of a size show one maze unless asked
            otherwise, and a model trained on one of them knows the others.

    Raises:
        BadInput: an argument out of its range.
    """

    action_names = ACTION_NAMES
    version = 2
    """Changes when the same seed and actions would give other frames."""

    def __init__(
        self,
        size: int = 32,
        num_ghosts: int = 1,
        max_steps: int = 400,
        seed: int = 0,
        maze_seed: int = 0,
        lives: int = 1,
    ) -> None:
        if size < 8 * CELL or size % CELL:
            raise BadInput(f"size: expected a multiple of {CELL} that is at least {8 * CELL}, got {size}")
        if num_ghosts < 1:
            raise BadInput(f"num_ghosts: expected at least 1, got {num_ghosts}")
        if max_steps < 1:
            raise BadInput(f"max_steps: expected at least 1, got {max_steps}")
        if lives < 1:
            raise BadInput(f"lives: expected at least 1, got {lives}")
        self.size, self.num_ghosts, self.max_steps, self.lives = size, num_ghosts, max_steps, lives
        self.cells = size // CELL
        self.fright = 3 * self.cells // 2
        self.maze = (self.cells, maze_seed)
        self.walls = make_maze(*self.maze)
        self.ways = find_ways(self.walls)
        self._distances = find_distances(self.ways)
        self._open = sorted(self.ways)
        self.pellets = self._place_pellets()
        self._empty = draw_walls(self.walls)
        self._food_sprites = (floor_sprite(), dot_sprite(), pellet_sprite())
        self._player_sprites = {facing: player_sprite(facing) for facing in MOVES}
        self._ghost_sprites = [ghost_sprite(GHOSTS[i % len(GHOSTS)]) for i in range(num_ghosts)]
        self._fright_sprites = (ghost_sprite(RECOVERING), ghost_sprite(FRIGHTENED))
        self.reset(seed)

    def reset(self, seed: int) -> Frame:
        """Start the episode of `seed` (>= 0): player on any open cell, ghosts far from it. Returns its first frame."""
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._player = self._pick(self._open)
        far = sorted(self._open, key=self._distance)[-max(1, len(self._open) // 4) :]
        self._ghosts = [self._pick(far) for _ in range(self.num_ghosts)]
        self._facing = self._pick(list(self.ways[self._player]))
        self._headings = [NOOP] * self.num_ghosts
        self._frightened = [0] * self.num_ghosts
        self._caught, self._steps, self._over = 0, 0, False
        self._dots = bytearray(self.cells**2)
        for cell in self._open:
            self._dots[cell] = self._rng.random() < DOTS and cell != self._player
        for cell in self.pellets:
            self._dots[cell] = 2 * (cell != self._player)
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
        self._facing, self._player = self._after(action)
        reward = self._eat()
        caught, bonus = self._move_ghosts(before)
        self._steps += 1
        self._caught += caught
        if caught and self._caught < self.lives:
            reward += self._start_anew()
        terminated = bool(self._caught >= self.lives or not any(self._dots))
        truncated = not terminated and self._steps >= self.max_steps
        self._over = terminated or truncated
        return self.render(), reward + bonus, terminated, truncated

    def render(self) -> Frame:
        """The frame of the present state, (size, size, 3) uint8, a new array."""
        frame = self._canvas.copy()
        self._blit(frame, self._player, self._player_sprites[self._facing])
        for i, cell in enumerate(self._ghosts):
            left = self._frightened[i]
            self._blit(frame, cell, self._fright_sprites[left > FLASH] if left else self._ghost_sprites[i])
        return frame

    def clone_state(self) -> MazeState:
        """The complete state, generator included; later steps do not change it."""
        return MazeState(
            maze=self.maze,
            player=self._player,
            facing=self._facing,
            ghosts=tuple(self._ghosts),
            headings=tuple(self._headings),
            frightened=tuple(self._frightened),
            dots=bytes(self._dots),
            caught=self._caught,
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
        self._frightened, self._dots = list(state.frightened), bytearray(state.dots)
        self._caught, self._steps, self._over = state.caught, state.steps, state.over
        self._rng = np.random.Generator(np.random.PCG64())
        self._rng.bit_generator.state = state.generator
        self._paint()

    def is_safe(self, action: int) -> bool:
        """Whether no ghost can catch the player in a step with `action`."""
        _, there = self._after(action)
        if self._dots[there] == 2:
            return True
        chasing = [ghost for ghost, left in zip(self._ghosts, self._frightened, strict=True) if not left]
        return not any(ghost == there or there in self.ways[ghost].values() for ghost in chasing)

    def may_be_caught(self, actions: Sequence[int]) -> bool:
        """Whether the ghosts could catch the player while it plays `actions`, whatever they draw. Changes nothing."""
        before, caught = self.clone_state(), False
        # what each ghost may be by now: cell, heading, steps it still flees
        ghosts = [{each} for each in zip(self._ghosts, self._headings, self._frightened, strict=True)]
        for action in actions:
            came_from = self._player
            self._facing, self._player = self._after(action)
            if self._dots[self._player] == 2:
                ghosts = [{(cell, heading, self.fright) for cell, heading, _ in each} for each in ghosts]
            self._dots[self._player] = 0
            moved = [[self._moves(*one, came_from) for one in each] for each in ghosts]
            caught |= any(danger for each in moved for _, danger in each)
            ghosts = [set().union(*(after for after, _ in each)) for each in moved]
        self.restore_state(before)
        return caught

    def _moves(self, cell: int, heading: int, left: int, came_from: int) -> tuple[set[tuple[int, int, int]], bool]:
        """What a ghost may be after a step of the player, and whether it may catch it: the rules of `_move_ghosts`."""
        ways = self.ways[cell]
        moves = {(cell, heading)} if left % 2 else {(ways[d], d) for d in ways if d != OPPOSITE[heading]}
        after, danger = set(), False
        for there, towards in moves:
            met = there == self._player or (there == came_from and cell == self._player)
            danger |= met and not left
            if met and left:
                after.add((max(self._open, key=lambda c: (self._distance(c), c)), NOOP, 0))
            else:
                after.add((there, towards, max(0, left - 1)))
        return after, danger

    def food_distance(self, action: int) -> int:
        """Steps that `action` and the shortest way from there to something to eat take; cells ** 2 where none is."""
        _, there = self._after(action)
        steps = [self._distances[there][cell] for cell in self._open if self._dots[cell]]
        return 1 + min(steps, default=self.cells**2 - 1)

    def fingerprint(self) -> str:
        """sha256 of 500 steps of scripted play: what the evaluation of a world model is tied to."""
        rules = (self.version, self.maze, self.num_ghosts, *([self.lives] if self.lives > 1 else []))
        state, digest = self.clone_state(), hashlib.sha256(repr(rules).encode())
        digest.update(self.reset(0).tobytes())
        for k in range(500):
            frame, reward, terminated, truncated = self.step((k // 3) % len(ACTION_NAMES))
            digest.update(frame.tobytes() + np.float64(reward).tobytes())
            if terminated or truncated:
                self.reset(k)
        self.restore_state(state)
        return digest.hexdigest()

    def _place_pellets(self) -> tuple[int, ...]:
        """The open cells nearest to two opposite corners, of large mazes to all four."""
        last = self.cells - 1
        corners = [(0, 0), (last, last), (0, last), (last, 0)][: 2 if self.cells < 12 else 4]
        return tuple(
            min(self._open, key=lambda cell: (abs(cell // self.cells - r) + abs(cell % self.cells - c), cell))  # noqa: B023
            for r, c in corners
        )

    def _pick(self, cells: list[int]) -> int:
        # Only `random()`: of numpy's generator methods it alone is 53 raw bits, without an algorithm that may change.
        return cells[int(self._rng.random() * len(cells))]

    def _distance(self, cell: int) -> int:
        """Steps from `cell` to the player without walls: a ghost that knew the way would catch a beginner at once."""
        (r0, c0), (r1, c1) = divmod(cell, self.cells), divmod(self._player, self.cells)
        return abs(r0 - r1) + abs(c0 - c1)

    def _after(self, action: int) -> tuple[int, int]:
        """Direction and cell of the player after `action`."""
        ways = self.ways[self._player]
        facing = action if action in ways else self._facing
        return facing, ways.get(facing, self._player)

    def _eat(self) -> float:
        food = self._dots[self._player]
        if not food:
            return 0.0
        if food == 2:
            self._frightened = [self.fright] * self.num_ghosts
        self._dots[self._player] = 0
        self._blit(self._canvas, self._player, self._food_sprites[0])
        return DOT_REWARD

    def _start_anew(self) -> float:
        """The caught player goes where no ghost is near, by a rule without chance; what it eats there."""
        ghosts = [divmod(ghost, self.cells) for ghost in self._ghosts]

        def nearest(cell: int) -> int:
            row, column = divmod(cell, self.cells)
            return min(abs(row - r) + abs(column - c) for r, c in ghosts)

        self._player = max(self._open, key=lambda cell: (nearest(cell), cell))
        self._facing = min(self.ways[self._player])
        return self._eat()

    def _move_ghosts(self, player_before: int) -> tuple[bool, float]:
        """Move every ghost; whether one caught the player, who came from `player_before`, and what was eaten."""
        caught, bonus = False, 0.0
        for i, cell in enumerate(self._ghosts):
            left = self._frightened[i]
            there = cell if left % 2 else self._move_ghost(i)
            self._frightened[i] = max(0, left - 1)
            if there != self._player and not (there == player_before and cell == self._player):
                continue
            if left:
                bonus += GHOST_REWARD
                self._ghosts[i] = max(self._open, key=lambda c: (self._distance(c), c))
                self._headings[i], self._frightened[i] = NOOP, 0
            caught |= not left
        return caught, bonus

    def _move_ghost(self, i: int) -> int:
        ways = self.ways[self._ghosts[i]]
        forward = [d for d in ways if d != OPPOSITE[self._headings[i]]]
        if self._rng.random() < CHASE:
            towards = -1 if self._frightened[i] else 1
            heading = min(forward, key=lambda d: towards * self._distance(ways[d]))
        else:
            heading = self._pick(forward)
        self._ghosts[i], self._headings[i] = ways[heading], heading
        return ways[heading]

    def _paint(self) -> None:
        """Walls and the food that is left."""
        self._canvas = self._empty.copy()
        for cell, food in enumerate(self._dots):
            if food:
                self._blit(self._canvas, cell, self._food_sprites[food])

    def _blit(self, frame: Frame, cell: int, sprite: Frame) -> None:
        row, column = divmod(cell, self.cells)
        frame[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = sprite
