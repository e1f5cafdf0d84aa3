"""The KL-regularised autoencoder of Rombach et al. 2022 (latent diffusion, section 3.1; Kingma & Welling 2014).

The networks are, layer for layer, those of `AutoencoderKL` in huggingface/diffusers
(src/diffusers/models/autoencoders/autoencoder_kl.py and vae.py), so weights can be carried over by renaming keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812  (the name of torch's own documentation)
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.models.interfaces import ImageShape, LabeledImageData, LatentShape, Stage1Encodings, Stage1ModelOutput
from rqvae.models.layers.conv import Downsample, ResBlock, SpatialAttention, Upsample, bottleneck, group_norm
from rqvae.models.losses.recon import ReconKind
from rqvae.models.stage1.posterior import GaussianPosterior


class Encoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, out_channels, H/f, W/f), f = 2^(len(widths) - 1).

    Args:
        widths: channels of each resolution, highest resolution first.
        blocks: residual blocks per resolution.
        out_channels: channels of the output.
        groups: groups of every norm.
        dropout: probability inside the residual blocks.
        attention: attention at the lowest resolution.
    """

    def __init__(
        self, widths: Sequence[int], blocks: int, out_channels: int, groups: int, dropout: float, attention: bool
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.Sequential()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            stage = [ResBlock(before if j == 0 else width, width, groups, dropout) for j in range(blocks)]
            self.stages.append(nn.Sequential(*stage, *([Downsample(width)] if i + 1 < len(widths) else [])))
        self.mid = bottleneck(widths[-1], groups, dropout, attention)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, out_channels, H/f, W/f)."""
        h_bchw = self.mid(self.stages(self.conv_in(x_bchw)))
        return self.conv_out(F.silu(self.norm_out(h_bchw)))


class Decoder(nn.Module):
    """(B, in_channels, h, w) -> (B, 3, h f, w f) in [-1, 1]; one block more per resolution than the encoder.

    Args:
        widths: channels of each resolution, highest resolution first (as the encoder's).
        blocks: residual blocks per resolution of the encoder; here there are `blocks + 1`.
        in_channels: channels of the latent.
        groups: groups of every norm.
        dropout: probability inside the residual blocks.
        attention: attention at the lowest resolution.
    """

    def __init__(
        self, widths: Sequence[int], blocks: int, in_channels: int, groups: int, dropout: float, attention: bool
    ) -> None:
        super().__init__()
        upwards = list(reversed(widths))
        self.conv_in = nn.Conv2d(in_channels, upwards[0], 3, padding=1)
        self.mid = bottleneck(upwards[0], groups, dropout, attention)
        self.stages = nn.Sequential()
        for i, (before, width) in enumerate(zip([upwards[0], *upwards], upwards, strict=False)):
            stage = [ResBlock(before if j == 0 else width, width, groups, dropout) for j in range(blocks + 1)]
            self.stages.append(nn.Sequential(*stage, *([Upsample(width)] if i + 1 < len(upwards) else [])))
        self.norm_out = group_norm(upwards[-1], groups)
        self.conv_out = nn.Conv2d(upwards[-1], 3, 3, padding=1)

    def forward(self, z_bchw: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, 3, h f, w f)."""
        h_bchw = self.stages(self.mid(self.conv_in(z_bchw)))
        return self.conv_out(F.silu(self.norm_out(h_bchw)))


class KLVAE(GaussianPosterior):
    """Convolutional autoencoder whose latent is a normal distribution per element, held near N(0, 1) by a KL term.

    The factor is f = 2^(len(multipliers) - 1): three multipliers are f4, four f8, five f16.

    Args:
        latent_channels: C of the latent (C, H/f, W/f).
        width: channels at the image's resolution.
        multipliers: channels of each resolution as multiples of `width`, the image's resolution first.
        blocks: residual blocks per resolution in the encoder; the decoder has one more.
        norm_groups: groups of every GroupNorm; must divide every `width * multiplier`.
        attention: single-head attention at the lowest resolution, in encoder and decoder.
        dropout: probability inside the residual blocks.
        recon: "l1" or "l2", the mean over all elements in image units [0, 1].
        kl_weight: weight of the KL divergence, which is summed over a latent's dimensions and averaged over the batch.
            Against a mean over pixels, as here and in diffusers. Latent diffusion sums over pixels in [-1, 1]: its
            1e-6 at 256 px with L1 is 1e-6 / (2 * 3 * 256^2) = 2.5e-12 here.
        sample_posterior: train on samples of the posterior; otherwise on its mean.

    Raises:
        BadInput: `norm_groups` that do not divide a width, or a size below 1.
    """

    def __init__(
        self,
        *,
        latent_channels: int = 4,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 2,
        norm_groups: int = 32,
        attention: bool = True,
        dropout: float = 0.0,
        recon: ReconKind = "l1",
        kl_weight: float = 1e-6,
        sample_posterior: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"latent_channels": latent_channels, "width": width, "blocks": blocks}
        for key, value in {**sizes, "multipliers": min(multipliers, default=0)}.items():
            if value < 1:
                raise BadInput(f"KLVAE.{key}: expected at least 1, got {value}")
        widths = [width * m for m in multipliers]
        self.latent_channels, self.factor = latent_channels, 2 ** (len(widths) - 1)
        self.recon: ReconKind = recon
        self.kl_weight, self.sample_posterior = kl_weight, sample_posterior
        self.encoder = Encoder(widths, blocks, 2 * latent_channels, norm_groups, dropout, attention)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(widths, blocks, latent_channels, norm_groups, dropout, attention)

    def forward(self, inputs: LabeledImageData) -> Stage1ModelOutput:
        """Reconstruct (B, 3, H, W); `additional_attr` has `mu` and `logvar` (B, C, H/f, W/f)."""
        encodings = self.encode(inputs)
        output = self.decode(encodings)
        return Stage1ModelOutput(xs_recon=output.xs_recon, additional_attr=encodings.additional_attr)

    def encode(self, inputs: LabeledImageData) -> Stage1Encodings:
        """Encode (B, 3, H, W) in [0, 1] to the posterior's zs, `mu` and `logvar` (B, C, H/f, W/f), see `posterior`.

        Raises:
            BadInput: a side that the factor does not divide.
        """
        images_bchw = inputs.require_img()
        _, channels, height, width = images_bchw.shape
        self.latent_shape((channels, height, width))
        return self.posterior(self.quant_conv(self.encoder(2 * images_bchw - 1)), inputs.draws)

    def decode(self, encodings: Stage1Encodings) -> Stage1ModelOutput:
        """Decode zs (B, C, h, w) to xs_recon (B, 3, h f, w f) in image units, not clamped."""
        return Stage1ModelOutput(xs_recon=(self.decoder(self.post_quant_conv(encodings.zs)) + 1) / 2)

    def latent_shape(self, image_shape: ImageShape) -> LatentShape:
        """(C, H/f, W/f) of an image (3, H, W).

        Raises:
            BadInput: a side that the factor does not divide.
        """
        _, height, width = image_shape
        if height % self.factor or width % self.factor:
            raise BadInput(f"image size {height}x{width} is not divisible by the factor {self.factor} of KLVAE")
        return self.latent_channels, height // self.factor, width // self.factor

    def get_last_layer(self) -> nn.Parameter:
        """The weight (3, width, 3, 3) of the decoder's last convolution."""
        return self.decoder.get_parameter("conv_out.weight")

    def repeated_blocks(self) -> list[nn.Module]:
        """The residual blocks and the attentions of encoder and decoder."""
        return [module for module in self.modules() if isinstance(module, ResBlock | SpatialAttention)]
