"""The adaptive weight of a GAN loss: it gives both losses gradients of one size, measured at one tensor.

Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", eq. 7, with its code's eps 1e-4 and limit
1e4 (modules/losses/vqperceptual.py). There the norms are of one process's gradients, so that every process weighs the
loss in its own way and the step is no longer that of the whole batch; here they are of the whole batch's.

`mean` is the mean over processes of a tensor, the identity on one. Processes have local batches of one size, and every
loss is a mean over the local batch, so the loss of the whole batch is the mean of theirs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

EPS = 1e-4
LIMIT = 1e4

Mean = Callable[[Tensor], Tensor]


def _gradients(recon_loss: Tensor, gan_loss: Tensor, at: Tensor, scale: Tensor | None) -> Tensor:
    """(2, ...) gradients of both losses at `at`, in at least fp32, without a graph of their own.

    The losses' graph is kept for the step's backward. The scale is for fp16, whose smallest number is 6e-8: a mean over
    32 images of 256 px has gradients of 1.6e-7.
    """
    losses = [loss if scale is None else loss * scale for loss in (recon_loss, gan_loss)]
    pair = torch.stack([torch.autograd.grad(loss, at, retain_graph=True)[0] for loss in losses])
    pair = pair.to(torch.promote_types(pair.dtype, torch.float32))
    return pair if scale is None else pair / scale


def _ratio(norms: Tensor) -> Tensor:
    recon_norm, gan_norm = norms
    ratio = (recon_norm / (gan_norm + EPS)).clamp(0, LIMIT)
    # a gradient that overflowed would otherwise be weighed by 0 or by the limit, as if that had been measured
    return ratio.masked_fill(~norms.isfinite().all(), torch.nan)


def last_layer_weight(
    recon_loss: Tensor, gan_loss: Tensor, last_layer: nn.Parameter, mean: Mean, scale: Tensor | None = None
) -> Tensor:
    """Ratio of the norms of the whole batch's gradients at the decoder's last layer, a scalar in [0, 1e4], detached.

    NaN where a gradient is not finite.

    The gradients are averaged over processes before their norms are taken (one collective of twice the layer's size):
    the mean of local norms would be too large, most of all for the noisier gradient.

    Args:
        recon_loss: all reconstruction losses of the local batch, LPIPS included; scalar.
        gan_loss: the generator's GAN loss of the local batch, unweighted; scalar.
        last_layer: `Stage1Model.get_last_layer()`; both losses must depend on it.
        mean: mean over processes.
        scale: of the losses while gradients are computed, scalar, where that is in fp16; it is divided out.
    """
    gradients = mean(_gradients(recon_loss, gan_loss, last_layer, scale))
    return _ratio(torch.linalg.vector_norm(gradients.flatten(1), dim=1))


def reconstruction_weight(
    recon_loss: Tensor, gan_loss: Tensor, xs_recon: Tensor, mean: Mean, scale: Tensor | None = None
) -> Tensor:
    """Ratio of the norms of the whole batch's gradients at the reconstructed images, a scalar in [0, 1e4], detached.

    Needs no parameter, so it works with any decoder and with sharded weights, and two numbers are communicated.

    With W processes of N numbers each, the whole batch's loss has gradient g_r / W at process r's images, where g_r is
    the gradient of the local loss. Both norms are multiplied by the square root of all W N numbers, which leaves their
    ratio: W N sum_r |g_r|^2 / W^2 = mean_r(N |g_r|^2). In these units the L1 loss has norm 1 at every batch size and
    resolution, whereas 1e-4 would be 35% of the plain norm at 64 images of 256 px.

    Args:
        recon_loss: all reconstruction losses of the local batch, LPIPS included; scalar.
        gan_loss: the generator's GAN loss of the local batch, unweighted; scalar.
        xs_recon: (B, 3, H, W), the tensor both losses were computed from.
        mean: mean over processes.
        scale: see `last_layer_weight`.
    """
    gradients = _gradients(recon_loss, gan_loss, xs_recon, scale).flatten(1)
    return _ratio(mean(xs_recon.numel() * gradients.square().sum(1)).sqrt())
