"""Datasets, transforms and the feed. A new dataset is one file and one `class_path`."""

from rqvae.img_datasets.interfaces import (
    ActionCondition,
    ClassCondition,
    Condition,
    DataSpec,
    LabeledImageData,
    LabeledImageDataset,
    LabeledImageDatasetWrapper,
    MaskCondition,
    Split,
    Transform,
)

__all__ = [
    "ActionCondition",
    "ClassCondition",
    "Condition",
    "DataSpec",
    "LabeledImageData",
    "LabeledImageDataset",
    "LabeledImageDatasetWrapper",
    "MaskCondition",
    "Split",
    "Transform",
]
