"""Two networks that play against each other: no loss has to fall, but one may win."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rqvae.health.finding import Found, NotAssessed, at, check
from rqvae.health.roles import plain_name
from rqvae.health.subject import Subject

_LEAST = 20


@check(
    "GAN.DISCRIMINATOR_WINS",
    "the discriminator has won",
    "major",
    needs=("gan",),
    threshold="over the last tenth the discriminator's loss is below 1 % of its early level (0.01 at most) "
    "and the generator's "
    "above twice its early level",
    alternatives=("a discriminator that was pre-trained",),
    recommendation=("lower the discriminator's learning rate", "add R1 or augment adaptively", "resume from before"),
    verify="the discriminator's loss comes back to its level",
    source="Karras et al., Training GANs with Limited Data, 2020",
)
def discriminator_wins(subject: Subject) -> Iterator[Found]:
    """Loss of one at zero, of the other rising."""
    opponent = max(subject.all("gan_d"), key=len).finite
    players = [s.finite for s in subject.all("gan_g") if plain_name(s.name) not in ("gp", "pl")]
    if not players or min(len(opponent), max(map(len, players))) < _LEAST:
        raise NotAssessed(f"log the losses of both networks at {_LEAST} steps or more")
    player = max(players, key=len)
    tail, head = max(3, len(opponent) // 10), max(3, len(opponent) // 5)
    early, late = (float(np.median(np.abs(v))) for v in (opponent.values[:head], opponent.values[-tail:]))
    head_g, tail_g = max(3, len(player) // 5), max(3, len(player) // 10)
    early_g, late_g = float(np.median(player.values[:head_g])), float(np.median(player.values[-tail_g:]))
    if late < min(0.01, 0.01 * max(early, 0.1) + 0.005) and late_g > 2 * max(early_g, 0.1):
        text = (
            f"{opponent.name} is {late:.2g} at the end (early {early:.2g}), {player.name} {late_g:.3g} "
            f"(early {early_g:.3g})"
        )
        yield Found(
            text,
            (at(opponent, len(opponent) - 1), at(player, len(player) - 1)),
            confidence=0.8,
            power=f"{len(opponent)} points of {opponent.name}",
        )


@check(
    "GAN.LOSS_EXPLODED",
    "the losses of the game run away",
    "major",
    needs=("gan",),
    threshold="the median of the last tenth of a loss is above 100 and above 20 times that of the first half",
    recommendation=("lower both learning rates", "add a gradient penalty", "resume from before"),
    verify="both losses stay within their early range",
)
def exploded(subject: Subject) -> Iterator[Found]:
    """Losses that grow without bound."""
    for series in (*subject.all("gan_d"), *subject.all("gan_g")):
        series = series.finite
        if len(series) < _LEAST:
            continue
        size = np.abs(series.values)
        early, late = float(np.median(size[: len(size) // 2])), float(np.median(size[-max(3, len(size) // 10) :]))
        if late > 100 and late > 20 * early:
            yield Found(
                f"{series.name} is {late:.3g} at the end, {early:.3g} in the first half",
                (at(series, len(series) - 1),),
                power=f"{len(series)} points of {series.name}",
                confidence=0.85,
            )
            return
