"""Pathology: layout control against the original conditioning, seams and memory of a canvas, cost of a step.

Trains configs/pathology/procedural.yaml and procedural_legacy.yaml (or goes on with what --runs holds), judges both
with `layout`, samples canvases of three seeds and one of 4096 x 4096, and times steps of both networks in turn.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.record import save
from rqvae.img_datasets.tissue import ProceduralTissue

NAMES = ("procedural", "procedural_legacy")
CLASSES = 5


def command(*words: object) -> str:
    """What a command printed."""
    line = [sys.executable, "-m", "rqvae", *map(str, words)]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def trained(name: str, root: Path, steps: int | None) -> Path:
    """The run of one config; the same command goes on."""
    more = [] if steps is None else ["--train.steps", steps]
    place = ["--save-dir", root, "--project", "p", "--run-name", name, "--threads", 1, "--pictures.every", "null"]
    command("train", f"configs/pathology/{name}.yaml", *place, *more)
    return sorted((root / "p").glob(f"{name}_2*"))[-1]


def layout(run: Path, root: Path, images: int) -> dict[str, float]:
    """Mean IoU of a segmenter that has seen real images alone."""
    out = root / f"layout_{run.name}_{images}.json"
    if not out.exists():
        command("layout", run, "--images", images, "--threads", 1, "--json", out)
    found = json.loads(out.read_text())
    return {key: found[key] for key in ("real", "samples", "shuffled", "share", "n")}


def mask_of(side: int, path: Path) -> Path:
    """A mask of drawn tissue, tiled to a square of this side."""
    dataset = ProceduralTissue("test", size=64, images=64)
    dataset.open()
    tiles = [dataset[i].condition.mask.clamp(max=CLASSES - 1) for i in range(4)]  # type: ignore[union-attr]
    square = torch.cat([torch.cat(tiles[:2], 1), torch.cat(tiles[2:], 1)], 0).to(torch.uint8).numpy()
    count = -(-side // len(square))
    Image.fromarray(np.tile(square, (count, count))[:side, :side]).save(path)
    return path


def canvas(run: Path, root: Path, side: int, steps: int, *more: object) -> dict[str, float]:
    """Gradient across seams as a share of elsewhere, seconds, and the peak memory of the process in GiB."""
    out, began = root / "canvas.png", time.monotonic()
    words = command(
        "canvas", run, mask_of(side, root / "mask.png"), "--out", out, "--steps", steps, "--threads", 1, *more
    )
    found = re.search(r"seams ([\d.]+|nan)", words)
    assert found, words
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # the largest of all until now
    return {"seams": float(found[1]), "seconds": round(time.monotonic() - began, 1), "peak_gib": round(peak, 2)}


def step_seconds(name: str, root: Path, steps: int) -> float:
    """CPU seconds of a step: the difference of a run of `steps` more steps."""
    spent = []
    for count in (2, 2 + steps):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        place = ["--save-dir", root / "steps", "--project", "p", "--run-name", f"{name}{count}", "--fresh"]
        more = ["--threads", 1, "--train.steps", count, "--pictures.every", "null", "--checkpoint.every", 1000]
        command("train", f"configs/pathology/{name}.yaml", *place, *more)
        spent.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    return (spent[1] - spent[0]) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("build/pathology"), help="runs, kept")
    parser.add_argument("--steps", type=int, help="of both trainings, in place of the configs'")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"step_cpu_s": {name: [] for name in NAMES}}
    for _ in range(options.pairs):
        for name in NAMES:
            figures["step_cpu_s"][name].append(round(step_seconds(name, options.runs, 20), 4))
    ours, theirs = (np.array(figures["step_cpu_s"][name]) for name in NAMES)
    figures["legacy / ours"] = round(float(np.median(theirs / ours)), 2)
    runs = {name: trained(name, options.runs, options.steps) for name in NAMES}
    own = runs["procedural"]
    small = [canvas(own, options.runs, 192, 20, "--seed", seed) for seed in range(3)]
    bare = [canvas(own, options.runs, 192, 20, "--seed", seed, "--overlap", 0) for seed in range(3)]
    figures["seams"] = {"mean": round(float(np.mean([c["seams"] for c in small])), 3), "limit": 1.1}
    figures["seams"]["without_overlap"] = round(float(np.mean([c["seams"] for c in bare])), 3)
    figures[f"canvas_{options.side}"] = canvas(own, options.runs, options.side, 2)
    figures["layout"] = {name: layout(run, options.runs, options.images) for name, run in runs.items()}
    save("pathology", figures)


if __name__ == "__main__":
    main()
