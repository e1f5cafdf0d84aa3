"""Tissue images with segmentation masks, labelled and unlabelled together."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.img_datasets.class_draws import ClassDraws, cutoffs
from rqvae.img_datasets.image_folder import read_image
from rqvae.img_datasets.interfaces import DataSpec, LabeledImageData, LabeledImageDataset, MaskCondition, Split
from rqvae.img_datasets.mask_files import INDEX_NAME, check_apart, image_names, mask_of, read_index, read_mask
from rqvae.img_datasets.stratified import held_out

_log = logging.getLogger(__name__)


class MaskDataset(LabeledImageDataset):
    """Images whose condition is a mask: class-balanced draws, and the one place where masks are dropped.

    A subclass fills `_present` in `open` and gives samples with a `MaskCondition`. Training draws as `ClassDraws`
    says. A draw of the unconditional slot comes with the null mask (every pixel has the number K), which models embed
    by a vector of its own; so does an unlabelled image. Validation and test are walked in file order, masks and all.

    Args:
        split: train, val or test.
        size: side of the square that the transform crops, in pixels.
        num_classes: K, classes of the masks, numbered from 0.
        p_cond: probability that a training sample is drawn for a class and keeps its mask; null draws every image once
            an epoch with its mask, and leaves dropping to the model (`stage2.drop_condition`).
        unknown_class: class number that means "not known": it is drawn by unconditional draws alone; null where each
            class means something.
        names: of the classes, for logs.

    Raises:
        BadInput: a number out of its range, or another number of names.
    """

    def __init__(
        self,
        split: Split,
        *,
        size: int,
        num_classes: int,
        p_cond: float | None,
        unknown_class: int | None,
        names: Sequence[str],
    ) -> None:
        if size < 1 or num_classes < 1 or num_classes > 255:
            raise BadInput(f"size, num_classes: expected size >= 1, classes 1 to 255, got {size}, {num_classes}")
        if unknown_class is not None and not 0 <= unknown_class < num_classes:
            raise BadInput(f"unknown_class: expected null or a number below {num_classes}, got {unknown_class}")
        if names and len(names) != num_classes:
            raise BadInput(f"names: expected {num_classes} (num_classes), got {len(names)}")
        if p_cond is not None:
            cutoffs(p_cond, max(1, num_classes - (unknown_class is not None)))
        self.split, self.size, self.num_classes, self.names = split, size, num_classes, tuple(names)
        self.p_cond, self.unknown_class = p_cond, unknown_class
        self._present = torch.empty(0, num_classes, dtype=torch.bool)

    @property
    def spec(self) -> DataSpec:
        """(3, size, size), masks of `num_classes` classes, and whether the dataset drops them."""
        return DataSpec(
            (3, self.size, self.size),
            num_mask_classes=self.num_classes,
            names=self.names,
            drops_condition=self.p_cond is not None and self.p_cond < 1,
        )

    def __len__(self) -> int:
        return len(self._present)

    def order(self, seed: int, epoch: int) -> Tensor:
        """(N,) draws with replacement, or a permutation without `p_cond`."""
        return super().order(seed, epoch) if self.p_cond is None else self._draws(self.p_cond).draw(seed, epoch)[1]

    def dropped(self, seed: int, epoch: int) -> Tensor | None:
        """(N,) bool, the unconditional draws; None without `p_cond`."""
        slots = self.slots(seed, epoch)
        return None if slots is None else slots == 0

    def slots(self, seed: int, epoch: int) -> Tensor | None:
        """(N,) int64, what each draw was for: 0 is unconditional, k > 0 the k-th class; None without `p_cond`."""
        return None if self.p_cond is None else self._draws(self.p_cond).draw(seed, epoch)[0]

    def labelled_images(self) -> Tensor:
        """(n,) int64, the images that have a mask."""
        return self._present.any(1).nonzero()[:, 0]

    def null(self) -> MaskCondition:
        """No mask."""
        mask = torch.full((self.size, self.size), self.num_classes)
        return MaskCondition(mask, self.num_classes)

    def _draws(self, p_cond: float) -> ClassDraws:
        return ClassDraws(self._present, p_cond, self.unknown_class, self.names)

    def _take(self, present_nk: Tensor) -> None:
        """Know which classes (N, K) each image of the split holds, say so, and check that they can be drawn."""
        self._present = present_nk
        unlabelled = int((~present_nk.any(1)).sum())
        counts = present_nk.sum(0).tolist()
        _log.info("%s: %d images, %d unlabelled, class counts %s", self.split, len(self), unlabelled, counts)
        if self.split == "train" and self.p_cond is not None:
            draws = self._draws(self.p_cond)
            edges = [round(edge, 6) for edge in cutoffs(self.p_cond, len(draws.classes)).tolist()]
            _log.info("train: draws by p_cond %g, cutoffs %s", self.p_cond, edges)


class Pathology(MaskDataset):
    """A folder of `NAME.jpg` with `NAME_mask.png`, and one of images without masks.

    The split is by whole images, or by whole slides, stratified by the classes they hold; the classes are counted
    once and kept in an index. Files of equal bytes are one image: they are in one split, whatever their names.
    Unlabelled images are for training only; those of slides that are held out are left out.

    Args:
        split: train, val or test.
        data_folder: images and masks.
        size: side of the square that the transform crops, in pixels.
        num_classes: K, classes of the masks, numbered from 0.
        unlabelled: folder of images without masks; null is without.
        p_cond: probability that a training sample is drawn for a class and keeps its mask; null draws every image once
            an epoch with its mask, and leaves dropping to the model (`stage2.drop_condition`).
        unknown_class: class number that means "not known": it is drawn by unconditional draws alone; null where each
            class means something.
        test_share: of the labelled images, for the test split.
        val_share: the same for validation; at 0 it is the test split.
        slide: regular expression whose first group is the slide in a file's name, for a split by slides; null splits
            by images.
        index: file that the class counts are kept in; null is mask_index.json in `data_folder`.
        names: of the classes, for logs.

    Raises:
        BadInput: a number out of its range, a regular expression that is none or has no group.
    """

    def __init__(
        self,
        split: Split,
        *,
        data_folder: str,
        size: int,
        num_classes: int,
        unlabelled: str | None = None,
        p_cond: float | None = 0.5,
        unknown_class: int | None = 0,
        test_share: float = 0.1,
        val_share: float = 0.0,
        slide: str | None = None,
        index: str | None = None,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(
            split, size=size, num_classes=num_classes, p_cond=p_cond, unknown_class=unknown_class, names=names
        )
        if not (0 < test_share < 1 and 0 <= val_share < 1 - test_share):
            raise BadInput(
                f"test_share, val_share: expected shares that leave some to train, got {test_share}, {val_share}"
            )
        self.folder, self.unlabelled = Path(data_folder), Path(unlabelled) if unlabelled else None
        self.shares, self.slide = (test_share, val_share), slide
        self.index = Path(index) if index else self.folder / INDEX_NAME
        try:
            self._pattern = re.compile(slide) if slide is not None else None
        except re.error as error:
            raise BadInput(f"slide: expected a regular expression, got {slide}: {error}") from error
        if self._pattern is not None and self._pattern.groups < 1:
            raise BadInput(f"slide: expected a regular expression with a group, got {slide}")
        self._paths: list[Path] = []
        self._twins: dict[str, str] = {}
        self._digest = ""

    def open(self) -> None:
        """Read or make the index, split, count.

        Raises:
            BadInput: files that are missing, wrong, or in both folders; a split without images; a class without
                images in training.
        """
        index = read_index(self.folder, self.num_classes, self.index)
        others = image_names(self.unlabelled) if self.unlabelled else []
        if self.unlabelled:
            check_apart(self.folder, index.names, self.unlabelled, others)
        present = index.pixels_nk > 0
        self._twins = index.twins
        if index.twins:
            one, other = next(iter(index.twins.items()))
            _log.warning("%s: %d images are copies of others (%s of %s)", self.folder, len(index.twins), one, other)
        kinds = self._kinds(index.names, present)
        mine: Split = "test" if self.split == "val" and not self.shares[1] else self.split
        chosen = [i for i, name in enumerate(index.names) if kinds[self._group(name)] == mine]
        if not chosen:
            key = "val_share" if mine == "val" else "test_share"
            share = self.shares[mine == "val"]
            raise BadInput(
                f"{key}: expected a share that gives the {mine} split an image, got {share:g} of {len(index.names)}"
            )
        self._paths = [self.folder / index.names[i] for i in chosen]
        rows = present[torch.tensor(chosen, dtype=torch.int64)]
        if self.unlabelled and mine == "train":
            extra = [name for name in others if kinds.get(self._group(name), mine) == mine]
            self._paths += [self.unlabelled / name for name in extra]
            rows = torch.cat([rows, torch.zeros(len(extra), self.num_classes, dtype=torch.bool)])
        names = "\n".join([index.key, *(f"{path.name} {path.stat().st_size}" for path in self._paths)])
        self._digest = hashlib.sha256(names.encode()).hexdigest()
        self._take(rows)

    def _kinds(self, names: Sequence[str], present_nk: Tensor) -> dict[str, Split]:
        """The split of each group."""
        groups: dict[str, list[frozenset[int]]] = {}
        for name, classes in zip(names, present_nk.tolist(), strict=True):
            labels = frozenset(k for k, there in enumerate(classes) if there)
            groups.setdefault(self._group(name), []).append(labels)
        test = held_out(groups, self.shares[0], "test")
        rest = {name: labels for name, labels in groups.items() if name not in test}
        val = held_out(rest, self.shares[1] / (1 - self.shares[0]), "val")
        return {name: "test" if name in test else "val" if name in val else "train" for name in groups}

    def _group(self, name: str) -> str:
        """The slide, or the image itself; a copy belongs to the group of its original."""
        name = self._twins.get(name, name)
        stem = Path(name).stem
        if self._pattern is None:
            return stem
        if (found := self._pattern.search(stem)) is None or found.group(1) is None:
            raise BadInput(f"slide: expected a match of {self.slide} in every file's name, got {name}")
        return found.group(1)

    def fingerprint(self) -> str:
        """Of the files' names, sizes and times, and of the draws."""
        return f"Pathology:{self.split}:{self.size}:{self.p_cond}:{self.unknown_class}:{self.shares}:{self._digest}"

    def without_image(self, index: int) -> LabeledImageData:
        """Mask and file."""
        path = self._paths[index]
        if not self._present[index].any():
            return LabeledImageData(condition=self.null(), img_path=str(path))
        mask = read_mask(mask_of(path), self.num_classes)
        return LabeledImageData(condition=MaskCondition(mask, self.num_classes), img_path=str(path))

    def __getitem__(self, index: int) -> LabeledImageData:
        """`img` uint8 (3, H0, W0), `condition` a mask of its size, all null for an unlabelled image.

        Raises:
            BadInput: an image or a mask that cannot be read.
        """
        img, sample = read_image(str(self._paths[index])), self.without_image(index)
        if not self._present[index].any():
            sample.condition = replace(self.null(), mask=torch.full(img.shape[1:], self.num_classes))
        return replace(sample, img=img)
