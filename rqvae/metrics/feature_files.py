"""Features and statistics on the disk: reads what other programs write, writes what they read, and says how it arose.

Keys of an npz (or safetensors) file: `act` raw features; `mu`, `sigma` of FID and `mu_s`, `sigma_s` of sFID
(pytorch-fid, clean-fid, edm and the ADM reference batches); `feats` of clean-fid's KID. `act` counts for more than `mu`
and `sigma` beside it. Ours add `n` and `protocol`, a JSON text that others ignore. Pickles, which run code when they
are read, are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from rqvae.errors import BadInput
from rqvae.files import file_sha256
from rqvae.metrics.images import load_npz, open_npz
from rqvae.metrics.statistics import StreamingStatistics

IDENTITY = ("extractor", "weights_sha256", "resize", "scaling")
"""Fields in which two results must agree to be compared."""
_KEYS = ("act", "feats", "mu", "sigma", "mu_s", "sigma_s", "n", "protocol")
_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".npy"}


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: np.ndarray
    cov: np.ndarray


@dataclass(frozen=True)
class FeatureFile:
    """What a file has.

    Args:
        path: of the file.
        sha256: of the file.
        pooled: statistics of the pooled features, computed where the file has the features themselves.
        spatial: those of sFID, or None.
        features: (N, D), or None.
        spatial_features: (N, D') of sFID, or None; no file has them.
        n: number of images, or None where the file does not say.
        protocol: how the features were made, as far as the file says.
        labels: (N,) classes of the images in their order, or None; an npz of images may have them.
    """

    path: Path
    sha256: str
    pooled: Moments
    spatial: Moments | None = None
    features: np.ndarray | None = None
    spatial_features: np.ndarray | None = None
    n: int | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
    labels: np.ndarray | None = None


def has_features(path: Path) -> bool:
    """Whether a file has features or statistics, and not images alone.

    Raises:
        BadInput: a pickle, or a file that cannot be read.
    """
    return bool({"act", "feats", "mu"} & _keys(path))


def read_features(path: Path) -> FeatureFile:
    """Read features or statistics.

    Raises:
        BadInput: a pickle, a damaged file, or one without `act`, `feats` or `mu` and `sigma`; shapes that do not fit.
    """
    arrays = _arrays(path)
    protocol = _protocol(path, arrays)
    digest = file_sha256(path)
    key = "act" if "act" in arrays else "feats"
    if key in arrays:
        features = arrays[key]
        if features.ndim != 2:
            raise BadInput(f"{path}: {key}: expected (N, D), got {features.shape}")
        statistics = StreamingStatistics(features.shape[1])
        try:
            statistics.update(features)
        except BadInput as error:
            raise BadInput(f"{path}: {key}: {error}") from error
        if len(features) < 2:
            raise BadInput(f"{path}: {key}: expected features of at least 2 images, got {len(features)}")
        spatial = _moments(path, arrays, "_s")
        return FeatureFile(path, digest, moments(statistics), spatial, features, n=len(features), protocol=protocol)
    pooled = _moments(path, arrays, "")
    if pooled is None:
        raise BadInput(
            f"{path}: expected the key act, feats or mu, found {', '.join(sorted(arrays)) or 'none of them'}"
        )
    n = int(arrays["n"]) if "n" in arrays else None
    return FeatureFile(path, digest, pooled, _moments(path, arrays, "_s"), n=n, protocol=protocol)


def moments(statistics: StreamingStatistics) -> Moments:
    """Mean and covariance as arrays."""
    return Moments(statistics.mean.numpy(), statistics.cov.numpy())


def write_features(
    path: Path, features: np.ndarray, protocol: Mapping[str, Any], spatial: Moments | None = None
) -> None:
    """Raw features (N, D) under the key `act`, for `--fid_gt_act_path`, and statistics of sFID where there are any."""
    arrays = {"act": np.asarray(features)}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.cov}
    _write(path, arrays | {"protocol": np.array(json.dumps(dict(protocol)))})


def write_statistics(
    path: Path, pooled: Moments, n: int | None, protocol: Mapping[str, Any], spatial: Moments | None = None
) -> None:
    """Statistics under the keys that pytorch-fid, clean-fid and the ADM suite read.

    Args:
        path: of the npz.
        pooled: of the pooled features.
        n: number of images, or None where it is not known.
        protocol: how the features were made.
        spatial: of sFID.
    """
    arrays = {"mu": pooled.mean, "sigma": pooled.cov} | ({} if n is None else {"n": np.array(n)})
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.cov}
    _write(path, arrays | {"protocol": np.array(json.dumps(dict(protocol)))})


def check_comparable(name_a: str, a: Mapping[str, Any], name_b: str, b: Mapping[str, Any]) -> list[str]:
    """Refuse statistics of different networks or resizing.

    Returns:
        Warnings: a line for a side that does not say how it was made.

    Raises:
        BadInput: both say it, and differently.
    """
    for key in IDENTITY:
        if key in a and key in b and a[key] != b[key]:
            raise BadInput(f"{name_a}, {name_b}: expected features of one {key}, got {a[key]} and {b[key]}")
    missing = [name for name, x in ((name_a, a), (name_b, b)) if any(key not in x for key in IDENTITY)]
    return [f"{name} does not say with which extractor and resize it was made" for name in missing]


def _keys(path: Path) -> set[str]:
    if path.suffix.lower() in _PICKLES:
        raise BadInput(f"{path}: expected npz or safetensors; pickles run code when they are read, and are refused")
    if path.suffix == ".safetensors":
        return set(_arrays(path))
    with open_npz(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if path.suffix.lower() in _PICKLES:
        raise BadInput(f"{path}: expected npz or safetensors; pickles run code when they are read, and are refused")
    if path.suffix != ".safetensors":
        return load_npz(path, _KEYS)
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys() if key in _KEYS}  # noqa: SIM118
            texts = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: expected a safetensors file: {error}") from error
    return arrays | {key: np.array(text) for key, text in texts.items() if key == "protocol"}


def _protocol(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    text = arrays.get("protocol")
    if text is None:
        return {}
    try:
        found = json.loads(str(text))
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}: protocol: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path}: protocol: expected a JSON object, got {type(found).__name__}")
    return found


def _moments(path: Path, arrays: Mapping[str, np.ndarray], suffix: str) -> Moments | None:
    mu, sigma = arrays.get(f"mu{suffix}"), arrays.get(f"sigma{suffix}")
    if mu is None and sigma is None:
        return None
    if mu is None or sigma is None or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        shapes = [None if x is None else x.shape for x in (mu, sigma)]
        raise BadInput(f"{path}: mu{suffix}, sigma{suffix}: expected (D,) and (D, D), got {shapes[0]} and {shapes[1]}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise BadInput(f"{path}: mu{suffix}, sigma{suffix}: expected finite numbers, got NaN or infinity")
    return Moments(mu.astype(np.float64), sigma.astype(np.float64))


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    if path.suffix != ".npz":
        raise BadInput(f"{path}: expected a name that ends in .npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # not by name: np.savez appends to names
        np.savez(file, **arrays)  # type: ignore[arg-type]
