"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), tile by tile.

A set of features covers the balls around each of them that reach to its k-th nearest neighbour. Precision is the share
of generated features in the balls of the real ones, recall the share of real features in the balls of the generated
ones. Whether the border belongs to a ball decides ties, which duplicates and coarse arithmetic make frequent: `_le` is
distance <= radius (Kynkäänniemi, the ADM suite, torch-fidelity), `_lt` is distance < radius (Naeem's prdc).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from rqvae.errors import BadInput

Arithmetic = Literal["float64", "float32", "adm_fp16"]
ADM_TILE = 10_000
"""Rows and columns that the ADM suite takes together, and for which it falls back to float32 together."""


def precision_recall(
    real_nd: Tensor, generated_md: Tensor, k: int = 3, arithmetic: Arithmetic = "float32", tile: int = 2000
) -> dict[str, float]:
    """Scores of two sets of features, in memory of a tile of distances.

    Args:
        real_nd: (N, D) floats, N > k, on the device to compute on.
        generated_md: (M, D), M > k.
        k: neighbours, not counting the feature itself.
        arithmetic: of the squared distances. "float32" is what torch-fidelity has; duplicates are then 1e-7 of their
            squared norm apart, where "float64" has them together. "adm_fp16" rounds features, products and sums to
            float16, as openai/guided-diffusion's evaluator.py does in blocks of 10000, and
            takes float32 for a block that overflows; `tile` is then 10000.
        tile: rows and columns of distances at a time.

    Returns:
        `precision_le`, `recall_le`, `precision_lt`, `recall_lt`, `density_lt`, `coverage_lt`.

    Raises:
        BadInput: shapes that do not fit, too few features, or a number that is not finite.
    """
    for name, x in (("real", real_nd), ("generated", generated_md)):
        if x.ndim != 2 or x.shape[1] != real_nd.shape[-1] or not 1 <= k < len(x):
            raise BadInput(f"{name}: expected (N, {real_nd.shape[-1]}) with N > k = {k} >= 1, got {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise BadInput(f"{name}: expected finite features, got NaN or infinity")
    tile = ADM_TILE if arithmetic == "adm_fp16" else tile
    dtype = torch.float64 if arithmetic == "float64" else torch.float32
    real, generated = real_nd.to(dtype), generated_md.to(dtype)
    radius_real = _radii(real, k, arithmetic, tile)
    radius_generated = _radii(generated, k, arithmetic, tile)
    return _shares(real, generated, radius_real, radius_generated, k, arithmetic, tile)


def squared_distances(a_nd: Tensor, b_md: Tensor, arithmetic: Arithmetic) -> Tensor:
    """(N, M), >= 0; a feature's distance to itself is 0 only up to rounding."""
    if arithmetic == "adm_fp16":
        half = _half_distances(a_nd, b_md)
        if bool(torch.isfinite(half).all()):
            return half
    product = a_nd @ b_md.mT
    return (a_nd.square().sum(1, keepdim=True) - 2 * product + b_md.square().sum(1)).clamp(min=0)


def _half_distances(a_nd: Tensor, b_md: Tensor) -> Tensor:
    """Each operation in float32 on float16 numbers, its result rounded to float16, as float16 units compute."""

    def rounded(x: Tensor) -> Tensor:
        return x.half().float()

    a, b = rounded(a_nd), rounded(b_md)
    norm_a, norm_b = (rounded(rounded(x.square()).sum(1)) for x in (a, b))
    product = rounded(a @ b.mT)
    return rounded(rounded(norm_a[:, None] - rounded(2 * product)) + norm_b).clamp(min=0)


def _radii(features: Tensor, k: int, arithmetic: Arithmetic, tile: int) -> Tensor:
    """(N,) squared distance to the k-th neighbour: the (k + 1)-th smallest, the feature itself being one of them."""
    radii = []
    for rows in features.split(tile):
        nearest = rows.new_empty(len(rows), 0)
        for columns in features.split(tile):
            together = torch.cat([nearest, squared_distances(rows, columns, arithmetic)], 1)
            nearest = together.topk(min(k + 1, together.shape[1]), largest=False).values
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def _shares(
    real: Tensor, generated: Tensor, radius_real: Tensor, radius_generated: Tensor,
    k: int, arithmetic: Arithmetic, tile: int,
) -> dict[str, float]:  # fmt: skip
    n, m = len(real), len(generated)
    in_real = {rule: torch.zeros(m, dtype=torch.bool, device=real.device) for rule in ("le", "lt")}
    in_generated = {rule: torch.zeros(n, dtype=torch.bool, device=real.device) for rule in ("le", "lt")}
    covered = torch.zeros(n, dtype=torch.bool, device=real.device)
    balls = torch.zeros((), dtype=torch.int64, device=real.device)
    for i, j in _tiles(n, m, tile):
        distance = squared_distances(real[i], generated[j], arithmetic)
        of_real, of_generated = radius_real[i, None], radius_generated[j]
        in_real["le"][j] |= (distance <= of_real).any(0)
        in_generated["le"][i] |= (distance <= of_generated).any(1)
        in_generated["lt"][i] |= (distance < of_generated).any(1)
        inside = distance < of_real
        in_real["lt"][j] |= inside.any(0)
        covered[i] |= inside.any(1)
        balls += inside.sum()
    shares = {f"precision_{rule}": float(x.double().mean()) for rule, x in in_real.items()}
    shares |= {f"recall_{rule}": float(x.double().mean()) for rule, x in in_generated.items()}
    return shares | {"density_lt": float(balls) / (k * m), "coverage_lt": float(covered.double().mean())}


def _tiles(n: int, m: int, tile: int) -> Iterator[tuple[slice, slice]]:
    for i in range(0, n, tile):
        for j in range(0, m, tile):
            yield slice(i, i + tile), slice(j, j + tile)
