"""An image of any size from a mask of any size, by a generator of small ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the name everyone knows)
from torch import Tensor

from rqvae.diffusion.canvas import Order, Tile, Tilings, walk
from rqvae.diffusion.denoiser import Denoiser
from rqvae.errors import BadInput, RunFailed
from rqvae.img_datasets.interfaces import MaskCondition
from rqvae.metrics.reconstruction import to_uint8
from rqvae.models.interfaces import Stage1Encodings
from rqvae.models.stage2.diffusion import LatentDiffusion
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import generator


@dataclass(frozen=True)
class CanvasRequest:
    """How a canvas is sampled.

    Args:
        steps: DDIM steps; None is the model's own.
        overlap: positions of the latent that a window sees beside what is kept of it; None is a quarter of a tile.
        seed: of noise and shifts.
        batch_size: tiles of one call of the model.
        shifted: see `Tilings`.
    """

    steps: int | None = None
    overlap: int | None = None
    seed: int = 0
    batch_size: int = 16
    shifted: bool = True

    def __post_init__(self) -> None:
        for name, value in (("--steps", self.steps), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise BadInput(f"{name}: expected at least 1, got {value}")


def sample_canvas(
    two_stage: TwoStage, mask_hw: Tensor, request: CanvasRequest, order: Order | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Sample the image of a mask.

    Memory is that of two latents of the canvas, of the image in floats, and of one batch of tiles.

    Args:
        two_stage: with a `LatentDiffusion` on masks, in eval mode.
        mask_hw: (H, W) int64 in [0, K], K where there is no label; any sides. Up to the tile's, and to a multiple of
            the latent's position, it is continued by its last row and column, and the image is cut off again.
        request: how.
        order: in which tiles are computed; the image does not depend on it.

    Returns:
        (H, W, 3) uint8, and facts: `tiles` a step, `steps`, `seam_ratio` (see `seam_ratio`).

    Raises:
        BadInput: another model; an overlap that is as wide as a tile.
    """
    stage2 = two_stage.stage2
    if not isinstance(stage2, LatentDiffusion) or stage2.layout_classes == 0:
        raise BadInput("canvas: expected a LatentDiffusion on masks")
    (channels, h, w), (_, image_height, image_width) = two_stage.latent_shape, two_stage.image_shape
    factor = (image_height // h, image_width // w)
    padded = _padded(mask_hw, (image_height, image_width), factor).to(next(stage2.parameters()).device)
    canvas = (padded.shape[0] // factor[0], padded.shape[1] // factor[1])
    overlap = min(h, w) // 4 if request.overlap is None else request.overlap
    tilings = Tilings(canvas, (h, w), overlap, request.seed, request.shifted)
    sampler = stage2.sampler
    times = (sampler if request.steps is None else replace(sampler, steps=request.steps)).times()
    noise = torch.randn((channels, *canvas), generator=generator(request.seed, "canvas noise")).to(padded.device)

    def denoiser(tiles: list[Tile]) -> Denoiser:
        starts = [(tile.top * factor[0], tile.left * factor[1]) for tile in tiles]
        masks = [padded[top : top + image_height, left : left + image_width] for top, left in starts]
        return stage2.denoiser(MaskCondition(torch.stack(masks), stage2.layout_classes))

    latent_chw, index_hw = walk(noise, denoiser, times, tilings, request.batch_size, order)
    assert bool((index_hw == len(times) - 1).all()), "a tiling keeps every position once"
    image = decode_canvas(two_stage, latent_chw, request.batch_size)
    edges = tilings.edges(len(times) - 2)
    ratio = seam_ratio(image, [[edge * f for edge in cut] for cut, f in zip(edges, factor, strict=True)], factor)
    facts = {"tiles": len(tilings.at(len(times) - 2)), "steps": len(times) - 1, "overlap": overlap, "seam_ratio": ratio}
    return image[: mask_hw.shape[0], : mask_hw.shape[1]], facts


@torch.no_grad()
def decode_canvas(two_stage: TwoStage, latent_chw: Tensor, batch_size: int) -> np.ndarray:
    """(H, W, 3) uint8: tiles at half a tile's distance, blended by squared sines (Hann), which sum to one."""
    (_, h, w), (_, height, width) = two_stage.latent_shape, two_stage.image_shape
    factor = (height // h, width // w)
    starts = [_half_steps(side, part) for side, part in zip(latent_chw.shape[1:], (h, w), strict=True)]
    sides = [side * f for side, f in zip(latent_chw.shape[1:], factor, strict=True)]
    sums_chw, weights = torch.zeros(3, *sides), [torch.zeros(side) for side in sides]
    hann = [torch.sin((torch.arange(side) + 0.5) * (torch.pi / side)).square() for side in (height, width)]
    for axis in (0, 1):
        for start in starts[axis]:
            first = start * factor[axis]
            weights[axis][first : first + len(hann[axis])] += hann[axis]
    places = [(top, left) for top in starts[0] for left in starts[1]]
    for begin in range(0, len(places), batch_size):
        batch = places[begin : begin + batch_size]
        zs = torch.stack([latent_chw[:, top : top + h, left : left + w] for top, left in batch])
        decoded = two_stage.stage1.decode(two_stage.connector.reverse(Stage1Encodings(zs))).xs_recon.float().cpu()
        for (top, left), part in zip(batch, decoded, strict=True):
            y, x = top * factor[0], left * factor[1]
            sums_chw[:, y : y + height, x : x + width] += part * hann[0][:, None] * hann[1]
    sums_chw /= weights[0][:, None]
    sums_chw /= weights[1]
    if broken := int((~sums_chw.isfinite()).any(0).sum()):
        raise RunFailed(f"canvas: {broken} of {sums_chw[0].numel()} pixels are not finite")
    return to_uint8(sums_chw[None])[0].permute(1, 2, 0).numpy()


def seam_ratio(image_hwc: np.ndarray, edges: list[list[int]], factor: tuple[int, int]) -> float:
    """Mean absolute difference of neighbours across the last tiling's seams, over that across other positions' edges.

    Both are taken where two positions of the latent meet, as pixels of one position may differ less than others.

    Args:
        image_hwc: (H, W, 3) uint8.
        edges: rows and columns where tiles begin, the image's sides among them.
        factor: pixels of a position of the latent.

    Returns:
        1 for seams that cannot be seen; NaN where there is no seam, or nothing else.
    """
    seams, others = [], []
    for axis in (0, 1):
        lines = np.moveaxis(image_hwc, axis, 0)
        meets = np.arange(factor[axis], len(lines), factor[axis])
        steps = np.array([np.abs(lines[i].astype(np.int16) - lines[i - 1]).mean() for i in meets])
        at_seam = np.isin(meets, edges[axis])
        seams += steps[at_seam].tolist()
        others += steps[~at_seam].tolist()
    return float(np.mean(seams) / np.mean(others)) if seams and others else float("nan")


def _padded(mask_hw: Tensor, tile: tuple[int, int], factor: tuple[int, int]) -> Tensor:
    """The mask, at least as large as a tile, its sides multiples of the latent's position."""
    wanted = [max(t, -(-side // f) * f) for side, t, f in zip(mask_hw.shape, tile, factor, strict=True)]
    more = (0, wanted[1] - mask_hw.shape[1], 0, wanted[0] - mask_hw.shape[0])
    return F.pad(mask_hw[None, None].double(), more, mode="replicate")[0, 0].long()


def _half_steps(side: int, part: int) -> list[int]:
    """Starts of windows of `part` on `side`, half a window apart, the last at the end."""
    return sorted({*range(0, side - part + 1, max(1, part // 2)), side - part})
