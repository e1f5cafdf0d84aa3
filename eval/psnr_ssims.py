"""`python -m eval.psnr_ssims ORIGINALS RECONSTRUCTIONS`: PSNR, SSIM, MS-SSIM and LPIPS of pairs of 8-bit images.

Each side is a folder of images or an npz with arr_0, uint8 (N, H, W, 3). A folder that `python -m rqvae recon` wrote is
both sides, `originals/` and `images/` in it; as RECONSTRUCTIONS it counts as its `images/`. Files are paired by name,
never by their order. Images are 8 bits as they are stored: decoders' floats must have been clamped and rounded to the
nearest level, since truncation limits PSNR to 52.9 dB. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rqvae.errors import BadInput
from rqvae.metrics import ms_ssim
from rqvae.metrics.images import ImageSource
from rqvae.metrics.perceptual import LPIPSScore
from rqvae.metrics.programs import Parser, at_least_one, exit_code, prepare_files, write_result
from rqvae.metrics.protocol import cautions_of_pairs, protocol, stated_generation
from rqvae.metrics.reconstruction import CONVENTIONS, psnr, ssim

Part = list[Path] | np.ndarray
PSNR, SSIM = CONVENTIONS["psnr"], CONVENTIONS["ssim"]
POOLED = "psnr_pooled_rgb_u8"
"""PSNR of the mean squared error of all images: at most the mean of PSNRs."""
MSE = "mse"


def parser() -> Parser:
    """The command line."""
    made = Parser(
        prog="python -m eval.psnr_ssims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "originals", type=Path, metavar="ORIGINALS", help="folder, npz, or a recon folder with originals/"
    )
    made.add_argument("recon", type=Path, metavar="RECONSTRUCTIONS", nargs="?", help="folder or npz")
    made.add_argument("--processes", type=at_least_one, default=1)
    made.add_argument("--batch-size", type=at_least_one, default=8, help="images that a process takes at a time")
    made.add_argument("--ms-ssim", action="store_true", help=f"sides of at least {ms_ssim.LEAST_SIDE} pixels")
    made.add_argument("--lpips", choices=("alex", "vgg"), help="needs the trunk's weights")
    made.add_argument("--trunk-weights", help="file or URL (default: torchvision's URL)")
    made.add_argument("--json", type=Path, help="write means, n and the scores of each image here")
    return made


def run(arguments: Sequence[str]) -> int:
    """Run the program; what it finds goes to stdout."""
    options = parser().parse_args(arguments)
    prepare_files(json=options.json)
    pairs = _Pairs(*_sides(options.originals, options.recon), options.batch_size)
    lpips = LPIPSScore(net=options.lpips, trunk_weights=options.trunk_weights) if options.lpips else None
    if lpips is not None:
        lpips.fetch()
        lpips.load()
    per_image: dict[str, list[float]] = {}
    with tqdm(total=len(pairs), unit="img", file=sys.stderr) as bar:
        for scores in _in_order(pairs, options.processes, options.ms_ssim, lpips):
            for key, values in scores.items():
                per_image.setdefault(key, []).extend(values)
            bar.update(len(scores[PSNR]))
    warnings = cautions_of_pairs(len(pairs), pairs.recon.format)
    for warning in warnings:
        sys.stderr.write(f"warning: {warning}\n")
    means = {key: float(np.mean(values)) for key, values in per_image.items() if key != MSE}
    means[POOLED] = float(-10 * np.log10(max(float(np.mean(per_image[MSE])), 1e-10)))
    sys.stdout.write("".join(f"{key}: {value:.6f}\n" for key, value in means.items()) + f"n: {len(pairs)}\n")
    if options.json:
        named = {name: {k: v[i] for k, v in per_image.items()} for i, name in enumerate(pairs.names)}
        result = {**means, "n": len(pairs), "protocol": _protocol(pairs), "warnings": warnings, "images": named}
        write_result(options.json, result)
    return 0


def _protocol(pairs: _Pairs) -> dict[str, Any]:
    """What made the reconstructions says how it rounded; nobody else knows more than that they have 8 bits."""
    originals, recon = pairs.originals, pairs.recon
    reference = {"path": str(originals.path), "sha256": originals.sha256(), "n": len(pairs)}
    made = {"uint8_rule": "as stored, 8 bits", **stated_generation(recon.path), "image_format": recon.format}
    return {**protocol(reference, len(pairs), {}, made), "sample_sha256": recon.sha256()}


class _Pairs:
    """Pairs of images in parts."""

    def __init__(self, originals: ImageSource, recon: ImageSource, size: int) -> None:
        self.originals, self.recon, self.size = originals, recon, size
        if bool(originals.files) != bool(recon.files) or not originals.files:
            if len(originals) != len(recon):
                raise BadInput(f"{recon.path}: expected {len(originals)} images as {originals.path}, got {len(recon)}")
            self.names = [str(i) for i in range(len(recon))]
            return
        files, others = _by_name(originals), _by_name(recon)
        if odd := sorted(files.keys() ^ others.keys()):
            lacking = recon.path if odd[0] in files else originals.path
            raise BadInput(f"{lacking}: expected an image {odd[0]} as the other folder has ({len(odd)} without a pair)")
        self.names = sorted(files)
        originals.files, recon.files = [files[n] for n in self.names], [others[n] for n in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def parts(self) -> Iterator[tuple[Part, Part]]:
        """Files, or arrays of what has no files."""
        return zip(_parts(self.originals, self.size), _parts(self.recon, self.size), strict=True)


def _in_order(
    pairs: _Pairs, processes: int, multi_scale: bool, lpips: LPIPSScore | None
) -> Iterator[dict[str, list[float]]]:
    """Scores of the parts in their order, with as many parts waiting as bound the memory."""
    if processes == 1:
        for original, recon in pairs.parts():
            yield _score(original, recon, multi_scale, lpips)
        return
    # spawn: a fork would copy the thread pools of torch and OpenCV in whatever state they are in.
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[dict[str, list[float]]]] = deque()
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        for original, recon in pairs.parts():
            waiting.append(pool.submit(_score, original, recon, multi_scale, lpips))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _score(original: Part, recon: Part, multi_scale: bool, lpips: LPIPSScore | None) -> dict[str, list[float]]:
    """Scores of each pair; in a process of the pool."""
    x, y = _levels(recon), _levels(original)
    if x.shape != y.shape:
        where = recon[0] if isinstance(recon, list) else "npz"
        raise BadInput(f"{where}: expected {tuple(y.shape[-2:])} pixels as its original, got {tuple(x.shape[-2:])}")
    scores = {PSNR: psnr(x, y), SSIM: ssim(x, y), MSE: (x - y).square().flatten(1).mean(1)}
    if multi_scale:
        scores[ms_ssim.KEY] = ms_ssim.ms_ssim(x, y)
    if lpips is not None:
        scores[lpips.key] = lpips(x.float(), y.float())
    return {key: value.tolist() for key, value in scores.items()}


def _levels(part: Part) -> Tensor:
    """(B, 3, H, W) float64 in [0, 1]."""
    images = part if isinstance(part, np.ndarray) else np.stack(_same_size([_read(file) for file in part], part))
    return torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255


def _same_size(images: list[np.ndarray], files: list[Path]) -> list[np.ndarray]:
    for image, file in zip(images, files, strict=True):
        if image.shape != images[0].shape:
            raise BadInput(f"{file}: expected images of one size, {images[0].shape[:2]}, got {image.shape[:2]}")
    return images


def _read(file: Path) -> np.ndarray:
    # Decoded from bytes: imread gives None for a missing and a damaged file alike. Not turned by what a camera noted,
    # since Pillow, by which datasets read, does not; in its own depth, or 16 bits would be cut to 8.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.fromfile(file, np.uint8), flags)
    if image is None:
        raise BadInput(f"{file}: expected an image")
    if image.dtype != np.uint8:
        raise BadInput(f"{file}: expected an image of 8 bits, got {image.dtype}")
    return image[:, :, ::-1]


def _parts(source: ImageSource, size: int) -> Iterator[Part]:
    if source.files:
        for start in range(0, len(source), size):
            yield source.files[start : start + size]
    else:
        for images, _ in source.batches(size):
            yield images.permute(0, 2, 3, 1).numpy()


def _by_name(source: ImageSource) -> dict[str, Path]:
    """Files by their path below the folder without the ending: a JPEG original has a PNG reconstruction."""
    return {str(file.relative_to(source.path).with_suffix("")): file for file in source.files}


def _sides(originals: Path, recon: Path | None) -> tuple[ImageSource, ImageSource]:
    if recon is None:
        for part in ("originals", "images"):
            if not (originals / part).is_dir():
                raise BadInput(f"{originals}: expected originals/ and images/ in it, or a second folder; no {part}/")
        originals, recon = originals / "originals", originals / "images"
    if (recon / "images").is_dir():
        recon = recon / "images"
    for path in (originals, recon):
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
    return ImageSource(originals), ImageSource(recon)


def main(arguments: Sequence[str]) -> int:
    """`run`, with bad input as one line and exit code 2."""
    return exit_code(run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
