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

from tqdm import tqdm

from eval.pytorch_fid.further import add_options, described, further_scores, needs_features
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
from rqvae.metrics.programs import Parser, at_least_one, device_named, exit_code, prepare_files, write_result
from rqvae.metrics.protocol import cautions, protocol


def parser() -> Parser:
    """The command line."""
    made = Parser(prog="python -m eval.pytorch_fid", description=__doc__)
    made.add_argument(
        "a", type=Path, metavar="A", help="reference: folder of images, npz of images, features or statistics"
    )
    made.add_argument("b", type=Path, metavar="B", help="generated: the same kinds")
    made.add_argument("--extractor", default="inception", help="inception (default), random-vgg16, or a class path")
    made.add_argument("--weights", help="file or URL of the extractor's weights (default: pytorch-fid's URL)")
    made.add_argument("--resize", default=None, help="tf1 (default), half_pixel (pytorch-fid's) or clean (clean-fid's)")
    made.add_argument("--scaling", default=None, help="tf (default) or unit (pytorch-fid's)")
    made.add_argument("--extractor-args", type=_object, default={}, metavar="JSON", help="more of its arguments")
    made.add_argument("--batch-size", type=at_least_one, default=50)
    made.add_argument("--device", default="cpu")
    made.add_argument("--json", type=Path, help="write the result with its protocol here")
    made.add_argument("--save-statistics", type=Path, metavar="NPZ", help="write mu and sigma of B")
    made.add_argument("--save-features", type=Path, metavar="NPZ", help="write the features of B under the key act")
    add_options(made)
    return made


def run(arguments: Sequence[str]) -> int:
    """Run the program; what it finds goes to stdout."""
    options = parser().parse_args(arguments)
    files = {name: getattr(options, name) for name in ("json", "save_statistics", "save_features")}
    prepare_files(**files)
    loader = _Loader(options)
    a, b = loader.read(options.a), loader.read(options.b)
    notes = check_comparable(str(options.a), a.protocol, str(options.b), b.protocol)
    name = loader.name(a, b)
    distance, further = distance_between(a, b), further_scores(options, a, b)
    if b.n is None:
        notes.append(f"{options.b} does not say of how many images")
    else:
        notes += cautions(b.n, b.labels, a.n, str(b.protocol.get("image_format", "")))
    if options.save_statistics:
        write_statistics(options.save_statistics, b.pooled, b.n, b.protocol, b.spatial)
    if options.save_features:
        if b.features is None:
            raise BadInput(f"--save-features: {options.b}: expected images or features, got statistics")
        write_features(options.save_features, b.features, b.protocol)
    for note in notes:
        sys.stderr.write(f"warning: {note}\n")
    sys.stdout.write("\n".join([f"{name}: {distance.value:.6f}", *described(name, further)]) + "\n")
    write_result(options.json, {**_result(name, distance, a, b), **further, "warnings": notes})
    return 0


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object of the extractor's arguments, got {text}")
    return found


class _Loader:
    """Reads a side; builds the extractor when the first side needs one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = device_named(options.device)
        self._extractor: Extractor | None = None

    def read(self, path: Path) -> FeatureFile:
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
        if path.is_file() and has_features(path):
            return read_features(path)
        source = ImageSource(path)
        extractor = self.extractor()
        keep = self.options.save_features is not None or needs_features(self.options)
        with tqdm(total=len(source), desc=path.name, unit="img", file=sys.stderr) as bar:
            sums = measure(source, extractor, self.device, self.options.batch_size, keep=keep, advance=bar.update)
        return as_feature_file(source, sums, extractor)

    def extractor(self) -> Extractor:
        if self._extractor is None:
            options = self.options
            chosen = {key: getattr(options, key) for key in ("weights", "resize", "scaling")}
            given = {k: v for k, v in chosen.items() if v is not None} | options.extractor_args
            made = make_extractor(options.extractor, **given)
            made.fetch()
            self._extractor = made.load().to(self.device)
        return self._extractor

    def name(self, a: FeatureFile, b: FeatureFile) -> str:
        """FID for the network of FID alone."""
        if self._extractor is not None:
            return self._extractor.name
        stated = {side.protocol.get("extractor", "") for side in (a, b)} - {""}
        known = {"inception-2015-12-05": "fid"}
        return known.get(stated.pop(), "frechet_distance") if len(stated) == 1 else "frechet_distance"


def _result(name: str, distance: FrechetDistance, a: FeatureFile, b: FeatureFile) -> dict[str, Any]:
    reference = {"path": str(a.path), "sha256": a.sha256, "n": a.n}
    identity = {k: str(b.protocol.get(k, "")) for k in ("extractor", "weights_sha256", "resize", "scaling")}
    return {
        name: distance.value,
        "distance": vars(distance),
        "protocol": {**protocol(reference, b.n, identity, b.protocol), "sample_sha256": b.sha256},
    }


def main(arguments: Sequence[str]) -> int:
    """`run`, with bad input as one line and exit code 2."""
    return exit_code(run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
