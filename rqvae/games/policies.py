"""Players that need no training: what a recording is played by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rqvae.errors import BadInput


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

    def act(self, is_safe: Callable[[int], bool]) -> int:
        """The next action.

        An action that `is_safe` refuses is given up, and the next one drawn among the safe ones, if there are any.
        Without that a random walker in a maze of 8 x 8 cells is caught after 13 steps in the mean.
        """
        if not self._left:
            self._draw(list(range(self.num_actions)))
        if self._rng.random() < self.care and not is_safe(self._action):
            safe = [action for action in range(self.num_actions) if is_safe(action)]
            if safe:
                self._draw(safe)
        self._left -= 1
        return self._action

    def _draw(self, actions: list[int]) -> None:
        self._action = actions[int(self._rng.random() * len(actions))]
        self._left = self.shortest + int(self._rng.random() * (self.longest - self.shortest + 1))
