"""FID of two sets of images: `python -m eval.pytorch_fid A B`, and the distance for programs.

from eval.pytorch_fid import StreamingStatistics, frechet_distance

statistics = StreamingStatistics(2048)
for features in batches:
    statistics.update(features)
frechet_distance(statistics.mean, statistics.cov, reference_mean, reference_cov)
"""

from rqvae.metrics.feature_files import FeatureFile, Moments, read_features, write_features, write_statistics
from rqvae.metrics.frechet import (
    FrechetDistance,
    frechet,
    frechet_distance,
    frechet_distance_features,
    frechet_features,
    frechet_samples,
)
from rqvae.metrics.image_files import write_adm_reference, write_image_folder, write_image_npz
from rqvae.metrics.images import ImageSource
from rqvae.metrics.statistics import StreamingStatistics

__all__ = [
    "FeatureFile",
    "FrechetDistance",
    "ImageSource",
    "Moments",
    "StreamingStatistics",
    "frechet",
    "frechet_distance",
    "frechet_distance_features",
    "frechet_features",
    "frechet_samples",
    "read_features",
    "write_adm_reference",
    "write_features",
    "write_image_folder",
    "write_image_npz",
    "write_statistics",
]
