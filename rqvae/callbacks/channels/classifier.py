"""In which state each channel is, and from when to when.

Definitions, for a channel's output h after the activation, means over batch and positions:

- constancy: Std(h) over the layer's mean of it. The primary test, since a channel that does not vary carries no
  information however large it is: SiLU(GroupNorm) with gamma 0 gives SiLU(beta).
- dormant score: E|h| over the layer's mean of it (Sokar et al. 2023, "The Dormant Neuron Phenomenon in Deep
  Reinforcement Learning", definition 3.1).
- constant: constancy at or below the threshold. silent: also dormant. saturated: constant or suppressed, and the
  activation's mean |derivative| is near 0, so that no gradient comes back (beta of -20).
- suppressed: constancy or |gamma| over the layer's median is small (gamma as in Liu et al. 2017, "Network Slimming").
- disconnected: the norm of the outgoing weights over the layer's median is near 0.
- outlier: max |h| of a sample is many times the layer's median (StyleGAN2's droplets, Karras et al. 2020, section 2).
- inactive, of latents: the variance of the posterior's mean is at or below 0.01 (Burda et al. 2015, section 5.4 of
  "Importance Weighted Autoencoders").
- redundant pair: two channels with |correlation| near 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rqvae.callbacks.channels.layers import Layer
from rqvae.callbacks.channels.settings import Thresholds
from rqvae.callbacks.channels.snapshot import Snapshot
from rqvae.errors import BadInput

STATES = ("active", "outlier", "suppressed", "disconnected", "constant", "silent", "saturated", "inactive")
"""By number; where several hold, the later one is told."""
DEAD = ("suppressed", "disconnected", "constant", "silent", "saturated", "inactive")
LATENT = "latent"
"""What the posterior is called among layers."""
_OPEN = -1
_LARGEST = 1e30


@dataclass(frozen=True)
class Region:
    """A stretch of time that a channel spent in a state.

    Args:
        layer: its name; `latent` for the posterior.
        channel: in the layer.
        state: out of `STATES`.
        birth: step of the first observation of the state.
        death: step of the first observation without it; None where it goes on.
        score: what decided, at the last observation of the state: 0 is dead, except of outliers.
    """

    layer: str
    channel: int
    state: str
    birth: int
    death: int | None
    score: float


def scores(snapshot: Snapshot, thresholds: Thresholds) -> tuple[Tensor, Tensor, Tensor]:
    """State, deciding score and dormant score of every channel as this one snapshot shows them, latents last.

    Returns:
        (N,) int64 numbers of `STATES`, (N,) float64, (N,) float64.
    """
    parts = [_of_layer(snapshot.of(layer.name), thresholds) for layer in snapshot.layers]
    if snapshot.latent is not None:
        variance = snapshot.latent.variance
        inactive = variance <= thresholds.active_unit
        state = torch.where(inactive, STATES.index("inactive"), 0)
        parts.append((state, variance, torch.ones_like(variance)))
    states, deciding, dormant = (torch.cat(column) for column in zip(*parts, strict=True))
    return states, deciding, dormant


def _of_layer(values: dict[str, Tensor], limits: Thresholds) -> tuple[Tensor, Tensor, Tensor]:
    constancy = _over(values["std"], values["std"].mean())
    dormant = _over(values["abs"], values["abs"].mean())
    gamma = _over(values["gamma"].abs(), values["gamma"].abs().median())
    out = _over(values["out_norm"], values["out_norm"].median())
    peak = _over(values["peak"], values["peak"].median())
    flat = constancy <= limits.constant
    weak = (constancy <= limits.suppressed) | (gamma <= limits.gamma)
    state, score = torch.zeros(len(constancy), dtype=torch.int64), constancy
    for name, holds, why in (
        ("outlier", peak >= limits.outlier, peak),
        ("suppressed", weak, torch.minimum(constancy, gamma.nan_to_num(torch.inf))),
        ("disconnected", out <= limits.disconnected, out),
        ("constant", flat, constancy),
        ("silent", flat & (dormant <= limits.silent), constancy),
        ("saturated", weak & (values["sensitivity"] <= limits.saturated), values["sensitivity"]),
    ):
        state, score = torch.where(holds, STATES.index(name), state), torch.where(holds, why, score)
    return state, score, dormant


def _over(value: Tensor, reference: Tensor) -> Tensor:
    """`value / reference`; 0 stays 0 where the reference is 0 too."""
    return torch.where(value == 0, 0.0, value / reference)


def redundant_pairs(snapshot: Snapshot, thresholds: Thresholds) -> list[tuple[str, int, int, float]]:
    """Layer, two channels and their correlation, where |correlation| is at least the threshold."""
    rows = []
    for name, matrix in snapshot.correlations.items():
        for i, j in (matrix.abs().triu(1) >= thresholds.redundant).nonzero().tolist():
            rows.append((name, i, j, float(matrix[i, j])))
    return rows


class Classifier:
    """States with hysteresis: what is seen `enter` times in a row is entered, what is missed `leave` times is left.

    Args:
        layers: tracked.
        thresholds: of the states.
    """

    def __init__(self, layers: Sequence[Layer], thresholds: Thresholds) -> None:
        self.layers, self.thresholds = layers, thresholds
        self._places = [(layer.name, c) for layer in layers for c in range(layer.channels)]
        self._latent = 0
        self._closed: list[tuple[int, int, int, int, float]] = []
        self._make(len(self._places))

    def _make(self, count: int) -> None:
        self.state, self._candidate, self._streak, self._birth, self._missed, self._missed_at, self._first = (
            torch.zeros(count, dtype=torch.int64) for _ in range(7)
        )
        self.score = torch.ones(count, dtype=torch.float64)

    def observe(self, snapshot: Snapshot) -> None:
        """Take note of a snapshot; on every rank alike."""
        if snapshot.latent is not None and not self._latent:
            self._add_latent(len(snapshot.latent.variance))
        seen, deciding, _ = scores(snapshot, self.thresholds)
        deciding = deciding.nan_to_num(1.0, _LARGEST)  # a checkpoint takes finite numbers only
        at = torch.tensor(snapshot.step)
        same = seen == self._candidate
        self._streak = torch.where(same, self._streak + 1, 1)
        self._first = torch.where(same, self._first, at)
        self._candidate = seen
        holds = seen == self.state
        self._missed_at = torch.where(~holds & (self._missed == 0), at, self._missed_at)
        self._missed = torch.where(holds, 0, self._missed + 1)
        self.score = torch.where(holds | (self.state == 0), deciding, self.score)
        self._leave((self.state != 0) & (self._missed >= self.thresholds.leave))
        entered = (self.state == 0) & (seen != 0) & (self._streak >= self.thresholds.enter)
        self.state = torch.where(entered, seen, self.state)
        self._birth = torch.where(entered, self._first, self._birth)
        self._missed = torch.where(entered | (self.state == 0), 0, self._missed)
        self.score = torch.where(entered, deciding, self.score)

    def _leave(self, left: Tensor) -> None:
        for i in left.nonzero().flatten().tolist():
            row = (i, int(self.state[i]), int(self._birth[i]), int(self._missed_at[i]), float(self.score[i]))
            self._closed.append(row)
        self.state = torch.where(left, 0, self.state)

    def _add_latent(self, channels: int) -> None:
        old = self.state_dict()
        self._latent = channels
        self._make(len(self._places) + channels)
        for name, value in old.items():
            if name not in ("layers", "closed"):
                getattr(self, name)[: len(value)] = value
        self._places += [(LATENT, c) for c in range(channels)]

    def regions(self) -> list[Region]:
        """All so far, in the order of their birth."""
        rows = [(*row[:3], row[3], row[4]) for row in self._closed]
        for i in (self.state != 0).nonzero().flatten().tolist():
            rows.append((i, int(self.state[i]), int(self._birth[i]), _OPEN, float(self.score[i])))
        rows.sort(key=lambda row: (row[2], row[0]))
        return [
            Region(*self._places[i], STATES[state], birth, None if death == _OPEN else death, score)
            for i, state, birth, death, score in rows
        ]

    def counts(self) -> dict[str, int]:
        """How many channels are in each state."""
        found = torch.bincount(self.state, minlength=len(STATES)).tolist()
        return dict(zip(STATES, found, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        names = ("state", "score", "_candidate", "_streak", "_birth", "_missed", "_missed_at", "_first")
        told = "\n".join(f"{layer.name} {layer.channels}" for layer in self.layers)
        return {
            **{name: getattr(self, name).clone() for name in names},
            "layers": torch.frombuffer(bytearray(told.encode()), dtype=torch.uint8).clone(),
            "closed": torch.tensor(self._closed, dtype=torch.float64).reshape(-1, 5),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where a checkpoint left off.

        Raises:
            BadInput: the checkpoint tracked other layers.
        """
        before = bytes(state["layers"].tolist()).decode().splitlines()
        now = [f"{layer.name} {layer.channels}" for layer in self.layers]
        if before != now:
            other = sorted(set(before) ^ set(now)) or now
            raise BadInput(
                f"tracking.layers: expected the {len(before)} layers of the checkpoint, got {len(now)}; "
                f"{other[0].partition(' ')[0]} is only in the {'checkpoint' if other[0] in before else 'config'}"
            )
        if extra := len(state["state"]) - len(self._places):
            self._add_latent(extra)
        for name, value in state.items():
            if name not in ("layers", "closed"):
                setattr(self, name, value.clone())
        self._closed = [(int(a), int(b), int(c), int(d), e) for a, b, c, d, e in state["closed"].tolist()]
