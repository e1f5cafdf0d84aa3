"""What a published score must say of itself, and what a reader must be warned of."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rqvae.errors import BadInput
from rqvae.metrics.images import PROVENANCE

PAPER_N = 50_000
GENERATION = (
    "labels_policy", "cfg_scale", "cfg_interval", "sampler", "steps", "nfe", "seed_rule", "ema", "precision",
    "uint8_rule", "image_format",
)  # fmt: skip
"""How images were made; null in a result where nobody said."""
JPEG = "jpeg"
FEWEST_CLASSES = 0.9
FEW_REFERENCE = 10_000
IS_SPLIT = 5000
SHUFFLED_SPLITS = 10
ORDER_ERRORS, ORDER_SHARE = 5, 0.1


def protocol(
    reference: Mapping[str, Any], n_generated: int | None, identity: Mapping[str, str], generation: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a result.

    Args:
        reference: `path`, `sha256` and `n` of the reference.
        n_generated: images; None where it is not known.
        identity: of the extractor.
        generation: of `GENERATION`, what is known.
    """
    known = {key: generation.get(key) for key in GENERATION}
    versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    return {"reference": dict(reference), "n": n_generated, **identity, **known, "versions": versions}


def stated_generation(images: Path) -> dict[str, Any]:
    """What the program that made the images says of `GENERATION`, in the JSON that it writes beside them.

    Args:
        images: FILE.npz, with FILE.json beside it, or a folder with provenance.json in it, both of `rqvae sample`; or
            the folder `images` beside the metrics.json of `rqvae recon`.

    Raises:
        BadInput: such a file that is not JSON.
    """
    note = images / PROVENANCE if images.is_dir() else images.with_suffix(".json")
    if not note.is_file() and images.name == "images":
        note = images.with_name("metrics.json")
    if not note.is_file():
        return {}
    try:
        found = json.loads(note.read_text())
    except ValueError as error:
        raise BadInput(f"{note}: expected JSON: {error}") from error
    fields = found.get("protocol") if isinstance(found, dict) else None
    return {key: fields[key] for key in GENERATION if key in fields} if isinstance(fields, dict) else {}


def cautions_of_pairs(n: int, image_format: str = "") -> list[str]:
    """Warnings about reconstructions that papers' scores do not compare with.

    Args:
        n: pairs of images.
        image_format: of the reconstructions.
    """
    few = [f"{n} images: published values are of {PAPER_N}"] if n < PAPER_N else []
    return few + _of_format(image_format)


def cautions(
    n: int, labels: np.ndarray | None = None, n_reference: int | None = None, image_format: str = ""
) -> list[str]:
    """Warnings about samples that papers' numbers do not compare with.

    Args:
        n: generated images.
        labels: (N,) their classes in file order, where they are known.
        n_reference: images of the reference, where it is known.
        image_format: of the generated images, where it is known.
    """
    found = _of_format(image_format)
    if n < PAPER_N:
        found.append(f"{n} images: FID is biased upwards by about 1/n, published values have {PAPER_N}")
    if n_reference is not None and n_reference < FEW_REFERENCE:
        found.append(f"{n_reference} reference images: fewer than {FEW_REFERENCE} add a bias of their own")
    if labels is None or not len(labels):
        return found
    counts = np.unique(labels, return_counts=True)[1]
    if counts.max() > 2 * counts.min():
        found.append(f"classes are not balanced: {counts.min()} to {counts.max()} images of a class")
    chunk = min(IS_SPLIT, len(labels))
    fewest = min(len(np.unique(labels[i : i + chunk])) for i in range(0, len(labels) - chunk + 1, chunk))
    if len(labels) > chunk and fewest < FEWEST_CLASSES * min(len(counts), chunk):
        found.append(
            f"images are sorted by class ({fewest} of {len(counts)} classes in {chunk}): the Inception Score in file "
            "order is too low"
        )
    return found


def cautions_of_order(scores: Mapping[str, float]) -> list[str]:
    """A warning where the Inception Score in file order is much lower than in a shuffled one; needs no labels.

    Much lower is both more than five standard errors of the shuffled score (its mean over 10 splits, so that few images
    are not taken for an order) and more than a tenth of it: in whatever order, splits of 5000 images underestimate the
    marginal's entropy by about (classes - 1) / 10,000 nats (Miller 1955), so that 1000 classes cost up to 10 % where
    the shuffled splits are larger.

    Args:
        scores: of `FeatureSums.inception_scores`.
    """
    own, shuffled = (scores.get(f"inception_score_{name}") for name in ("file_order", f"shuffled_{SHUFFLED_SPLITS}"))
    if own is None or shuffled is None:
        return []
    error = scores[f"inception_score_shuffled_{SHUFFLED_SPLITS}_std"] / math.sqrt(SHUFFLED_SPLITS - 1)
    if not shuffled - own > max(ORDER_ERRORS * error, ORDER_SHARE * shuffled):
        return []
    return [
        f"Inception Score is {own:.2f} in file order and {shuffled:.2f} shuffled: the images are sorted, or the last "
        f"split of {IS_SPLIT} is short; the score in file order is too low"
    ]


def _of_format(image_format: str) -> list[str]:
    if JPEG not in image_format:
        return []
    return ["images are JPEG files: what is scored has been through a lossy codec, papers' images have not"]
