"""Images a second through FID's network, from a folder of 256 px PNGs to features: ours against pytorch-fid's loop.

Random weights of the published names; ours also gives sFID's tensor, the logits, and the sums of all three.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path

import torch
from PIL import Image
from pytorch_fid import fid_score, inception
from skimage import data

from benchmarks.record import alternate, save
from rqvae.metrics.evaluation import measure
from rqvae.metrics.extractors import InceptionExtractor
from rqvae.metrics.images import ImageSource
from tests.inception_weights import write_random_inception

SIZE = 256


def write_images(folder: Path, count: int) -> list[Path]:
    """Crops of a photo."""
    photo, files = data.astronaut(), []
    for i in range(count):
        top, left = 16 * (i // 16 % 16), 16 * (i % 16)
        files.append(folder / f"{i:04d}.png")
        Image.fromarray(photo[top : top + SIZE, left : left + SIZE]).save(files[-1])
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        weights = write_random_inception(Path(place) / "inception.pth")
        folder = Path(place) / "images"
        folder.mkdir()
        files = write_images(folder, options.images)
        inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
        theirs = inception.InceptionV3([3]).eval()
        ours = InceptionExtractor(weights=str(weights)).load()

        def our_loop() -> None:
            measure(ImageSource(folder), ours, torch.device("cpu"), options.batch_size)

        def their_loop() -> None:
            with open(os.devnull, "w") as silent, contextlib.redirect_stderr(silent):
                fid_score.get_activations(files, theirs, options.batch_size, device="cpu", num_workers=1)

        times = alternate(our_loop, their_loop, options.pairs, warmup=1)
    rates = {f"{who}_images_per_s": round(options.images / times[f"{who}_ms"] * 1e3, 2) for who in ("ours", "peer")}
    save("fid_extraction", {**times, **rates, "speedup": round(1 / times["ratio"], 2), "aim": 1.2})


if __name__ == "__main__":
    main()
