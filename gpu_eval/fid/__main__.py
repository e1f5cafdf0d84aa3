"""`python -m gpu_eval.fid REF.npz SAMPLE.npz`: FID, sFID, Inception Score, precision, recall as the ADM suite has them.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from rqvae.errors import BadInput
from rqvae.metrics.evaluation import FeatureSums, as_feature_file, distance_between, error_bar, measure
from rqvae.metrics.extractors import InceptionExtractor
from rqvae.metrics.feature_files import FeatureFile, check_comparable, has_features, read_features
from rqvae.metrics.frechet import FrechetDistance
from rqvae.metrics.image_files import write_adm_reference
from rqvae.metrics.images import ImageSource
from rqvae.metrics.jackknife import interval
from rqvae.metrics.precision_recall import Arithmetic, precision_recall
from rqvae.metrics.programs import Parser, at_least_one, device_named, exit_code, prepare_files, write_result
from rqvae.metrics.protocol import cautions, cautions_of_order, protocol

MODES: dict[str, tuple[str, Arithmetic]] = {
    "adm": ("inception_score_file_order", "adm_fp16"),
    "strict": ("inception_score_shuffled_10", "float32"),
}
"""Which Inception Score is printed, and the arithmetic of distances between features."""


def parser() -> Parser:
    """The command line."""
    made = Parser(prog="python -m gpu_eval.fid", description=__doc__)
    made.add_argument("reference", type=Path, metavar="REF.npz", help="arr_0; mu, sigma, mu_s, sigma_s; or a folder")
    made.add_argument("sample", type=Path, metavar="SAMPLE.npz", help="arr_0 images, arr_1 labels; or a folder")
    made.add_argument("--mode", choices=sorted(MODES), default="adm", help="adm: IS in file order, float16 distances")
    made.add_argument("--weights", help="file or URL of the Inception weights (default: pytorch-fid's URL)")
    made.add_argument("--batch-size", type=at_least_one, default=64)
    made.add_argument("--device", help="cpu, cuda, ... (default: the accelerator, where there is one)")
    made.add_argument(
        "--jackknife", type=int, nargs="?", const=20, metavar="GROUPS", help="error bar of FID (20 groups)"
    )
    made.add_argument(
        "--save-reference", type=Path, metavar="NPZ", help="write REF's images and statistics as one batch"
    )
    made.add_argument("--json", type=Path, help="write the result with its protocol here")
    return made


def run(arguments: Sequence[str]) -> int:
    """Run the program; what it finds goes to stdout in the ADM suite's order."""
    options = parser().parse_args(arguments)
    prepare_files(json=options.json, save_reference=options.save_reference)
    paths = options.reference, options.sample
    sources, stored = [ImageSource(path) for path in paths], [_stored(path) for path in paths]
    device = device_named(options.device)
    extractor = InceptionExtractor(weights=options.weights)
    extractor.fetch()
    extractor.load().to(device)
    sums = [_measure(source, extractor, device, options.batch_size) for source in sources]
    # Stored statistics decide where there are any, for the sample, too, as in the ADM suite.
    measured = [as_feature_file(source, part, extractor) for source, part in zip(sources, sums, strict=True)]
    reference, sample = (held or own for held, own in zip(stored, measured, strict=True))
    notes = check_comparable(str(reference.path), reference.protocol, str(sample.path), sample.protocol)
    scores, distances = _scores(reference, sample, sums, options.mode, device)
    bar = None if options.jackknife is None else error_bar(reference, sample, options.jackknife)
    if options.save_reference:
        assert reference.spatial is not None
        write_adm_reference(options.save_reference, sources[0], reference.pooled, reference.spatial)
    notes += cautions(len(sources[1]), sources[1].labels(), reference.n, sources[1].format) + cautions_of_order(scores)
    for note in notes:
        sys.stderr.write(f"warning: {note}\n")
    shown = {"Inception Score": MODES[options.mode][0], "FID": "fid", "sFID": "sfid"}
    shown |= {"Precision": "precision_le", "Recall": "recall_le"}
    sys.stdout.write("".join(f"{label}: {scores[key]}\n" for label, key in shown.items()))
    if bar is not None:
        sys.stdout.write(f"FID, bias-corrected: {interval(bar)}\n")
    if options.json:
        of_reference = {"path": str(reference.path), "sha256": reference.sha256, "n": reference.n}
        of_reference["n_images"] = len(sources[0])
        made = {**measured[1].protocol, **sample.protocol}
        fields = protocol(of_reference, len(sources[1]), extractor.identity(), made)
        fields |= {"mode": options.mode, "k": 3, "arithmetic": MODES[options.mode][1], "sample_sha256": sample.sha256}
        bars = {} if bar is None else {"jackknife": vars(bar)}
        routes = {"distances": {name: vars(distance) for name, distance in distances.items()}}
        write_result(options.json, {**scores, **bars, **routes, "protocol": fields, "warnings": notes})
    return 0


def _stored(path: Path) -> FeatureFile | None:
    """The statistics that a file has beside its images."""
    if path.is_dir() or not has_features(path):
        return None
    file = read_features(path)
    if file.spatial is None:
        raise BadInput(f"{path}: expected mu_s and sigma_s beside mu and sigma")
    return file


def _measure(source: ImageSource, extractor: InceptionExtractor, device: torch.device, batch_size: int) -> FeatureSums:
    with tqdm(total=len(source), desc=source.path.name, unit="img", file=sys.stderr) as bar:
        return measure(source, extractor, device, batch_size, keep=True, advance=bar.update)


def _scores(
    reference: FeatureFile, sample: FeatureFile, sums: list[FeatureSums], mode: str, device: torch.device
) -> tuple[dict[str, float], dict[str, FrechetDistance]]:
    """Distances of the statistics; all else is of the images."""
    distances = {
        "fid": distance_between(sample, reference),
        "sfid": distance_between(sample, reference, spatial=True),
    }
    scores = {name: distance.value for name, distance in distances.items()} | sums[1].inception_scores()
    if MODES[mode][0] not in scores:
        raise BadInput(f"{sample.path}: expected at least 10 images for {MODES[mode][0]}, got {sums[1].n}")
    real, generated = (torch.as_tensor(x.features("pooled")).to(device) for x in sums)
    return scores | precision_recall(real, generated, k=3, arithmetic=MODES[mode][1]), distances


def main(arguments: Sequence[str]) -> int:
    """`run`, with bad input as one line and exit code 2."""
    return exit_code(run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
