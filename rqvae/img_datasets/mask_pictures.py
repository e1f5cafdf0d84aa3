"""The masks of a dataset as images, one colour a class: what a generator of masks learns from."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import DataSpec, LabeledImageData, LabeledImageDataset, MaskCondition, Split
from rqvae.img_datasets.pathology import MaskDataset
from rqvae.mask_colours import palette


class MaskPictures(LabeledImageDataset):
    """The coloured masks of another dataset's labelled images, without a condition.

    Args:
        split: train, val or test.
        masks: class of that dataset, with its arguments; its images are not read.

    Raises:
        BadInput: a dataset without masks.
    """

    def __init__(self, split: Split, *, masks: Callable[[Split], LabeledImageDataset]) -> None:
        source = masks(split)
        if not isinstance(source, MaskDataset):
            raise BadInput(f"masks: expected a dataset with masks, got {type(source).__name__}")
        self.split, self.source = split, source
        self._labelled = torch.empty(0, dtype=torch.int64)

    @property
    def spec(self) -> DataSpec:
        """(3, H, W) of the masks and how many classes they have; no condition."""
        spec = self.source.spec
        return DataSpec(spec.image_shape, mask_colours=spec.num_mask_classes, names=spec.names)

    def open(self) -> None:
        """Open that dataset and find its labelled images.

        Raises:
            BadInput: what it says; none is labelled.
        """
        self.source.open()
        self._labelled = self.source.labelled_images()
        if not len(self._labelled):
            raise BadInput(f"masks: expected labelled images in the {self.split} split, got none")

    def fingerprint(self) -> str:
        """That of the dataset."""
        return f"MaskPictures:{self.source.fingerprint()}"

    def __len__(self) -> int:
        return len(self._labelled)

    def __getitem__(self, index: int) -> LabeledImageData:
        """`img` uint8 (3, H, W), the mask in the colours of `rqvae.mask_colours`."""
        sample = self.source.without_image(int(self._labelled[index]))
        condition = sample.condition
        assert isinstance(condition, MaskCondition)
        colours = torch.from_numpy(palette(condition.num_classes))
        return LabeledImageData(img=colours[condition.mask].permute(2, 0, 1).contiguous(), img_path=sample.img_path)
