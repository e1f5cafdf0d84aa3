"""`AutoencoderKL` of diffusers with random weights: the architecture of published ones, trained from the start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKL

from rqvae.models.losses.recon import ReconKind
from rqvae.models.stage1.diffusers_vae import AutoencoderKLStage1


class UntrainedAutoencoderKL(AutoencoderKLStage1):
    """The autoencoder of Stable Diffusion XL by its default sizes, or a smaller one.

    Its factor is 2^(len(block_out_channels) - 1).

    Args:
        block_out_channels: channels of each resolution, highest resolution first.
        layers_per_block: residual blocks per resolution of the encoder; the decoder has one more.
        latent_channels: C of the latent.
        norm_groups: groups of every norm; must divide every one of `block_out_channels`.
        sample_posterior: train on samples of the posterior; otherwise on its mean.
        kl_weight: weight of the KL divergence, which is summed over a latent's dimensions and averaged over the batch.
        recon: "l1" or "l2", the mean over all elements in image units [0, 1].
    """

    pretrained = False

    def __init__(
        self,
        *,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        latent_channels: int = 4,
        norm_groups: int = 32,
        sample_posterior: bool = True,
        kl_weight: float = 1e-6,
        recon: ReconKind = "l2",
    ) -> None:
        levels = len(block_out_channels)
        vae = AutoencoderKL(
            block_out_channels=tuple(block_out_channels),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_groups,
        )
        # past the parent's constructor, which loads weights
        super(AutoencoderKLStage1, self).__init__(vae, 2 ** (levels - 1), recon, Path(type(self).__name__))
        self.kl_weight, self.sample_posterior = kl_weight, sample_posterior
