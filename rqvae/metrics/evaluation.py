"""Images through an extractor, once, into everything that scores need; a rank's share or all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.metrics.extractors import Extractor, Features
from rqvae.metrics.feature_files import FeatureFile, Moments, moments
from rqvae.metrics.frechet import FrechetDistance, frechet, frechet_features, frechet_samples
from rqvae.metrics.images import ImageSource
from rqvae.metrics.inception import CLASSES, SPATIAL_DIM
from rqvae.metrics.inception_score import InceptionScore
from rqvae.metrics.jackknife import GroupedStatistics, Jackknife, jackknife_features, jackknife_frechet
from rqvae.metrics.protocol import SHUFFLED_SPLITS, stated_generation
from rqvae.metrics.statistics import StreamingStatistics

SPLITS = SHUFFLED_SPLITS


class FeatureSums:
    """Statistics of pooled and spatial features, sums of the Inception Score, and the features where they are wanted.

    Args:
        dim: of the pooled features.
        n: how many images all ranks will give together.
        inception: whether the extractor gives logits and spatial features, too.
        keep: whether the pooled features are kept, float32 on the host, 8 KiB an image: precision and recall need them.
            Where there are no more images than features, both kinds are always kept: distances are then faster and more
            exact from them than from a deficient covariance.
    """

    def __init__(self, dim: int, n: int, *, inception: bool, keep: bool = False) -> None:
        self.n = n
        self.keep = {"pooled": keep or n <= dim, "spatial": inception and n <= SPATIAL_DIM}
        self.pooled = StreamingStatistics(dim)
        self.spatial = StreamingStatistics(SPATIAL_DIM) if inception else None
        self.scores: dict[str, InceptionScore] = {}
        if inception:
            self.scores["file_order"] = InceptionScore.in_file_order(n, classes=CLASSES)
            if n >= SPLITS:
                self.scores[f"shuffled_{SPLITS}"] = InceptionScore.shuffled(n, SPLITS, classes=CLASSES)
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {"pooled": [], "spatial": []}

    def update(self, features: Features, positions: Tensor) -> None:
        """Add a batch whose images are at `positions` (B,) int64 of the order; rows that fill up a batch left out."""
        self._add("pooled", self.pooled, features.pooled, positions)
        if self.spatial is None:
            return
        if features.spatial is None or features.logits is None:
            raise BadInput("extractor: expected spatial features and logits, it gave none")
        self._add("spatial", self.spatial, features.spatial, positions)
        logits = features.logits.cpu()
        for score in self.scores.values():
            score.update(logits, positions)

    def _add(self, kind: str, statistics: StreamingStatistics, features: Tensor, positions: Tensor) -> None:
        rows = features.float().cpu()
        statistics.update(rows)
        if self.keep[kind]:
            self._kept[kind].append((rows, positions.cpu()))

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Sums of all ranks on every rank; kept features stay where they are, see `gather`.

        Raises:
            BadInput: not `n` images over all ranks.
        """
        for statistics in (self.pooled, self.spatial):
            if statistics is not None:
                statistics.reduce(all_reduce, expected=self.n)
        for score in self.scores.values():
            score.replace(all_reduce(score.state()))

    def gather(self, all_gather: Callable[[Tensor], Tensor]) -> None:
        """Kept features of all ranks on every rank, for what cannot be computed from sums; collective.

        Args:
            all_gather: (world, ...) of the ranks' host tensors of one shape.
        """
        for kind in (kind for kind, kept in self.keep.items() if kept):
            dim = self.pooled.dim if kind == "pooled" else SPATIAL_DIM
            rows = torch.cat([torch.empty(0, dim), *(rows for rows, _ in self._kept[kind])])
            positions = torch.cat([torch.empty(0, dtype=torch.int64), *(places for _, places in self._kept[kind])])
            longest = int(all_gather(torch.tensor(len(rows))).max())
            filled_rows, filled_positions = torch.zeros(longest, dim), torch.full((longest,), -1)
            filled_rows[: len(rows)], filled_positions[: len(rows)] = rows, positions
            rows, positions = all_gather(filled_rows).flatten(0, 1), all_gather(filled_positions).flatten()
            self._kept[kind] = [(rows[positions >= 0], positions[positions >= 0])]

    def inception_scores(self) -> dict[str, float]:
        """Means and deviations by order: `inception_score_shuffled_10`, `inception_score_file_order`, `..._std`."""
        found = {}
        for name, score in self.scores.items():
            found[f"inception_score_{name}"], found[f"inception_score_{name}_std"] = score.result()
        return found

    def features(self, kind: str) -> np.ndarray | None:
        """(N, D) float32 of kind pooled or spatial, this rank's, in the order of the images; None if not kept."""
        if not self.keep[kind]:
            return None
        rows = torch.cat([rows for rows, _ in self._kept[kind]])
        return rows[torch.cat([positions for _, positions in self._kept[kind]]).argsort()].numpy()


def measure(
    source: ImageSource,
    extractor: Extractor,
    device: torch.device,
    batch_size: int,
    *,
    keep: bool = False,
    advance: Callable[[int], object] = lambda _: None,
) -> FeatureSums:
    """All images of a source, in one process.

    Args:
        source: images.
        extractor: loaded, on `device`.
        device: to compute on.
        batch_size: images of a forward.
        keep: see `FeatureSums`.
        advance: told the number of images after each batch, for a progress bar.

    Raises:
        BadInput: a single image, whose covariance there is not.
    """
    if len(source) < 2:
        raise BadInput(f"{source.path}: expected at least 2 images, got {len(source)}")
    inception = extractor.name == "fid"
    sums = FeatureSums(extractor.dim, len(source), inception=inception, keep=keep)
    for images, positions in source.batches(batch_size):
        sums.update(extractor(images.to(device)), positions)
        advance(len(images))
    return sums


def as_feature_file(source: ImageSource, sums: FeatureSums, extractor: Extractor) -> FeatureFile:
    """What `read_features` would give had the sums been written."""
    return FeatureFile(
        source.path,
        source.sha256(),
        moments(sums.pooled),
        None if sums.spatial is None else moments(sums.spatial),
        sums.features("pooled"),
        sums.features("spatial"),
        sums.n,
        {**stated_generation(source.path), **extractor.identity(), "image_format": source.format},
        source.labels(),
    )


def distance_between(a: FeatureFile, b: FeatureFile, *, spatial: bool = False) -> FrechetDistance:
    """Fréchet distance, from the features themselves where a side has them and has no more than D of them.

    Raises:
        BadInput: a side without spatial features, features of different lengths, or statistics that are none.
    """
    m, n = (a.spatial, b.spatial) if spatial else (a.pooled, b.pooled)
    x, y = (a.spatial_features, b.spatial_features) if spatial else (a.features, b.features)
    for side, has in ((a, m), (b, n)):
        if has is None:
            raise BadInput(f"{side.path}: expected mu_s and sigma_s, or images")
    assert m is not None
    assert n is not None
    if len(m.mean) != len(n.mean):
        raise BadInput(f"{a.path}, {b.path}: expected features of one length, got {len(m.mean)} and {len(n.mean)}")
    try:
        return _by_the_best_route(x, m, y, n)
    except BadInput as error:
        raise BadInput(f"{a.path}, {b.path}: {error}") from error


def _by_the_best_route(x: np.ndarray | None, m: Moments, y: np.ndarray | None, n: Moments) -> FrechetDistance:
    dim = len(m.mean)
    if x is not None and y is not None and min(len(x), len(y)) <= dim:
        return frechet_features(x, y)
    if x is not None and y is None and len(x) <= dim:
        return frechet_samples(x, n.mean, n.cov)
    if y is not None and x is None and len(y) <= dim:
        return replace(frechet_samples(y, m.mean, m.cov), route="gram_2")
    return frechet(m.mean, m.cov, n.mean, n.cov)


def error_bar(reference: FeatureFile, sample: FeatureFile, groups: int = 20) -> Jackknife:
    """Jackknife of `distance_between`, over the samples; the reference counts as exact.

    Args:
        reference: statistics, or features.
        sample: with its features.
        groups: that are left out in turn.

    Raises:
        BadInput: a sample whose features are not at hand, or too few of them.
    """
    if sample.features is None:
        raise BadInput(f"{sample.path}: jackknife: expected images or features, got statistics")
    (n, dim), pooled, others = sample.features.shape, reference.pooled, reference.features
    if groups < 2 or n * (groups - 1) > dim * groups:
        parts = GroupedStatistics(dim, groups)
        parts.update(sample.features, torch.arange(n))
        return jackknife_frechet(parts.parts, pooled.mean, pooled.cov)

    def score(rows: Tensor) -> float:
        if others is None:
            return frechet_samples(rows, pooled.mean, pooled.cov).value
        return frechet_features(rows, others).value

    return jackknife_features(sample.features, score, groups)
