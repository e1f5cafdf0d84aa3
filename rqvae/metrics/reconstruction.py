"""PSNR and SSIM of reconstructions, per image and as means over a split.

Both have many conventions in the literature, and numbers of different conventions do not compare. Ours are those of
scikit-image on 8-bit RGB images, `psnr_rgb_u8` and `ssim_wang_rgb_u8`: an image is clamped to [0, 1] and rounded to 8
bits, each image is scored over all its channels and pixels, and the scores (not the errors) are averaged over images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rqvae.errors import BadInput

CONVENTIONS = {"psnr": "psnr_rgb_u8", "ssim": "ssim_wang_rgb_u8"}
"""What the scores of `ReconstructionScores` are, for result files."""

UINT8_RULE = "clamped to [0, 1], times 255, rounded to nearest"
"""What `to_uint8` does, for result files."""

MAX_PSNR = 100.0
"""PSNR of identical images in dB: that of a mean squared error of 1e-10."""

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def to_uint8(images: Tensor) -> Tensor:
    """Images as they are stored: [0, 1] floats, clamped, to the nearest of 256 levels.

    Halves go to the even level, as in `torch.round`. Truncation, which much published code uses instead, darkens by
    half a level on average and limits PSNR to 52.9 dB where rounding allows 58.9.

    Args:
        images: float, any shape. Finite: NaN has no 8-bit value; scores that must show it use `to_8bit_levels`.

    Returns:
        uint8, same shape.
    """
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def to_8bit_levels(images: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """`to_uint8(images) / 255` that never leaves floating point: NaN stays NaN, and a broken model gets no score."""
    return images.clamp(0, 1).mul(255).round().to(dtype).div(255)


def psnr(recon_bchw: Tensor, images_bchw: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Peak signal-to-noise ratio of each image, 10 log10(1 / MSE) over all its pixels and channels.

    Two identical images have no finite PSNR, and one such pair would make the mean of a split infinite: the MSE counts
    as 1e-10 at least, so the score is at most `MAX_PSNR`, 100 dB. One level of one channel of one pixel of a 128x128
    image is 95 dB, so the limit hides no difference of images of that size.

    Args:
        recon_bchw: (B, C, H, W) floats in [0, 1].
        images_bchw: same shape.
        dtype: to compute in; float32 on a device without float64.

    Returns:
        (B,) in dB, of `dtype`.

    Raises:
        BadInput: shapes that differ or are not (B, C, H, W).
    """
    _check_pair(recon_bchw, images_bchw)
    mse_b = (recon_bchw.to(dtype) - images_bchw.to(dtype)).square().flatten(1).mean(1)
    return -10 * mse_b.clamp(min=10 ** (-MAX_PSNR / 10)).log10()


def ssim(recon_bchw: Tensor, images_bchw: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004, eq. 13), averaged over channels and window positions.

    Gaussian window 11x11 of sigma 1.5, K1 0.01, K2 0.03, population (co)variances, and only windows that lie within the
    image: scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`. Images
    are not shrunk first, which Wang's later script does for sides above 256.

    Args:
        recon_bchw: (B, C, H, W) floats in [0, 1]; the luminance term is not invariant to a shift, so [-1, 1] would
            give another metric.
        images_bchw: same shape.
        dtype: to compute in; float32 on a device without float64.

    Returns:
        (B,) in [-1, 1], of `dtype`.

    Raises:
        BadInput: shapes that differ, are not (B, C, H, W), or have a side below 11 pixels.
    """
    _check_pair(recon_bchw, images_bchw)
    height, width = images_bchw.shape[-2:]
    if min(height, width) < WINDOW:
        raise BadInput(f"ssim: expected images of at least {WINDOW}x{WINDOW} pixels, got {height}x{width}")
    x, y = recon_bchw.to(dtype), images_bchw.to(dtype)
    return ssim_and_contrast(x, y)[0].mean(1)


def ssim_and_contrast(x_bchw: Tensor, y_bchw: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM of each channel and its factor without luminance, means over the windows within the image, (B, C) each."""
    moments = _window_means(torch.stack([x_bchw, y_bchw, x_bchw * x_bchw, y_bchw * y_bchw, x_bchw * y_bchw]))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = moments
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    variances = mean_xx - mean_x.square() + mean_yy - mean_y.square()
    structure = (2 * (mean_xy - mean_x * mean_y) + c2) / (variances + c2)
    return (luminance * structure).flatten(2).mean(2), structure.flatten(2).mean(2)


class ReconstructionScores:
    """Sums of PSNR and SSIM of 8-bit images, kept on the device and added up over ranks with one all-reduce.

        scores = ReconstructionScores(device)
        for images in split:
            scores.update(reconstruct(images), images)
        result = ReconstructionScores.result(all_reduce(scores.state()))

    Args:
        device: where the sums live; a rank without a single image has sums, too.
        dtype: of scores and sums; float32 on a device without float64.
    """

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> None:
        self._sums = torch.zeros(3, dtype=dtype, device=device)

    def update(self, recon_bchw: Tensor, images_bchw: Tensor, valid_b: Tensor | None = None) -> None:
        """Score a batch; nothing is read back to the host.

        Args:
            recon_bchw: (B, C, H, W) floats; clamped to [0, 1] and rounded to 8 bits here, as are the images.
            images_bchw: same shape.
            valid_b: (B,) bool, False for images that only fill up a batch; None where all count.

        Raises:
            BadInput: see `ssim`.
        """
        dtype = self._sums.dtype
        pair = to_8bit_levels(recon_bchw, dtype), to_8bit_levels(images_bchw, dtype)
        psnr_b, ssim_b = psnr(*pair, dtype=dtype), ssim(*pair, dtype=dtype)
        rows = torch.stack([psnr_b, ssim_b, torch.ones_like(psnr_b)])
        if valid_b is not None:
            # Not a product: 0 x NaN is NaN, and what fills up a batch may be anything.
            rows = torch.where(valid_b, rows, torch.zeros_like(rows))
        self._sums += rows.sum(1)

    def state(self) -> Tensor:
        """(3,) sum of PSNR, sum of SSIM, number of images: to be summed over ranks."""
        return self._sums.clone()

    @staticmethod
    def result(state: Tensor) -> dict[str, float]:
        """Means from the summed state, read by the host: `psnr` in dB, `ssim`, and `n` images.

        A reconstruction that is not finite makes both means NaN.

        Raises:
            BadInput: no image was scored.
        """
        sum_psnr, sum_ssim, n = state.tolist()
        if n < 1:
            raise BadInput("reconstruction scores: expected at least one image, got none")
        return {"psnr": sum_psnr / n, "ssim": sum_ssim / n, "n": int(n)}


def _check_pair(recon_bchw: Tensor, images_bchw: Tensor) -> None:
    shapes = tuple(recon_bchw.shape), tuple(images_bchw.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 4:
        raise BadInput(
            f"recon, images: expected two tensors of one shape (B, C, H, W), got {shapes[0]} and {shapes[1]}"
        )


def _window_means(x_nbchw: Tensor) -> Tensor:
    """Gaussian-weighted means of all windows within the image: (..., H, W) -> (..., H - 10, W - 10)."""
    rows = _band_matrix(x_nbchw.shape[-2], x_nbchw)
    columns = rows if x_nbchw.shape[-1] == x_nbchw.shape[-2] else _band_matrix(x_nbchw.shape[-1], x_nbchw)
    # Two dense products, although 11 of a row's entries are not zero: in float64 on a CPU core they took 29 ms an image
    # of 256x256 and 0.07 ms of 32x32, the separable convolution 116 ms and 1.2 ms.
    return rows @ x_nbchw @ columns.mT


def _band_matrix(size: int, like: Tensor) -> Tensor:
    """(size - 10, size): row i holds the window's weights from column i on."""
    offset = torch.arange(size, device=like.device) - torch.arange(size - WINDOW + 1, device=like.device)[:, None]
    from_centre = (offset - WINDOW // 2).to(like.dtype)
    weight = torch.exp(-from_centre.square() / (2 * SIGMA**2))
    weight = torch.where((offset >= 0) & (offset < WINDOW), weight, torch.zeros_like(weight))
    return weight / weight[:1].sum()
