"""`python -m eval.pytorch_fid A B`: Fréchet distance of two sets of images, features or statistics.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rqvae.errors import BadInput
from rqvae.metrics.evaluation import as_feature_file, distance_between, measure
from rqvae.metrics.extractors import Extractor, make_extractor
from rqvae.metrics.feature_files import (
    FeatureFile,
    check_comparable,
    has_features,
    read_features,
    write_features,
    write_statistics,
)
from rqvae.metrics.frechet import FrechetDistance
from rqvae.metrics.images import ImageSource
from rqvae.metrics.protocol import cautions, protocol


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m eval.pytorch_fid", description=__doc__)
    made.add_argument(
        "a", type=Path, metavar="A", help="reference: folder of images, npz of images, features or statistics"
    )
    made.add_argument("b", type=Path, metavar="B", help="generated: the same kinds")
    made.add_argument("--extractor", default="inception", help="inception (default), random-vgg16, or a class path")
    made.add_argument("--weights", help="file or URL of the extractor's weights (default: pytorch-fid's URL)")
    made.add_argument("--resize", default=None, help="tf1 (default), half_pixel (pytorch-fid's) or clean (clean-fid's)")
    made.add_argument("--scaling", default=None, help="tf (default) or unit (pytorch-fid's)")
    made.add_argument("--batch-size", type=int, default=50)
    made.add_argument("--device", default="cpu")
    made.add_argument("--json", type=Path, help="write the result with its protocol here")
    made.add_argument("--save-statistics", type=Path, metavar="NPZ", help="write mu and sigma of B")
    made.add_argument("--save-features", type=Path, metavar="NPZ", help="write the features of B under the key act")
    return made


def run(arguments: Sequence[str]) -> int:
    """Run the program; what it finds goes to stdout."""
    options = parser().parse_args(arguments)
    loader = _Loader(options)
    a, b = loader.read(options.a), loader.read(options.b)
    notes = check_comparable(str(options.a), a.protocol, str(options.b), b.protocol)
    name = loader.name(a, b)
    distance = distance_between(a, b)
    notes += cautions(b.n, n_reference=a.n) if b.n is not None else [f"{options.b} does not say of how many images"]
    if options.save_statistics:
        write_statistics(options.save_statistics, b.pooled, b.n or 0, b.protocol, b.spatial)
    if options.save_features:
        if b.features is None:
            raise BadInput(f"--save-features: {options.b}: expected images or features, got statistics")
        write_features(options.save_features, b.features, b.protocol)
    for note in notes:
        sys.stderr.write(f"warning: {note}\n")
    sys.stdout.write(f"{name}: {distance.value:.6f}\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(_result(name, distance, a, b, notes), indent=2) + "\n")
    return 0


class _Loader:
    """Reads a side; builds the extractor when the first side needs one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._extractor: Extractor | None = None

    def read(self, path: Path) -> FeatureFile:
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
        if path.is_file() and has_features(path):
            return read_features(path)
        source = ImageSource(path)
        extractor = self.extractor()
        device = torch.device(self.options.device)
        keep = self.options.save_features is not None
        with tqdm(total=len(source), desc=path.name, unit="img", file=sys.stderr) as bar:
            sums = measure(source, extractor, device, self.options.batch_size, keep=keep, advance=bar.update)
        return as_feature_file(source, sums, extractor)

    def extractor(self) -> Extractor:
        if self._extractor is None:
            options = self.options
            chosen = {key: getattr(options, key) for key in ("weights", "resize", "scaling")}
            made = make_extractor(options.extractor, **{k: v for k, v in chosen.items() if v is not None})
            made.fetch()
            self._extractor = made.load().to(options.device)
        return self._extractor

    def name(self, a: FeatureFile, b: FeatureFile) -> str:
        """FID for the network of FID alone."""
        if self._extractor is not None:
            return self._extractor.name
        stated = {side.protocol.get("extractor", "") for side in (a, b)} - {""}
        known = {"inception-2015-12-05": "fid"}
        return known.get(stated.pop(), "frechet_distance") if len(stated) == 1 else "frechet_distance"


def _result(name: str, distance: FrechetDistance, a: FeatureFile, b: FeatureFile, notes: list[str]) -> dict[str, Any]:
    reference = {"path": str(a.path), "sha256": a.sha256, "n": a.n}
    identity = {k: str(b.protocol.get(k, "")) for k in ("extractor", "weights_sha256", "resize", "scaling")}
    return {
        name: distance.value,
        "distance": vars(distance),
        "protocol": protocol(reference, b.n or 0, identity, b.protocol),
        "warnings": notes,
    }


def main(arguments: Sequence[str]) -> int:
    """`run`, with bad input as one line and exit code 2."""
    try:
        return run(arguments)
    except BadInput as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
