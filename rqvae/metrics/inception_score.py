"""Inception Score of Salimans et al. 2016, exp of the mean KL divergence of predictions from their mean, in splits.

The score depends on the number of splits and on the order of the images: files in the order of their classes give 41
where a shuffled order gives 159. Hence both are part of the key.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rqvae.errors import BadInput

ADM_SPLIT = 5000


class InceptionScore:
    """Sums of predictions of each split, 8 KiB a split, added up over ranks with one all-reduce.

    Args:
        split_of: (N,) the split of each position.
        classes: 1008 for the network of FID.
    """

    def __init__(self, split_of: Tensor, classes: int = 1008) -> None:
        if not len(split_of):
            raise BadInput("Inception Score: expected at least one image, got none")
        self.split_of = split_of
        splits = int(split_of.max()) + 1
        # Of each split: sum of p (classes), sum of p log p, and the number of images.
        self._sums = torch.zeros(splits, classes + 2, dtype=torch.float64)

    @classmethod
    def shuffled(cls, n: int, splits: int = 10, seed: int = 2020, classes: int = 1008) -> InceptionScore:
        """Equal splits of a seeded permutation, that of torch-fidelity where the seed is 2020.

        Raises:
            BadInput: fewer images than splits.
        """
        if n < splits:
            raise BadInput(f"Inception Score: expected at least {splits} images for {splits} splits, got {n}")
        # RandomState, NumPy's frozen legacy generator: the same permutation as torch-fidelity's.
        permutation = np.random.RandomState(seed).permutation(n)
        split_of = np.zeros(n, np.int64)
        for split in range(splits):
            split_of[permutation[split * n // splits : (split + 1) * n // splits]] = split
        return cls(torch.from_numpy(split_of), classes)

    @classmethod
    def in_file_order(cls, n: int, size: int = ADM_SPLIT, classes: int = 1008) -> InceptionScore:
        """Consecutive splits of `size` images, a short last one included: openai/guided-diffusion, evaluator.py."""
        return cls(torch.arange(n) // size, classes)

    def update(self, logits: Tensor, positions: Tensor) -> None:
        """Add predictions.

        Args:
            logits: (B, classes) float, any device; log_softmax is taken in float64, so no probability underflows to 0.
            positions: (B,) int64, the place of each in the order of the images.

        Raises:
            BadInput: logits that are not finite, or a position that there is not.
        """
        logits = logits.detach().to("cpu", torch.float64)
        if logits.ndim != 2 or logits.shape[1] != self._sums.shape[1] - 2 or len(logits) != len(positions):
            classes = self._sums.shape[1] - 2
            raise BadInput(f"logits: expected ({len(positions)}, {classes}), got {tuple(logits.shape)}")
        if not bool(torch.isfinite(logits).all()):
            raise BadInput("logits: expected finite numbers, got NaN or infinity")
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < len(self.split_of):
            raise BadInput(f"positions: expected 0 to {len(self.split_of) - 1}, got up to {int(positions.max())}")
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        rows = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones(len(p), 1, dtype=torch.float64)], 1)
        self._sums.index_add_(0, self.split_of[positions.cpu()], rows)

    def state(self) -> Tensor:
        """(splits, classes + 2) float64: to be summed over ranks."""
        return self._sums.clone()

    def replace(self, state: Tensor) -> None:
        """Take the state that was summed over ranks."""
        self._sums = state.clone()

    def result(self) -> tuple[float, float]:
        """Mean over splits, and their standard deviation (ddof 0).

        Raises:
            BadInput: not as many positions were seen as there are.
        """
        sums = self._sums
        counts = sums[:, -1]
        expected = torch.bincount(self.split_of, minlength=len(sums)).double()
        if not torch.equal(counts, expected):
            raise BadInput(f"Inception Score: expected {len(self.split_of)} images, got {int(counts.sum())}")
        mean_p = sums[:, :-2] / counts[:, None]
        entropy = torch.special.entr(mean_p).sum(1)
        scores = (sums[:, -2] / counts + entropy).exp()
        mean, deviation = float(scores.mean()), float(scores.std(correction=0))
        assert math.isfinite(mean)
        return mean, deviation
