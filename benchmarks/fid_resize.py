"""TensorFlow 1's resize of 256 px to 299 px as two constant products, against torch-fidelity's gather."""

from __future__ import annotations

import argparse

import torch
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from benchmarks.record import alternate, save
from rqvae.metrics.resize import resize

BATCH, SIZE = 32, (299, 299)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    levels = torch.randint(0, 256, (BATCH, 3, 256, 256), generator=torch.Generator().manual_seed(0)).float()

    def ours() -> None:
        resize(levels, SIZE[0], "tf1")

    def theirs() -> None:
        interpolate_bilinear_2d_like_tensorflow1x(levels, SIZE, align_corners=False)

    peer = interpolate_bilinear_2d_like_tensorflow1x(levels, SIZE, align_corners=False)
    worst = float((resize(levels, SIZE[0], "tf1") - peer).abs().max())
    times = alternate(ours, theirs, options.pairs, warmup=1)
    save("fid_resize", {"worst_difference_levels": worst, **times, "speedup": round(1 / times["ratio"], 2)})


if __name__ == "__main__":
    main()
