"""Autoencoders of huggingface/diffusers as Stage1 models: frozen under a generator, or trained further.

Images are [0, 1] outside and [-1, 1] inside. Latents are what the encoder gives, unscaled: `latent_statistics` says by
what the model's own pipelines normalise them, and the `ScaleShift` connector does it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.models.interfaces import (
    ImageShape,
    LabeledImageData,
    LatentShape,
    Stage1Encodings,
    Stage1Losses,
    Stage1Model,
    Stage1ModelOutput,
)
from rqvae.models.losses.recon import ReconKind, recon_loss
from rqvae.models.stage1.diffusers_source import CONFIG, find_folder, latent_scale, load_model
from rqvae.models.stage1.posterior import GaussianPosterior


class DiffusersStage1(Stage1Model):
    """What the wrappers share: shapes, units, decoding, and the losses of an autoencoder without a latent loss.

    Args:
        vae: the model.
        factor: image side over latent side.
        recon: "l1" or "l2", the mean over all elements in image units [0, 1].
        folder: the model's, for errors.

    Raises:
        BadInput: a model of images that have not 3 channels, or a configuration with a scale that makes no sense.
    """

    pretrained = True

    def __init__(self, vae: Any, factor: int, recon: ReconKind, folder: Path) -> None:
        super().__init__()
        config: dict[str, Any] = dict(vae.config)
        where = str(folder / CONFIG)
        for key in ("in_channels", "out_channels"):
            if config.get(key, 3) != 3:
                raise BadInput(f"{where}: {key}: expected 3, got {config[key]}")
        self.vae = vae
        self.latent_channels, self.factor = int(config["latent_channels"]), factor
        self.recon: ReconKind = recon
        self._scale = latent_scale(config, self.latent_channels, where)

    def forward(self, inputs: LabeledImageData) -> Stage1ModelOutput:
        """Reconstruct (B, 3, H, W); `additional_attr` is that of `encode`."""
        encodings = self.encode(inputs)
        return Stage1ModelOutput(self.decode(encodings).xs_recon, encodings.additional_attr)

    def decode(self, encodings: Stage1Encodings) -> Stage1ModelOutput:
        """Decode unscaled zs (B, C, h, w) to xs_recon (B, 3, h f, w f) in image units, not clamped."""
        return Stage1ModelOutput(xs_recon=(self.vae.decode(encodings.zs).sample + 1) / 2)

    def compute_loss(self, output: Stage1ModelOutput, inputs: LabeledImageData) -> Stage1Losses:
        """`loss_recon` in image units; the latent costs nothing."""
        images_bchw = inputs.require_img()
        return Stage1Losses(
            loss_recon=recon_loss(self.recon, output.xs_recon, images_bchw), loss_latent=images_bchw.new_zeros(())
        )

    def latent_shape(self, image_shape: ImageShape) -> LatentShape:
        """(C, H/f, W/f) of an image (3, H, W).

        Raises:
            BadInput: a side that the factor does not divide.
        """
        _, height, width = image_shape
        if height % self.factor or width % self.factor:
            name = type(self).__name__
            raise BadInput(f"image size {height}x{width} is not divisible by the factor {self.factor} of {name}")
        return self.latent_channels, height // self.factor, width // self.factor

    def latent_statistics(self) -> tuple[Tensor, Tensor] | None:
        """The scale in the model's config.json, see `rqvae.models.stage1.diffusers_source.latent_scale`."""
        return self._scale

    def save_source(self, folder: Path) -> None:
        """Write what the constructor takes as `source`, with the present weights."""
        # diffusers keeps the path it loaded from; a folder that is shared has no use for it
        self.vae.register_to_config(_name_or_path="")
        self.vae.save_pretrained(folder, safe_serialization=True)

    def get_last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last convolution, which the models register last."""
        convolutions = [module for module in self.vae.decoder.modules() if isinstance(module, nn.Conv2d)]
        return convolutions[-1].get_parameter("weight")

    def _pixels(self, inputs: LabeledImageData) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], of sides that the factor divides."""
        images_bchw = inputs.require_img()
        _, channels, height, width = images_bchw.shape
        self.latent_shape((channels, height, width))
        return 2 * images_bchw - 1


class AutoencoderKLStage1(GaussianPosterior, DiffusersStage1):
    """`AutoencoderKL` of diffusers: the autoencoders of Stable Diffusion 1 to 3 and Flux.

    Its factor is 2^(len(block_out_channels) - 1). The weights are loaded here, so no checkpoint of a Stage1 run is
    needed.

    Args:
        source: a local folder with config.json and diffusion_pytorch_model.safetensors, or a hub id `owner/name`.
        subfolder: of the source, for example "vae" of a pipeline.
        revision: branch, tag or commit of a hub id.
        sample_posterior: train on samples of the posterior; otherwise on its mean.
        kl_weight: weight of the KL divergence, which is summed over a latent's dimensions and averaged over the batch.
        recon: "l1" or "l2", the mean over all elements in image units [0, 1].

    Raises:
        BadInput: a source that cannot be had, or that is not an `AutoencoderKL` of RGB images.
    """

    def __init__(
        self,
        *,
        source: str,
        subfolder: str | None = None,
        revision: str | None = None,
        sample_posterior: bool = True,
        kl_weight: float = 1e-6,
        recon: ReconKind = "l1",
    ) -> None:
        folder = find_folder(source, subfolder, revision)
        vae = load_model(AutoencoderKL, folder)
        super().__init__(vae, 2 ** (len(vae.config["block_out_channels"]) - 1), recon, folder)
        self.kl_weight, self.sample_posterior = kl_weight, sample_posterior

    def encode(self, inputs: LabeledImageData) -> Stage1Encodings:
        """Encode (B, 3, H, W) in [0, 1] to the posterior's zs, `mu` and `logvar` (B, C, H/f, W/f), see `posterior`.

        Raises:
            BadInput: a side that the factor does not divide.
        """
        return self.posterior(self.vae.encode(self._pixels(inputs)).latent_dist.parameters, inputs.draws)


class AutoencoderDCStage1(DiffusersStage1):
    """`AutoencoderDC` of diffusers: the deep compression autoencoder of Chen et al. 2024, without a posterior.

    Its factor is 2^(len(encoder_block_out_channels) - 1), 32 to 128 in the published ones.

    Args:
        source: a local folder with config.json and diffusion_pytorch_model.safetensors, or a hub id `owner/name`.
        subfolder: of the source, for example "vae" of a pipeline.
        revision: branch, tag or commit of a hub id.
        recon: "l1" or "l2", the mean over all elements in image units [0, 1].

    Raises:
        BadInput: a source that cannot be had, or that is not an `AutoencoderDC` of RGB images.
    """

    def __init__(
        self, *, source: str, subfolder: str | None = None, revision: str | None = None, recon: ReconKind = "l1"
    ) -> None:
        folder = find_folder(source, subfolder, revision)
        vae = load_model(AutoencoderDC, folder)
        super().__init__(vae, 2 ** (len(vae.config["encoder_block_out_channels"]) - 1), recon, folder)

    def encode(self, inputs: LabeledImageData) -> Stage1Encodings:
        """Encode (B, 3, H, W) in [0, 1] to zs (B, C, H/f, W/f).

        Raises:
            BadInput: a side that the factor does not divide.
        """
        return Stage1Encodings(zs=self.vae.encode(self._pixels(inputs)).latent)


class AutoencoderTinyStage1(DiffusersStage1):
    """`AutoencoderTiny` of diffusers: the distilled autoencoders of madebyollin/taesd, without a posterior.

    Its latents are those of the large model it was distilled from after that model's scale: its own scale is 1. Its
    factor is 2^(len(num_encoder_blocks) - 1). Its decoder bounds latents to (-3, 3) by tanh.

    Args:
        source: a local folder with config.json and diffusion_pytorch_model.safetensors, or a hub id `owner/name`.
        subfolder: of the source.
        revision: branch, tag or commit of a hub id.
        recon: "l1" or "l2", the mean over all elements in image units [0, 1].

    Raises:
        BadInput: a source that cannot be had, that is not an `AutoencoderTiny` of RGB images, or whose decoder
            enlarges by another factor than its encoder shrinks.
    """

    def __init__(
        self, *, source: str, subfolder: str | None = None, revision: str | None = None, recon: ReconKind = "l1"
    ) -> None:
        folder = find_folder(source, subfolder, revision)
        vae = load_model(AutoencoderTiny, folder)
        config: dict[str, Any] = dict(vae.config)
        factor = 2 ** (len(config["num_encoder_blocks"]) - 1)
        enlarged = config["upsampling_scaling_factor"] ** (len(config["num_decoder_blocks"]) - 1)
        if enlarged != factor:
            raise BadInput(f"{folder / CONFIG}: expected a decoder of the encoder's factor {factor}, got {enlarged}")
        super().__init__(vae, factor, recon, folder)

    def encode(self, inputs: LabeledImageData) -> Stage1Encodings:
        """Encode (B, 3, H, W) in [0, 1] to zs (B, C, H/f, W/f).

        Raises:
            BadInput: a side that the factor does not divide.
        """
        return Stage1Encodings(zs=self.vae.encode(self._pixels(inputs)).latents)
