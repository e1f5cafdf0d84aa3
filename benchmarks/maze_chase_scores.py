"""Scores of the world model that the package ships, at 48 starts of each of three evaluation seeds.

They are on its card, rqvae/shipped/maze-chase/README.md. `real_runs_not_over_64`: share of re-runs of the real game
that are not over after 64 frames: the logged keys do not look out for another ghost than the logged one, and the
evaluation's game has one life. A dream has no end, so most dreams score what the model dreams after a catch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import save
from rqvae.cli import run as command

ONE_STEP = ("psnr", "psnr_moving", "ssim", "copy_last", "copy_last_moving", "rerun", "rerun_moving")
TURNS = ("open_turns", "blocked_refused")
CONTROL = (*TURNS, "open_turns_null", "straight_on", *(f"{key}_all{of}" for key in TURNS for of in ("", "_rerun")))
PERSISTENCE = ("player_visible", "ghosts_visible", "player_visible_rerun", "ghosts_visible_rerun")


def selected(scores: dict[str, Any]) -> dict[str, Any]:
    """The scores that the card shows, without those of every horizon."""
    rows: dict[str, Any] = {"one_step": {key: scores["one_step"][key] for key in ONE_STEP}}
    rows |= {key: scores[key] for key in CONTROL}
    return rows | {key: {h: scores[key][h] for h in ("16", "32", "64")} for key in PERSISTENCE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="maze-chase", help="shipped name, run or exported folder")
    parser.add_argument("--starts", type=int, default=48)
    parser.add_argument("--steps", type=int, help="solver steps; the model's own by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scores.json"
        line = ["rollout", options.model, "--starts", str(options.starts), "--threads", "1", "--json", str(out)]
        if code := command([*line, *(["--steps", str(options.steps)] if options.steps else [])]):
            raise SystemExit(code)
        scores = json.loads(out.read_text())
    figures = {**selected(scores), "interval": selected(scores["interval"])}
    figures["real_runs_not_over_64"] = scores["rollout"]["64"]["rerun_running"]
    save("maze_chase_scores", {**figures, "detector_error": scores["detector_error"], "protocol": scores["protocol"]})


if __name__ == "__main__":
    main()
