"""What a config says of channel tracking: which layers, how often, by which thresholds, and what is done about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rqvae.errors import BadInput

Strategy = Literal["none", "scale_mul", "scale_add", "scale_reset", "affine_reset", "recycle", "freeze"]
State = Literal["suppressed", "constant", "silent", "disconnected", "saturated", "outlier"]


@dataclass(frozen=True)
class Thresholds:
    """When a channel is in which state; see `rqvae.callbacks.channels.classifier` for the definitions and sources.

    Args:
        constant: std over the layer's mean std at or below which a channel is constant.
        silent: mean |h| over the layer's mean of it at or below which a channel is dormant, and silent where it is
            constant too; 0.025 is the diagnostic value of Sokar et al. 2023, who recycle at 0.1.
        suppressed: std over the layer's mean std at or below which a channel is suppressed. The lowest of 20 healthy
            networks is 0.07 (tests/test_channels_states.py).
        gamma: |gamma| over the layer's median at or below which a channel is suppressed.
        disconnected: norm of the outgoing weights over the layer's median at or below which a channel is disconnected.
        saturated: mean |derivative of the activation| at or below which a constant or suppressed channel is saturated.
        outlier: mean over images of max |h|, over the layer's median, from which a channel is an outlier.
        active_unit: variance of the posterior's mean at or below which a latent channel is inactive (Burda et al.
            2015).
        redundant: |correlation| from which two channels are a redundant pair, where `tracking.pairs` is set.
        near_zero: |h| that counts as near zero.
        enter: observations in a row after which a channel is in a state.
        leave: observations in a row after which it has left it.
    """

    constant: float = 0.025
    silent: float = 0.025
    suppressed: float = 0.05
    gamma: float = 0.05
    disconnected: float = 0.01
    saturated: float = 0.01
    outlier: float = 10.0
    active_unit: float = 0.01
    redundant: float = 0.99
    near_zero: float = 1e-3
    enter: int = 3
    leave: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("enter", "leave"):
                if value < 1:
                    raise BadInput(f"tracking.thresholds.{name}: expected at least 1, got {value}")
            elif not value >= 0:
                raise BadInput(f"tracking.thresholds.{name}: expected at least 0, got {value}")


@dataclass(frozen=True)
class TrackingSettings:
    """Statistics of the autoencoder's channels while it trains, in RUN/channels and as `channels/` in the log.

    Args:
        enabled: track.
        every: optimizer steps from one observation to the next.
        layers: globs over module names (`decoder.*.norm*`) or names of module classes (`GroupNorm`, `Conv2d`).
        window: observations that are averaged into one snapshot, which is what is classified and stored.
        latent: module whose output has the posterior's means and log-variances; auto finds `quant_conv`, null is none.
        pairs: correlate all channels of a layer with each other; its memory grows with their number squared.
        thresholds: of the states.
    """

    enabled: bool = False
    every: int = 10
    layers: list[str] = field(default_factory=lambda: ["GroupNorm"])
    window: int = 1
    latent: str | None = "auto"
    pairs: bool = False
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        if self.every < 1 or self.window < 1:
            raise BadInput(f"tracking.every, tracking.window: expected at least 1, got {self.every}, {self.window}")
        if not self.layers:
            raise BadInput("tracking.layers: expected at least one glob or module class, got none")


@dataclass(frozen=True)
class InterventionSettings:
    """What is done to channels that stay in a state; needs `tracking.enabled`. All ranks do the same.

    Args:
        strategy: none; scale_mul, gamma times `factor` up to `cap` (a channel with gamma 0 or a saturated one stays as
            it is); scale_add, gamma plus `amount`; scale_reset, gamma 1; affine_reset, gamma 1 and beta 0; recycle, the
            same with new incoming weights and outgoing ones of zero (ReDo, Sokar et al. 2023); freeze, the channel's
            gradients are zero from then on.
        states: which states are acted upon.
        start: first optimizer step at which it may act.
        stop: last one; null is the run's end.
        every: optimizer steps from one act to the next, at least; the states are those of the last snapshot.
        max_channels: most channels an act, those of the lowest score first; 0 is no limit.
        cooldown: optimizer steps for which a channel is left alone after an act.
        dry_run: log what would be done, change nothing.
        factor: of scale_mul.
        cap: largest gamma that scale_mul makes.
        amount: of scale_add.
    """

    strategy: Strategy = "none"
    states: list[State] = field(
        default_factory=lambda: ["suppressed", "constant", "silent", "disconnected", "saturated"]
    )
    start: int = 0
    stop: int | None = None
    every: int = 1
    max_channels: int = 0
    cooldown: int = 0
    dry_run: bool = False
    factor: float = 1.1
    cap: float = 1.5
    amount: float = 0.05

    def __post_init__(self) -> None:
        whole = {name: getattr(self, name) for name in ("start", "every", "max_channels", "cooldown")}
        for name, value in whole.items():
            least = 1 if name == "every" else 0
            if value < least:
                raise BadInput(f"intervention.{name}: expected at least {least}, got {value}")
        if self.stop is not None and self.stop < self.start:
            raise BadInput(f"intervention.stop: expected at least intervention.start ({self.start}), got {self.stop}")
        if self.factor <= 0 or self.cap <= 0:
            raise BadInput(f"intervention.factor, cap: expected more than 0, got {self.factor}, {self.cap}")
        if not self.states:
            raise BadInput("intervention.states: expected at least one state, got none")
