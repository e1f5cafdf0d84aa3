"""Ms. Pac-Man by the commands of configs/atari/ms_pacman.yaml: recorded, trained, scored beside copying.

Needs `pip install 'mae-dit[atari]'`. What is there stays, and a training that was cut off goes on. Frames stay in
--out: they are not ours to pass on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import save
from rqvae.cli import run as command

CONFIG = "configs/atari/ms_pacman.yaml"


def _run(*words: Any) -> None:
    if code := command([str(word) for word in words]):
        raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ms_pacman"))
    parser.add_argument("--frames", type=int, default=40000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--starts", type=int, default=48)
    parser.add_argument("--horizon", type=int, default=16)
    parser.add_argument("--run", type=Path, help="a trained run, in the place of a new one")
    options = parser.parse_args()
    frames, page, scores = options.out / "frames", options.out / "rollout.html", options.out / "rollout.json"
    run = options.run
    if run is None:
        size = ("--frames", options.frames, "--size", 64, "--max-steps", 1000)
        _run("collect", "ALE/MsPacman-v5", *size, "--out", frames)
        place = ("--save-dir", options.out, "--project", "train", "--run-name", "ms_pacman", "--threads", 1)
        _run("train", CONFIG, "--data.dataset.init_args.root", frames, "--train.steps", options.steps, *place)
        run = max((options.out / "train").glob("ms_pacman_*"))
    amount = ("--starts", options.starts, "--horizon", options.horizon, "--threads", 1)
    _run("rollout", run, "--recording", frames, *amount, "--json", scores, "--html", page)
    found = json.loads(scores.read_text())
    parts = {key: found[key] for key in ("one_step", "rollout", "protocol")}
    steps = yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"]
    save("ms_pacman", {"steps": steps, **parts, "interval": {"one_step": found["interval"]["one_step"]}})


if __name__ == "__main__":
    main()
