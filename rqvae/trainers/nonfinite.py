"""Updates left out as their gradients were not finite, or unusually large: counted on the device, read with a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_EXCEEDED = "exceeded/"
_USUAL_OVER = 100
"""Updates that the running mean of the norm looks back over, and that must have been before it says what is usual."""


class Skips:
    """What `train.skip_nonfinite` knows of each update. The same on every rank, as the gradients' norm is.

    Args:
        names: of the updates, the first one's has no suffix in the log.
        device: of the counts.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.in_use = False
        self._suffixes = {name: "" if name == names[0] else f"_{name}" for name in names}
        # (1,) and from the host, never changed in place: every step's graph is then the same, as in `Meter`
        self._zeros = {name: torch.zeros(1, dtype=torch.int64).to(device) for name in names}
        self._streak, self._in_row, self._exceeded_at = dict(self._zeros), dict(self._zeros), dict(self._zeros)
        self._applied = dict(self._zeros)
        self._usual = {name: torch.zeros(1).to(device) for name in names}
        self._infinity = torch.full((1,), torch.inf).to(device)

    def ceiling(self, name: str, factor: float | None) -> Tensor:
        """The largest norm, (1,) on the device, of an update that is applied: inf but where `factor` says otherwise."""
        if factor is None:
            return self._infinity
        return torch.where(self._applied[name] < _USUAL_OVER, self._infinity, factor * self._usual[name])

    def judge(self, name: str, norm: Tensor, step: int, limit: int, at_most: Tensor | None = None) -> Tensor:
        """Take note of an update.

        Args:
            name: of the update.
            norm: of its gradients, after their mean over ranks; scalar.
            step: number of the step, counted from 1.
            limit: how many in a row may be left out.
            at_most: what `ceiling` said; None is inf.

        Returns:
            Scalar bool on the device: whether the update was applied.
        """
        self.in_use = True
        applied = norm.isfinite()
        if at_most is not None:
            applied = applied & (norm <= at_most.reshape(()))
            self._note_usual(name, norm, applied)
        streak = (self._streak[name] + 1) * ~applied
        first = (streak > limit) & (self._exceeded_at[name] == 0)
        self._exceeded_at[name] = torch.where(first, step, self._exceeded_at[name])
        self._in_row[name] = self._in_row[name] + ~applied
        self._streak[name] = streak
        return applied

    def _note_usual(self, name: str, norm: Tensor, applied: Tensor) -> None:
        """A mean over all updates until there are `_USUAL_OVER`, exponential from there on."""
        count = self._applied[name] + applied
        share = 1 / count.clamp(1, _USUAL_OVER)
        usual = self._usual[name]
        self._usual[name] = torch.where(applied, usual + share * (norm.to(usual.dtype) - usual), usual)
        self._applied[name] = count

    def row(self) -> dict[str, Tensor]:
        """`train/skipped_steps` of each update since the last row, forgotten with it, and the marks for `exceeded`."""
        if not self.in_use:
            return {}
        counts = {f"train/skipped_steps{self._suffixes[name]}": count for name, count in self._in_row.items()}
        self._in_row = dict(self._zeros)
        return counts | self.marks()

    def marks(self) -> dict[str, Tensor]:
        """For each update the step at which it had been left out too often, 0 where it never was."""
        return {f"{_EXCEEDED}{name}": step for name, step in self._exceeded_at.items()} if self.in_use else {}

    @staticmethod
    def exceeded(values: dict[str, float]) -> dict[str, int]:
        """Take the marks out of a row's values; the updates that were left out too often, and at which step."""
        marks = {key.removeprefix(_EXCEEDED): int(values.pop(key)) for key in list(values) if key.startswith(_EXCEEDED)}
        return {name: step for name, step in marks.items() if step}

    @staticmethod
    def any_in(values: Mapping[str, float]) -> bool:
        """Whether a row has updates that were left out."""
        return any(key.startswith("train/skipped_steps") and value for key, value in values.items())

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; a state with a mark is never saved."""
        if not self.in_use:
            return {}
        parts = self._parts()
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the counts of a checkpoint; an empty state leaves them at 0."""
        for key, value in state.items():
            part, _, name = key.partition(".")
            self._parts()[part][name] = value.clone()

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        return {"streak": self._streak, "in_row": self._in_row, "applied": self._applied, "usual": self._usual}
