"""The normal posterior of a KL-regularised autoencoder (Kingma & Welling 2014), whatever network gives its moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rqvae.models.interfaces import (
    ImageShape,
    LabeledImageData,
    Stage1Encodings,
    Stage1Losses,
    Stage1Model,
    Stage1ModelOutput,
)
from rqvae.models.losses.recon import ReconKind, recon_loss
from rqvae.randomness import Draw, normal


def diagonal_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) in nats: sum over the latent's dimensions, mean over the batch.

    Kingma & Welling 2014, appendix B: -1/2 sum(1 + logvar - mu^2 - exp(logvar)).

    Args:
        mu: (B, C, h, w).
        logvar: (B, C, h, w).
    """
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


class GaussianPosterior(Stage1Model):
    """A Stage1 model whose latent is sampled from a normal distribution per element, held near N(0, 1) by a KL term.

    Attributes:
        sample_posterior: whether zs is sampled where the draw `posterior` is there; otherwise it is the mean.
        kl_weight: weight of the KL divergence, see `diagonal_kl`.
        recon: "l1" or "l2", the mean over all elements in image units [0, 1].
    """

    sample_posterior: bool
    kl_weight: float
    recon: ReconKind

    def posterior(self, moments_bchw: Tensor, draws: Mapping[str, Tensor] | None) -> Stage1Encodings:
        """The latent of the moments (B, 2C, h, w): the means, then the logarithms of the variances.

        zs (B, C, h, w) is `mu + exp(logvar / 2) * draws["posterior"]` where that draw is present and `sample_posterior`
        is set, and `mu` otherwise. `additional_attr` has `mu` and `logvar` in [-30, 20].
        """
        # fp32 under bf16 autocast: the KL subtracts numbers near 1 from each other.
        moments_bchw = moments_bchw.to(torch.promote_types(moments_bchw.dtype, torch.float32))
        mu_bchw, logvar_bchw = moments_bchw.chunk(2, dim=1)
        logvar_bchw = logvar_bchw.clamp(-30, 20)
        return self.with_draws(Stage1Encodings(mu_bchw, {"mu": mu_bchw, "logvar": logvar_bchw}), draws)

    def with_draws(self, encodings: Stage1Encodings, draws: Mapping[str, Tensor] | None) -> Stage1Encodings:
        """The same posterior with zs sampled from it, see `posterior`; a latent without moments stays as it is."""
        posterior_bchw, moments = (draws or {}).get("posterior"), encodings.additional_attr or {}
        if not self.sample_posterior or posterior_bchw is None or "logvar" not in moments:
            return encodings
        return replace(encodings, zs=moments["mu"] + (moments["logvar"] / 2).exp() * posterior_bchw)

    def compute_loss(self, output: Stage1ModelOutput, inputs: LabeledImageData) -> Stage1Losses:
        """`loss_recon` in image units and `loss_latent = kl_weight * KL`.

        Raises:
            ValueError: an output without `mu` and `logvar`, that is, one that is not from `forward`.
        """
        if output.additional_attr is None:
            raise ValueError("Stage1ModelOutput.additional_attr: expected mu and logvar from forward, got None")
        kl = diagonal_kl(output.additional_attr["mu"], output.additional_attr["logvar"])
        return Stage1Losses(
            loss_recon=recon_loss(self.recon, output.xs_recon, inputs.require_img()), loss_latent=self.kl_weight * kl
        )

    def draws(self, image_shape: ImageShape) -> dict[str, Draw]:
        """`posterior`: standard normal numbers of the latent's shape, where the posterior is sampled."""
        return {"posterior": Draw(self.latent_shape(image_shape), normal)} if self.sample_posterior else {}
