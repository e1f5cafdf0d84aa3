"""Players that need no training: what a recording is played by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from rqvae.errors import BadInput


class Playable(Protocol):
    """What a policy may ask of the game."""

    def is_safe(self, action: int) -> bool:
        """Whether `action` cannot end the episode at once."""

    def food_distance(self, action: int) -> int:
        """Steps to the next thing to eat if `action` is played now."""


class Policy(Protocol):
    """A player."""

    def act(self, game: Playable) -> int:
        """The next action."""


class PersistentRandom:
    """Draws an action, keeps it for a while, draws again.

    A player that draws at every step trembles on the spot and sees little of the maze; one that holds its direction
    walks corridors to their end.

    Args:
        num_actions: actions are drawn uniformly from 0 to `num_actions` - 1.
        seed: of the sequence of actions, >= 0.
        shortest: fewest steps an action is kept.
        longest: most steps an action is kept.
        care: probability, per step, of looking out for danger (see `act`).

    Raises:
        BadInput: no action, not 1 <= shortest <= longest, or `care` outside [0, 1].
    """

    def __init__(
        self, num_actions: int, seed: int, *, shortest: int = 2, longest: int = 12, care: float = 0.95
    ) -> None:
        if num_actions < 1:
            raise BadInput(f"num_actions: expected at least 1, got {num_actions}")
        if not 1 <= shortest <= longest:
            raise BadInput(f"shortest, longest: expected 1 <= shortest <= longest, got {shortest}, {longest}")
        if not 0 <= care <= 1:
            raise BadInput(f"care: expected a number in [0, 1], got {care}")
        self.num_actions, self.shortest, self.longest, self.care = num_actions, shortest, longest, care
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._left = 0
        self._action = 0

    def act(self, game: Playable) -> int:
        """The next action.

        An action that is not safe is given up, and the next one drawn among the safe ones, if there are any. Without
        that a random walker in a maze of 8 x 8 cells is caught after 13 steps in the mean.
        """
        if not self._left:
            self._draw(list(range(self.num_actions)))
        if self._rng.random() < self.care and not game.is_safe(self._action):
            safe = [action for action in range(self.num_actions) if game.is_safe(action)]
            if safe:
                self._draw(safe)
        self._left -= 1
        return self._action

    def _draw(self, actions: list[int]) -> None:
        self._action = actions[int(self._rng.random() * len(actions))]
        self._left = self.shortest + int(self._rng.random() * (self.longest - self.shortest + 1))


class Forager:
    """A simple competent player: goes the shortest way to the next thing to eat and steps aside from danger.

    Args:
        num_actions: of the game.
        seed: of the choice between equally good actions, >= 0.
        slips: share of steps played at random among the safe actions, so that games differ.

    Raises:
        BadInput: no action, or `slips` outside [0, 1].
    """

    def __init__(self, num_actions: int, seed: int, *, slips: float = 0.05) -> None:
        if num_actions < 1 or not 0 <= slips <= 1:
            raise BadInput(f"num_actions, slips: expected >= 1 and in [0, 1], got {num_actions}, {slips}")
        self.num_actions, self.slips = num_actions, slips
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def act(self, game: Playable) -> int:
        """The next action: of the safe ones, one that is nearest to food."""
        actions = range(self.num_actions)
        safe = [action for action in actions if game.is_safe(action)] or list(actions)
        if self._rng.random() >= self.slips:
            distances = {action: game.food_distance(action) for action in safe}
            safe = [action for action in safe if distances[action] == min(distances.values())]
        return safe[int(self._rng.random() * len(safe))]


class Mixed:
    """Half of the episodes by each of two players: long walks through the maze, and games that are won.

    Args:
        num_actions: of the game.
        seed: of the episode's policy, a hash; its parity chooses the player.
    """

    def __init__(self, num_actions: int, seed: int) -> None:
        self._player: Policy = (PersistentRandom, Forager)[seed % 2](num_actions, seed)

    def act(self, game: Playable) -> int:
        """The chosen player's action."""
        return self._player.act(game)


class All:
    """A third of the episodes by each of three players: the two of `Mixed`, and one that does not look out for ghosts.

    A careful player is seldom caught, and then in a corner. A dream's ghost goes its own ways, so the keys that are
    played in a dream run into it anywhere: a recording for a model that is to be played needs that too.

    Args:
        num_actions: of the game.
        seed: of the episode's policy, a hash; its remainder by 3 chooses the player.
    """

    def __init__(self, num_actions: int, seed: int) -> None:
        players: tuple[Callable[[int, int], Policy], ...] = (PersistentRandom, Forager, _reckless)
        self._player = players[seed % 3](num_actions, seed)

    def act(self, game: Playable) -> int:
        """The chosen player's action."""
        return self._player.act(game)


def _reckless(num_actions: int, seed: int) -> Policy:
    return PersistentRandom(num_actions, seed, care=0.0)


POLICIES: dict[str, Callable[[int, int], Policy]] = {
    "persistent-random": PersistentRandom,
    "forager": Forager,
    "mixed": Mixed,
    "all": All,
}
"""Name -> (number of actions, seed) -> player."""
