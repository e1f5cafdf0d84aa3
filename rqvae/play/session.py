"""One player in one dream: keys in, frames out. It knows nothing of sockets."""

from __future__ import annotations

import io
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from rqvae.diffusion import dpm_solver_pp_2m, euler, heun, renoise
from rqvae.errors import BadInput
from rqvae.games.maze_chase import MazeChase
from rqvae.models.two_stage import TwoStage
from rqvae.play.recording import Recording
from rqvae.play.starts import Starts
from rqvae.trainers.dream import Dream, frame_noise
from rqvae.trainers.evaluation_trainer import finite_pictures

Frame = npt.NDArray[np.uint8]

KEPT = 900
"""Frames that a session keeps for its GIF: a minute at 15 frames a second."""

SOLVERS = {solver.__name__: solver for solver in (euler, heun, dpm_solver_pp_2m, renoise)}
"""What a player can choose; `renoise` draws new noise in each of its steps."""

ENDLESS = 10**9
"""Steps and lives of the game beside: a dream does not end, so the game it is compared with should not."""


@dataclass(frozen=True)
class World:
    """What all sessions share.

    Args:
        two_stage: the trained model, in eval mode.
        num_actions: of the game.
        action_names: names of the actions, in order.
        starts: where dreams begin.
        game: what is played beside the dream, or None without one; each session makes its own from it.
        numbers: the model's number of each of the game's actions (`model_numbers`); None where they are the same.
    """

    two_stage: TwoStage
    num_actions: int
    action_names: tuple[str, ...]
    starts: Starts
    game: MazeChase | None = None
    numbers: tuple[int, ...] | None = None

    @property
    def idle(self) -> int:
        """What is played while no key is down: NOOP; in a game without it the null action, `num_actions`."""
        names = self.action_names
        return names.index("NOOP") if "NOOP" in names else self.num_actions


@dataclass(frozen=True)
class Tick:
    """One step of a session.

    Args:
        dream: (H, W, 3) uint8, the generated frame.
        real: the frame of the real game under the same keys; None without a game, or once all is eaten.
        step: frames since the reset.
        milliseconds: that the model took.
    """

    dream: Frame
    real: Frame | None
    step: int
    milliseconds: float


@dataclass
class Session:
    """One dream that is played, and beside it the real game under the same keys.

    Args:
        world: the model and where to begin.
        seed: of the start and of the noise.
        steps: of the solver; None is the model's own number.
        solver: a key of `SOLVERS`; None is the model's own.
    """

    world: World
    seed: int = 0
    steps: int | None = None
    solver: str | None = None
    _dream: Dream = field(init=False)
    _game: MazeChase | None = field(default=None, init=False)
    _real: Frame | None = field(default=None, init=False)
    _held: int = field(init=False)
    _pressed: int | None = field(default=None, init=False)
    _count: int = field(default=0, init=False)
    history: deque[tuple[Frame, int]] = field(init=False)
    recordings: dict[str, Recording] = field(init=False)
    _records: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.recordings = {what: Recording(what) for what in ("dream", "real")}
        self.reset(self.seed)

    def reset(self, seed: int) -> None:
        """Begin again from the start of this seed.

        Raises:
            BadInput: a seed below 0.
        """
        if seed < 0:
            raise BadInput(f"seed: expected at least 0, got {seed}")
        start = self.world.starts(seed)
        frames = torch.from_numpy(start.frames).permute(0, 3, 1, 2)[None].float() / 255
        device = next(self.world.two_stage.stage2.parameters()).device
        past = torch.tensor([[self._number(int(action)) for action in start.actions]], device=device)
        self._dream = Dream.begin(self.world.two_stage, frames.to(device), past, self.world.num_actions)
        self.seed, self._count, self._real = seed, 0, None
        self.history = deque([(start.frames[-1], self.world.idle)], maxlen=KEPT)
        self._game, game = None, self.world.game
        if game is not None and start.state is not None:
            self._game = MazeChase(game.size, game.num_ghosts, ENDLESS, maze_seed=game.maze[1], lives=ENDLESS)
            self._game.restore_state(start.state)
            self._real = self._game.render()
        self.release()
        self.record(self._records)

    def record(self, on: bool) -> None:
        """Keep what is played from now on as an episode of a recording, of the dream and of the real game; or stop.

        Raises:
            BadInput: a game without an action for steps in which no key is down.
        """
        if on and self.world.idle == self.world.num_actions:
            known = ", ".join(self.world.action_names)
            raise BadInput(f"record: expected a game with an action NOOP, which a step without a key has, got {known}")
        self._records = on
        now = {"dream": self.history[-1][0], "real": None if self._game is None else self._game.render()}
        for what, frame in now.items():
            if on and frame is not None:
                self.recordings[what].begin(frame)
            else:
                self.recordings[what].end()

    def press(self, action: int) -> None:
        """A key goes down: its action is played at the next step, and at each one until the key is up.

        Raises:
            BadInput: an action that the game does not have.
        """
        if not 0 <= action < self.world.num_actions:
            raise BadInput(f"action: expected 0 to {self.world.num_actions - 1}, got {action}")
        self._held = self._pressed = action

    def release(self) -> None:
        """The key is up; an action that no step has played yet still is."""
        self._held = self.world.idle

    def set_steps(self, steps: int) -> None:
        """Solver steps of each frame from now on.

        Raises:
            BadInput: not in 1 to 50.
        """
        if not 1 <= steps <= 50:
            raise BadInput(f"steps: expected 1 to 50, got {steps}")
        self.steps = steps

    def set_solver(self, name: str | None) -> None:
        """The solver of each frame from now on; None is the model's own.

        Raises:
            BadInput: not a key of `SOLVERS`.
        """
        if name is not None and name not in SOLVERS:
            raise BadInput(f"solver: expected null or one of {', '.join(SOLVERS)}, got {name}")
        self.solver = name

    @property
    def is_recorded(self) -> bool:
        """Whether what is played now is kept."""
        return self._records

    def tick(self) -> Tick:
        """The next frame.

        Raises:
            RunFailed: it is not finite.
        """
        action = self._held if self._pressed is None else self._pressed
        self._pressed = None
        sampler: Any = self.world.two_stage.stage2.sampler
        changes: dict[str, Any] = {"steps": self.steps, "solver": self.solver and SOLVERS[self.solver]}
        self._dream.sampler = replace(sampler, **{key: value for key, value in changes.items() if value})
        shape, device = self.world.two_stage.latent_shape, self._dream.context_bkchw.device
        began = time.perf_counter()
        noise = frame_noise(shape, self.seed, 0, self._count)[None].to(device)
        frame = self._dream.step(torch.tensor([self._number(action)], device=device), noise)
        latents = self._dream.context_bkchw[:, -1]
        dream = finite_pictures(frame, latents, [self._count], "frame of the dream")[0].transpose(1, 2, 0)
        elapsed = 1000 * (time.perf_counter() - began)
        self._step_game(action)
        self._count += 1
        self.history.append((dream, action))
        self.recordings["dream"].add(action, dream)
        return Tick(dream, self._real, self._count, elapsed)

    def _number(self, action: int) -> int:
        return action if self.world.numbers is None else (*self.world.numbers, self.world.num_actions)[action]

    def _step_game(self, action: int) -> None:
        self._real = None
        if self._game is not None:
            self._real, reward, terminated, _ = self._game.step(action)
            self._game = None if terminated else self._game
            self.recordings["real"].add(action, None if terminated else self._real, reward)

    def film(self) -> Frame:
        """The session's last frames (T, H, W, 3), a copy."""
        return np.stack([frame for frame, _ in self.history])

    def recorded(self, what: str) -> Recording:
        """What has been recorded of the `dream` or of the `real` game so far, a copy.

        Raises:
            BadInput: another word.
        """
        if what not in self.recordings:
            raise BadInput(f"recording: expected one of {', '.join(self.recordings)}, got {what}")
        return self.recordings[what].copy()


def png(frame: Frame) -> bytes:
    """A frame as PNG, which is lossless: JPEG of 4-pixel sprites is worse than the model."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
