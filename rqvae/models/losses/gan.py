"""Losses of a discriminator and of the generator that faces it, on logits of any shape (large means real)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch.nn.functional as F  # noqa: N812  (the name of torch's own documentation)
from torch import Tensor

GANKind = Literal["hinge", "non_saturating"]


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half of mean(max(0, 1 - real)) + mean(max(0, 1 + fake)), a scalar.

    Lim & Ye 2017, "Geometric GAN"; the half is taming-transformers' (modules/losses/vqperceptual.py, hinge_d_loss).
    """
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean(fake), a scalar."""
    return -fake_logits.mean()


def non_saturating_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half of the binary cross-entropies of real images as 1 and fake ones as 0 (Goodfellow et al. 2014), a scalar."""
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def non_saturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean(log sigmoid(fake)) (Goodfellow et al. 2014, section 3): a gradient also where the fakes are found out."""
    return F.softplus(-fake_logits).mean()


class GANLoss(NamedTuple):
    """The two sides of one game: `discriminator(real_logits, fake_logits)` and `generator(fake_logits)`."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


GAN_LOSSES: dict[GANKind, GANLoss] = {
    "hinge": GANLoss(hinge_discriminator_loss, hinge_generator_loss),
    "non_saturating": GANLoss(non_saturating_discriminator_loss, non_saturating_generator_loss),
}


def discriminator_loss(kind: GANKind, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator minimises, a scalar."""
    return GAN_LOSSES[kind].discriminator(real_logits, fake_logits)


def generator_loss(kind: GANKind, fake_logits: Tensor) -> Tensor:
    """What the generator minimises, a scalar."""
    return GAN_LOSSES[kind].generator(fake_logits)
