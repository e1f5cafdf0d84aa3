"""What is played as a recording that `GameFrames` reads: a reset, and a cut after a while, begin an episode."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rqvae.errors import BadInput
from rqvae.games.recording import SCHEMA, Rows, write_recording

Frame = npt.NDArray[np.uint8]

MOST = 64 * 2**20
"""Bytes of a recording's frames: at 32 pixels 24 minutes of 15 frames a second."""

LONGEST = 400
"""Frames of an episode, as of `collect`: a longer one is cut, so that a recording has some for each split."""


@dataclass
class Recording:
    """Episodes in the making; a frame is kept once the action that was taken at it is known.

    Args:
        what: `dream` or `real`, whose frames these are.
    """

    what: str
    rows: Rows = field(default_factory=Rows)
    _frame: Frame | None = None
    _episode: int = 0
    _begun: int = 0

    def __len__(self) -> int:
        return len(self.rows.frames)

    @property
    def full(self) -> bool:
        """Whether it takes no more frames."""
        return bool(len(self)) and len(self) * self.rows.frames[0].nbytes >= MOST

    def copy(self) -> Recording:
        """The same frames; what is recorded later is not in it."""
        rows = Rows(**{name: list(values) for name, values in vars(self.rows).items()})
        return replace(self, rows=rows)

    @property
    def episodes(self) -> int:
        """How many have a frame."""
        return self.rows.episode[-1] + 1 if len(self) else 0

    def begin(self, frame: Frame) -> None:
        """A new episode that begins with this frame."""
        self._frame = frame
        self._episode, self._begun = self.episodes, len(self)

    def add(self, action: int, frame: Frame | None, reward: float = 0.0) -> None:
        """The action that was taken, and the frame after it: None ends the episode."""
        if self._frame is None or self.full:
            return
        over = frame is None or len(self) - self._begun == LONGEST - 1
        self.rows.append(self._frame, action, reward, done=over, episode=self._episode)
        self._frame = frame
        if over and frame is not None:
            self.begin(frame)

    def end(self) -> None:
        """No more frames until an episode begins; the last frame, whose action nobody knows, is left out."""
        self._frame = None

    def zipped(self, action_names: Sequence[str], seed: int) -> bytes:
        """The folder of the recording as a zip file.

        Args:
            action_names: of the game, in order.
            seed: that the splits are drawn by.

        Raises:
            BadInput: nothing was recorded.
        """
        if not len(self):
            raise BadInput(f"recording of the {self.what}: expected frames, got none; press record and play")
        facts = {"schema": SCHEMA, "env": f"played: {self.what}", "size": self.rows.frames[0].shape[0]}
        facts |= {"frames": len(self), "seed": seed, "policy": "a person"}
        with tempfile.TemporaryDirectory() as temporary:
            write_recording(Path(temporary), facts, action_names, [self.rows])
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                for file in sorted(Path(temporary).iterdir()):
                    archive.write(file, file.name)
        return buffer.getvalue()
