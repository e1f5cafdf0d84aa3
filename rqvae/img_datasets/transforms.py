"""Transforms, one named class per purpose: training may augment, validation and test never do.

They bring an image to the size of the `DataSpec` as the ADM code does (guided-diffusion, `image_datasets.py`,
`center_crop_arr`; Dhariwal and Nichol 2021), because FID references of ImageNet are computed on images cropped so.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import DataSpec, LabeledImageData, MaskCondition, Transform


class TrainTransform(Transform):
    """ADM crop to the spec's size, then a horizontal flip of every second image in the mean.

    Args:
        spec: gives the size.
        flip: whether to flip at all.
    """

    def __init__(self, spec: DataSpec, *, flip: bool = True) -> None:
        self.spec, self.flip = spec, flip

    def __call__(self, sample: LabeledImageData, rng: torch.Generator) -> LabeledImageData:
        """Sample with `img` uint8 (3, H0, W0) -> (3, H, W); a mask is cropped and flipped with its image."""
        return self.variant(sample, self.choose(rng))

    @property
    def variants(self) -> tuple[str, ...]:
        """Both flips, or the one there is."""
        return ("as stored", "flipped") if self.flip else ("as stored",)

    def choose(self, rng: torch.Generator) -> Tensor:
        """0 as stored, 1 flipped; takes one number of `rng` where there is a choice."""
        return (torch.rand((), generator=rng) < 0.5).long() if self.flip else super().choose(rng)

    def variant(self, sample: LabeledImageData, choice: Tensor) -> LabeledImageData:
        """Cropped, and flipped where `choice` is 1; without an image, its mask alone."""
        sample = crop_sample(sample, self.spec)
        if not self.flip:
            return sample
        # torch.where and not `if`: a tensor that decides a branch is a host sync, which training steps forbid.
        flipped, img = choice == 1, sample.img
        if img is not None:
            sample = replace(sample, img=torch.where(flipped, img.flip(-1), img))
        if isinstance(sample.condition, MaskCondition):
            mask = torch.where(flipped, sample.condition.mask.flip(-1), sample.condition.mask)
            sample = replace(sample, condition=replace(sample.condition, mask=mask))
        return sample


class _OneResult(Transform):
    """A transform without a choice."""

    @property
    def variants(self) -> tuple[str, ...]:
        """The one result."""
        return ("as stored",)


class ValTransform(_OneResult):
    """ADM crop to the spec's size.

    Args:
        spec: gives the size.
    """

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec

    def __call__(self, sample: LabeledImageData, rng: torch.Generator) -> LabeledImageData:  # noqa: ARG002
        """Sample with `img` uint8 (3, H0, W0) -> (3, H, W); `rng` is not used."""
        return crop_sample(sample, self.spec)


class TestTransform(_OneResult):
    """ADM crop to the spec's size; never an augmentation.

    Args:
        spec: gives the size.
    """

    __test__ = False  # its name makes pytest take it for a class of tests

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec

    def __call__(self, sample: LabeledImageData, rng: torch.Generator) -> LabeledImageData:  # noqa: ARG002
        """Sample with `img` uint8 (3, H0, W0) -> (3, H, W); `rng` is not used."""
        return crop_sample(sample, self.spec)


class DihedralTransform(Transform):
    """ADM crop, then one of the square's eight symmetries: a section of tissue has no up, down, left or right.

    Args:
        spec: gives the size.

    Raises:
        BadInput: a size that is not square.
    """

    def __init__(self, spec: DataSpec) -> None:
        if spec.image_shape[1] != spec.image_shape[2]:
            raise BadInput(f"train_transform: expected square images for quarter turns, got {spec.image_shape[1:]}")
        self.spec = spec

    def __call__(self, sample: LabeledImageData, rng: torch.Generator) -> LabeledImageData:
        """Sample with `img` uint8 (3, H0, W0) -> (3, H, W); a mask is turned with its image."""
        return self.variant(sample, self.choose(rng))

    @property
    def variants(self) -> tuple[str, ...]:
        """The eight, by what is done in turn: transpose, flip rows, flip columns."""
        flips = ("as stored", "rows flipped", "columns flipped", "half turn")
        return flips + tuple(f"transposed, {name}" for name in flips)

    def choose(self, rng: torch.Generator) -> Tensor:
        """One of 0 to 7; takes one number of `rng`."""
        return torch.randint(8, (), generator=rng)

    def variant(self, sample: LabeledImageData, choice: Tensor) -> LabeledImageData:
        """Cropped and turned; without an image, its mask alone."""
        sample = crop_sample(sample, self.spec)
        if sample.img is not None:
            sample = replace(sample, img=_turned(sample.img, choice))
        if isinstance(sample.condition, MaskCondition):
            sample = replace(sample, condition=replace(sample.condition, mask=_turned(sample.condition.mask, choice)))
        return sample


def _turned(x: Tensor, choice: Tensor) -> Tensor:
    """A symmetry of the last two axes; `choice` is never read on the host, see `TrainTransform.variant`."""
    x = torch.where(choice >= 4, x.transpose(-1, -2), x)
    x = torch.where(choice % 2 == 1, x.flip(-2), x)
    return torch.where(choice % 4 >= 2, x.flip(-1), x)


class Identity(_OneResult):
    """For frames and patches, which have their size already.

    Args:
        spec: gives the size to check.
    """

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec

    def __call__(self, sample: LabeledImageData, rng: torch.Generator) -> LabeledImageData:  # noqa: ARG002
        """The sample itself; BadInput if its image has another shape than the spec's."""
        if sample.img is None:
            return sample
        shape = tuple(sample.img.shape)
        if shape != tuple(self.spec.image_shape):
            raise BadInput(f"img: expected {tuple(self.spec.image_shape)}, got {shape}; use a transform that resizes")
        return sample


def crop_sample(sample: LabeledImageData, spec: DataSpec) -> LabeledImageData:
    """The sample with image and mask, as far as it has them, cropped to the spec's (H, W).

    Raises:
        BadInput: an image that is not uint8 (3, H0, W0), or a mask of another size than its image.
    """
    img, target = sample.img, spec.image_shape[1:]
    if img is None:
        if isinstance(sample.condition, MaskCondition):
            mask = center_crop_mask(sample.condition.mask, target)
            return replace(sample, condition=replace(sample.condition, mask=mask))
        return sample
    if img.dtype != torch.uint8 or img.ndim != 3 or img.shape[0] != 3:
        raise BadInput(f"img: expected uint8 (3, H, W), got {str(img.dtype).removeprefix('torch.')} {tuple(img.shape)}")
    cropped = replace(sample, img=center_crop(img, target))
    if isinstance(sample.condition, MaskCondition):
        mask = sample.condition.mask
        if mask.shape != img.shape[1:]:
            raise BadInput(f"condition.mask: expected {tuple(img.shape[1:])} as its image, got {tuple(mask.shape)}")
        cropped.condition = replace(sample.condition, mask=center_crop_mask(mask, target))
    return cropped


def center_crop(img_chw: Tensor, target: tuple[int, int]) -> Tensor:
    """Resize so that the target just fits in, then cut out the middle.

    While both sides are at least twice the target the image is halved with BOX, which averages 2x2 pixels and so does
    not alias; BICUBIC does the rest. For square targets this is ADM's `center_crop_arr`, pixel for pixel.

    Args:
        img_chw: uint8 (3, H0, W0) of any size.
        target: (H, W).

    Returns:
        uint8 (3, H, W); the image itself if it has that size.
    """
    if tuple(img_chw.shape[1:]) == tuple(target):
        return img_chw
    image = Image.fromarray(img_chw.permute(1, 2, 0).contiguous().numpy())
    halves, final = _sizes((image.height, image.width), target)
    for height, width in halves:
        image = image.resize((width, height), Image.Resampling.BOX)
    image = image.resize((final[1], final[0]), Image.Resampling.BICUBIC)
    resized = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return _middle(resized, target).contiguous()


def center_crop_mask(mask_hw: Tensor, target: tuple[int, int]) -> Tensor:
    """The part of a mask (H0, W0) of any integer type that `center_crop` keeps of its image, NEAREST: (H, W)."""
    if tuple(mask_hw.shape) == tuple(target):
        return mask_hw
    height, width = mask_hw.shape
    _, final = _sizes((height, width), target)
    rows = ((torch.arange(final[0], dtype=torch.float64) + 0.5) * height / final[0]).long()
    columns = ((torch.arange(final[1], dtype=torch.float64) + 0.5) * width / final[1]).long()
    return _middle(mask_hw[rows][:, columns], target).contiguous()


def _sizes(size: tuple[int, int], target: tuple[int, int]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Sizes (height, width) after each halving, and the final one, which covers the target."""
    height, width = size
    halves = []
    while height >= 2 * target[0] and width >= 2 * target[1]:
        height, width = height // 2, width // 2
        halves.append((height, width))
    scale = max(target[0] / height, target[1] / width)
    return halves, (max(target[0], round(height * scale)), max(target[1], round(width * scale)))


def _middle(x: Tensor, target: tuple[int, int]) -> Tensor:
    """The central (H, W) of the last two axes."""
    top, left = (x.shape[-2] - target[0]) // 2, (x.shape[-1] - target[1]) // 2
    return x[..., top : top + target[0], left : left + target[1]]
