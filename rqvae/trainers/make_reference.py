"""A reference file for Fréchet distances from a config's own data: `python -m rqvae make-reference`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rqvae.backends import Backend
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import Split
from rqvae.run import AnyRun
from rqvae.trainers.logging import setup_text_log
from rqvae.trainers.parts import on_main
from rqvae.trainers.references import (
    Kept,
    describe,
    load_extractor,
    measure_originals,
    originals,
    write_reference,
)
from rqvae.trainers.run_folder import check_can_write


@dataclass(frozen=True)
class ReferenceRequest:
    """What to make, and where.

    Args:
        out: an npz.
        split: whose images.
        images: how many of it in file order, 0 for all.
        batch_size: images of one forward on each rank.
        kept: features or statistics; None is features where there are no more images than dimensions.
        extractor: inception, random-vgg16 or a class path.
        weights: file or URL of inception's weights, None for the published ones.
        extractor_args: more arguments of the extractor's constructor.
    """

    out: Path
    split: Split
    images: int = 0
    batch_size: int = 50
    kept: Kept | None = None
    extractor: str = "inception"
    weights: str | None = None
    extractor_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.out.suffix != ".npz":
            raise BadInput(f"OUT {self.out}: expected a name that ends in .npz")
        if self.images < 0 or self.images == 1 or self.batch_size < 1:
            raise BadInput(
                f"--images, --batch-size: expected 0 or at least 2 images and at least 1 a batch, got {self.images} "
                f"and {self.batch_size}"
            )
        check_can_write(self.out.parent, "OUT")


def make_reference(run: AnyRun, backend: Backend, request: ReferenceRequest) -> dict[str, Any]:
    """Write the file; every rank calls it.

    Returns:
        What the file says of itself, and `kept`.

    Raises:
        BadInput: data or weights that are missing, or fewer than two images.
    """
    setup_text_log(backend.rank)
    walk = originals(run.data, request.split, backend, request.batch_size)
    on_main(backend, lambda: walk.stream and None)
    if walk.count(request.images) < 2:
        raise BadInput(f"data.dataset: {request.split}: expected at least 2 images, got {len(walk.stream)}")
    own = {} if request.weights is None else {"weights": request.weights}
    extractor = load_extractor(request.extractor, backend, "--extractor", **{**own, **request.extractor_args})
    sums = measure_originals(walk, extractor, request.images, keep=request.kept == "features")
    facts = describe(walk, extractor, sums.n)

    def write() -> Kept:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        return write_reference(request.out, sums, facts, request.kept)

    return {**facts, "kept": on_main(backend, write)}
