"""A loss that a config adds to those of the Stage1 model."""

from __future__ import annotations

from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.models.interfaces import LabeledImageData, Stage1ModelOutput

TAKEN = ("total", "recon", "latent", "lpips", "gan", "disc")


class ImageLoss(nn.Module):
    """A term of the autoencoder's total: `weight * forward(output, inputs)`, logged unweighted as `train/loss_NAME`.

    It compares a reconstruction with its images, or asks anything else of the model's output (a latent in
    `additional_attr`, a label in `inputs.condition`). What it holds is frozen, stays in eval mode and is in no
    checkpoint: a network with given weights may be in it, something to be trained may not.

    Args:
        name: in the log; letters, digits and underscores, and none of total, recon, latent, lpips, gan, disc.
        weight: of the term in the total, >= 0.

    Raises:
        BadInput: another name, or a negative weight.
    """

    def __init__(self, name: str, weight: float = 1.0) -> None:
        super().__init__()
        if not name.isidentifier() or name in TAKEN:
            raise BadInput(f"losses: expected a name of letters and digits, none of {', '.join(TAKEN)}, got {name!r}")
        if not weight >= 0:
            raise BadInput(f"losses: expected {name}'s weight to be at least 0, got {weight}")
        self.name, self.weight = name, weight

    def forward(self, output: Stage1ModelOutput, inputs: LabeledImageData) -> Tensor:
        """The loss of a batch, a scalar with a gradient to `output`.

        Args:
            output: `xs_recon` (B, 3, H, W), not clamped, and what the model put into `additional_attr`.
            inputs: `img` (B, 3, H, W) in [0, 1] and all else of the batch.
        """
        raise NotImplementedError
