"""How the game looks: colours, and sprites of one cell."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from rqvae.games.maze import DOWN, LEFT, RIGHT, UP, Grid

Frame = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

CELL = 4
"""Pixels of a cell's side."""

FLOOR: Colour = (14, 16, 30)
WALL: Colour = (62, 82, 158)
WALL_LIT: Colour = (104, 130, 214)
DOT: Colour = (246, 220, 150)
PELLET: Colour = (255, 150, 120)
PLAYER: Colour = (98, 236, 148)
PLAYER_EYE: Colour = (10, 60, 40)
GHOST_EYE: Colour = (250, 250, 250)
GHOSTS: tuple[Colour, ...] = ((238, 70, 86), (240, 128, 40), (226, 104, 226), (70, 200, 240))
FRIGHTENED: Colour = (40, 40, 235)
RECOVERING: Colour = (170, 170, 250)


def draw_walls(walls: Grid) -> Frame:
    """Walls and floor (cells * 4, cells * 4, 3); a wall's upper edge is lit where the cell above is open."""
    big = walls.repeat(CELL, axis=0).repeat(CELL, axis=1)
    frame = np.where(big[..., None], np.array(WALL, dtype=np.uint8), np.array(FLOOR, dtype=np.uint8))
    lit = big & ~np.roll(big, 1, axis=0)
    frame[lit] = WALL_LIT
    return frame


def _sprite(rows: tuple[str, ...], colours: Mapping[str, Colour]) -> Frame:
    return np.array([[colours[mark] for mark in row] for row in rows], dtype=np.uint8)


def player_sprite(facing: int) -> Frame:
    """A round body whose dark eyes look where it goes."""
    sprite = _sprite((".##.", "####", "####", ".##."), {".": FLOOR, "#": PLAYER})
    eyes = {UP: ((1, 1), (1, 2)), DOWN: ((2, 1), (2, 2)), LEFT: ((1, 1), (2, 1)), RIGHT: ((1, 2), (2, 2))}
    for row, column in eyes[facing]:
        sprite[row, column] = PLAYER_EYE
    return sprite


def ghost_sprite(body: Colour) -> Frame:
    """A ghost with white eyes and a body of this colour."""
    return _sprite((".##.", "#oo#", "####", "#..#"), {".": FLOOR, "#": body, "o": GHOST_EYE})


def pellet_sprite() -> Frame:
    """A power pellet: larger than a dot and of another colour."""
    return _sprite((".##.", "####", "####", ".##."), {".": FLOOR, "#": PELLET})


def dot_sprite() -> Frame:
    """A dot of 2 x 2 pixels."""
    return _sprite(("....", ".##.", ".##.", "...."), {".": FLOOR, "#": DOT})


def floor_sprite() -> Frame:
    """An empty cell."""
    return _sprite(("....",) * CELL, {".": FLOOR})
