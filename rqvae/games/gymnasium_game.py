"""Games of Gymnasium, Atari's among them, behind the interface of our own. Optional: nothing of them comes with us.

ale-py is under the GPL-2.0 and brings ROMs that are not ours to pass on: it is imported when such a game is asked for,
and its frames stay in the user's folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from rqvae.errors import BadInput

if TYPE_CHECKING:
    import gymnasium

INSTALL = "pip install 'mae-dit[atari]'"


class GymnasiumGame:
    """An environment that shows pictures, as observations or drawn (`rgb_array`), and whose actions are numbered.

    Old consoles show some sprites in every second frame only. So a step repeats its action for `skip` frames of the
    emulator, and what is seen is the maximum over *all* of them; over the last two, as is usual for agents (Mnih et al.
    2015), a sprite that is drawn every fourth frame still flickers.

    Atari games are made with one emulator frame a step and without sticky actions, whatever the id's own default: the
    frames that it would skip are never seen, and an action that is not done cannot be learned from.

    Args:
        env_id: for example `ALE/MsPacman-v5`.
        size: side of the frames in pixels; pictures are averaged down to a square.
        max_steps: longest episode.
        skip: frames of the emulator a step.

    Raises:
        BadInput: the packages are missing, no such environment, one without pictures, actions that are not numbered.
    """

    def __init__(self, env_id: str, size: int, max_steps: int = 400, skip: int = 4) -> None:
        if size < 8 or skip < 1 or max_steps < 1:
            raise BadInput(f"size, skip, max_steps: expected at least 8, 1 and 1, got {size}, {skip}, {max_steps}")
        self.size, self.skip, self.max_steps = size, skip, max_steps
        self._env, self.version = _made(env_id)
        actions: Any = self._env.action_space
        if type(actions).__name__ != "Discrete":
            raise BadInput(f"{env_id}: expected numbered actions (Discrete), got {actions}")
        self._first_action = int(actions.start)
        meanings = getattr(self._env.unwrapped, "get_action_meanings", None)
        names = meanings() if meanings else (str(self._first_action + k) for k in range(int(actions.n)))
        self.action_names: tuple[str, ...] = tuple(names)
        self.licence = f"Frames of {env_id}, a game of others: for your own use, not to be passed on."
        self._steps = 0

    def reset(self, seed: int) -> npt.NDArray[np.uint8]:
        """Start an episode; returns its first frame (size, size, 3)."""
        self._steps = 0
        observation, _ = self._env.reset(seed=seed % 2**31)
        return self._small(self._picture(observation))

    def step(self, action: int) -> tuple[npt.NDArray[np.uint8], float, bool, bool]:
        """Play a step; returns frame, reward of all its emulator frames, terminated, truncated."""
        seen, total, terminated, truncated = None, 0.0, False, False
        for _ in range(self.skip):
            observation, reward, terminated, truncated, _ = self._env.step(self._first_action + action)
            picture = self._picture(observation)
            seen = picture if seen is None else np.maximum(seen, picture)
            total += float(reward)
            if terminated or truncated:
                break
        assert seen is not None
        self._steps += 1
        return self._small(seen), total, bool(terminated), bool(truncated) or self._steps >= self.max_steps

    def is_safe(self, action: int) -> bool:  # noqa: ARG002
        """True: nothing is known of its rules."""
        return True

    def food_distance(self, action: int) -> int:  # noqa: ARG002
        """0: as `is_safe`."""
        return 0

    def _picture(self, observation: Any) -> npt.NDArray[np.uint8]:
        """(H, W, 3): the observation itself, or where that is none what the environment draws."""
        return np.asarray(observation if _is_picture(self._env) else self._env.render())

    def _small(self, picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        small = Image.fromarray(picture).resize((self.size, self.size), Image.Resampling.BOX)
        return np.asarray(small).copy()


def _made(env_id: str) -> tuple[gymnasium.Env[Any, Any], str]:
    """The environment, and the versions that it is of."""
    try:
        import gymnasium

        versions, options = f"gymnasium {gymnasium.__version__}", {}
        if env_id.startswith("ALE/"):
            import ale_py

            gymnasium.register_envs(ale_py)
            versions += f", ale-py {ale_py.__version__}"
            options = {"frameskip": 1, "repeat_action_probability": 0.0}
    except ImportError as error:
        raise BadInput(
            f"game: expected maze-chase, a folder of frames, or with the extra [atari] an environment of Gymnasium, "
            f"got {env_id}, and {error.name} is not installed; {INSTALL}"
        ) from error
    try:
        env = gymnasium.make(env_id, **options)  # type: ignore[arg-type]
        if not _is_picture(env):
            if "rgb_array" not in env.metadata.get("render_modes", ()):
                raise BadInput(
                    f"{env_id}: expected pictures (H, W, 3) uint8 as observations, or the render mode rgb_array, got "
                    f"{env.observation_space}"
                )
            env = gymnasium.make(env_id, render_mode="rgb_array", **options)  # type: ignore[arg-type]
            env.reset(seed=0)
            env.render()  # what it draws with may not be installed
        return env, versions
    except (gymnasium.error.Error, ImportError) as error:
        words = " ".join(str(error).split())
        raise BadInput(
            f"game: expected maze-chase, a folder of frames or an environment of Gymnasium, got {env_id} ({words})"
        ) from error


def _is_picture(env: gymnasium.Env[Any, Any]) -> bool:
    space: Any = env.observation_space
    return space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[2] == 3
