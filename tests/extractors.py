"""A feature network for tests, named by class_path: a few random projections, no weights on the disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import Self

from rqvae.metrics.extractors import Extractor, Features


class Projections(Extractor):
    """8 random projections of the pixels; writes each image's sha256 where `hashes` says.

    Args:
        hashes: folder that gets `RANK.txt`.
        seed: of the projections.
    """

    name = "fd_projections"
    dim = 8

    def __init__(self, *, hashes: str | None = None, seed: int = 0) -> None:
        super().__init__()
        self.hashes, self.seed = hashes, seed

    def load(self) -> Self:
        return self

    def forward(self, images_bchw_u8: Tensor) -> Features:
        assert images_bchw_u8.dtype == torch.uint8
        if self.hashes is not None:
            with (Path(self.hashes) / f"{os.environ.get('RANK', '0')}.txt").open("a") as file:
                for image in images_bchw_u8:
                    file.write(hashlib.sha256(image.cpu().contiguous().numpy().tobytes()).hexdigest() + "\n")
        flat = images_bchw_u8.flatten(1).double() / 255
        generator = torch.Generator().manual_seed(self.seed)
        matrix = torch.randn(flat.shape[1], self.dim, generator=generator, dtype=torch.float64)
        return Features((flat @ matrix.to(flat.device)).float())

    def identity(self) -> dict[str, str]:
        return {"extractor": f"projections-{self.seed}", "weights_sha256": "", "resize": "none", "scaling": "unit"}
