"""What `make demo` left: seconds by part and scores; and the same autoencoder's scores on photos.

Trains configs/photos/klvae_f4.yaml (about three minutes) unless runs/photos holds it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.record import save


def photos(root: Path) -> dict[str, float]:
    """Scores of the photos' test split."""
    job = [sys.executable, "-m", "rqvae"]
    config = "configs/photos/klvae_f4.yaml"
    place = ["--save-dir", str(root), "--threads", "1"]
    subprocess.run([*job, "train", config, *place, "--project", "train", "--run-name", "photos"], check=True)
    run = sorted((root / "train").glob("photos_*"))[-1]
    subprocess.run([*job, "recon", config, *place, "--run-name", "recon", "--ckpt", str(run)], check=True)
    scores = json.loads((root / "recon" / "metrics.json").read_text())
    return {key: scores[key] for key in ("psnr", "ssim", "n")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--photos", type=Path, default=Path("runs/photos"))
    options = parser.parse_args()
    summary = json.loads((options.demo / "summary.json").read_text())
    keys = ("stage1_psnr", "stage1_ssim", "nearest_train_psnr", "world", "cpu_seconds", "seconds", "parts")
    save("demo_scores", {"maze_chase": {k: summary[k] for k in keys}, "photos": photos(options.photos)})


if __name__ == "__main__":
    main()
