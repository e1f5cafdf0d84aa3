"""Where the player and the ghosts are in a frame, real or dreamed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rqvae.errors import BadInput
from rqvae.games.maze import MOVES
from rqvae.games.maze_chase import MazeChase
from rqvae.games.sprites import (
    CELL,
    FRIGHTENED,
    GHOSTS,
    RECOVERING,
    dot_sprite,
    floor_sprite,
    ghost_sprite,
    pellet_sprite,
    player_sprite,
)


@dataclass(frozen=True)
class Detections:
    """What was seen in N frames.

    Args:
        player: (N, open cells) bool, where the player was seen.
        ghosts: (N, open cells) bool, where a ghost was seen.
        cells: the number (row * cells + column) of each open cell.
    """

    player: npt.NDArray[np.bool_]
    ghosts: npt.NDArray[np.bool_]
    cells: npt.NDArray[np.int64]

    def player_cell(self) -> npt.NDArray[np.int64]:
        """(N,) the player's cell; -1 where none or more than one was seen."""
        cell = self.cells[self.player.argmax(1)]
        return np.where(self.player.sum(1) == 1, cell, -1)


class MazeDetector:
    """Names each open cell of a frame after the sprite that it is nearest to, by squared distance of its 48 numbers.

    Of a real frame this is exact; its error on real frames is part of every score it is used for (`error`).

    Args:
        game: whose maze and sprites these are.
    """

    def __init__(self, game: MazeChase) -> None:
        self.size, self.side = game.size, game.cells
        self.cells = np.array(sorted(game.ways), dtype=np.int64)
        others = [floor_sprite(), dot_sprite(), pellet_sprite()]
        players = [player_sprite(facing) for facing in MOVES]
        ghosts = [ghost_sprite(colour) for colour in (*GHOSTS, FRIGHTENED, RECOVERING)]
        templates = [*others, *players, *ghosts]
        self._templates = np.stack(templates).reshape(len(templates), -1).astype(np.float64)
        self._is_player = slice(len(others), len(others) + len(players))
        self._is_ghost = slice(len(others) + len(players), None)

    def __call__(self, frames_nhwc: npt.NDArray[np.uint8]) -> Detections:
        """Look at frames (N, size, size, 3) uint8.

        Raises:
            BadInput: frames of another size or type.
        """
        if frames_nhwc.dtype != np.uint8 or frames_nhwc.shape[1:] != (self.size, self.size, 3):
            raise BadInput(
                f"frames: expected uint8 (N, {self.size}, {self.size}, 3), got {frames_nhwc.dtype} {frames_nhwc.shape}"
            )
        count = len(frames_nhwc)
        tiles = frames_nhwc.reshape(count, self.side, CELL, self.side, CELL, 3).swapaxes(2, 3)
        tiles = tiles.reshape(count, self.side**2, 3 * CELL**2)[:, self.cells].astype(np.float64)
        # |x - t|^2 without |x|^2, which is the same for all templates
        scores = (self._templates**2).sum(1) - 2 * tiles @ self._templates.T
        nearest = scores.argmin(-1)
        names = np.arange(len(self._templates))
        player, ghost = names[self._is_player], names[self._is_ghost]
        return Detections(np.isin(nearest, player), np.isin(nearest, ghost), self.cells)

    def error(self, game: MazeChase, frames: int = 2000) -> float:
        """Share of real frames in which the player's cell or the ghosts' cells are not those of the state."""
        wrong, before = 0, game.clone_state()
        for k in range(frames):
            if k % 50 == 0 or game.clone_state().over:
                game.reset(k)
            frame = game.render()
            state, seen = game.clone_state(), self(frame[None])
            hidden = state.player in state.ghosts  # ghosts are drawn over the player
            player = -1 if hidden else state.player
            ghosts = {int(c) for c in self.cells[seen.ghosts[0]]}
            wrong += int(seen.player_cell()[0]) != player or ghosts != set(state.ghosts)
            game.step(k // 2 % len(game.action_names))
        game.restore_state(before)
        return wrong / frames
