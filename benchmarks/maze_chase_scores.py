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

ONE_STEP = ("psnr", "psnr_moving", "ssim", "copy_last", "copy_last_moving", "copy_last_ssim")
ONE_STEP += ("rerun", "rerun_moving", "rerun_ssim")
TURNS = ("open_turns", "blocked_refused")
CONTROL = (*TURNS, "open_turns_null", "straight_on", *(f"{key}_all{of}" for key in TURNS for of in ("", "_rerun")))
PERSISTENCE = ("player_visible", "ghosts_visible", "player_visible_rerun", "ghosts_visible_rerun")
PREDICTED = ("", "copy_first", "mean_frame", "rerun")
SHIPPED = "maze-chase"
GATES = {"open_turns": 0.95, "blocked_refused": 0.88, "player_visible": 0.95, "ghosts_visible": 0.80}
"""That the model is to pass; of what is still visible 64 frames ahead."""

CONTROL_WORDS = {
    "open_turns": "open turns executed",
    "open_turns_null": "the same without the action",
    "blocked_refused": "blocked turns refused",
    "straight_on": "straight on",
    "open_turns_all": "open turns over all forks",
    "blocked_refused_all": "blocked turns over all forks",
}


def selected(scores: dict[str, Any]) -> dict[str, Any]:
    """The scores that the card shows, without what is still visible at every horizon."""
    rows: dict[str, Any] = {"one_step": {key: scores["one_step"][key] for key in ONE_STEP}}
    rows |= {key: scores[key] for key in CONTROL}
    rows |= {key: {h: scores[key][h] for h in ("16", "32", "64")} for key in PERSISTENCE}
    names = [name for base in PREDICTED for name in _names(base)]
    return rows | {"rollout": {h: {name: row[name] for name in names} for h, row in scores["rollout"].items()}}


def tables(figures: dict[str, Any]) -> str:
    """The two tables of the card."""
    lines = ["| score | model | copying the last frame | the real game again | gate |", "|" + "---|" * 5]
    one, ends = figures["one_step"], figures["interval"]["one_step"]
    gate = f"{one['copy_last_moving'] + 10:.2f}"
    for key, words, digits in (
        ("psnr", "one step, PSNR dB", 2),
        ("psnr_moving", "one step, moving pixels, PSNR dB", 2),
        ("ssim", "one step, SSIM", 4),
    ):
        suffix = key.removeprefix("psnr").replace("ssim", "_ssim")
        others = [f"{one[base + suffix]:.{digits}f}" for base in ("copy_last", "rerun")]
        lines.append(_row(words, one[key], ends[key], digits, *others, gate if key == "psnr_moving" else ""))
    for key, words in CONTROL_WORDS.items():
        again = f"{figures[f'{key}_rerun']:.3f}" if f"{key}_rerun" in figures else ""
        lines.append(_row(words, figures[key], figures["interval"][key], 3, "", again, GATES.get(key, "")))
    for key, words in (("player_visible", "player on screen"), ("ghosts_visible", "as many ghosts as there should be")):
        for h, share in figures[key].items():
            again = f"{figures[f'{key}_rerun'][h]:.3f}"
            least = GATES[key] if h == "64" else ""
            lines.append(_row(f"{words}, h = {h}", share, figures["interval"][key][h], 3, "", again, least))
    lines += ["", "PSNR in dB of all / of moving pixels, h frames ahead:", ""]
    lines += ["| frames ahead | model | the first frame kept | mean frame | the real game again |", "|" + "---|" * 5]
    for h, row in figures["rollout"].items():
        cells = [" / ".join(f"{row[name]:.2f}" for name in _names(base)) for base in PREDICTED]
        lines.append(f"| {h} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _names(base: str) -> tuple[str, str]:
    """Names of a prediction's PSNR over all and over moving pixels."""
    return (base, f"{base}_moving") if base else ("psnr", "psnr_moving")


def _row(words: str, value: float, ends: list[float], digits: int, *others: Any) -> str:
    if digits > 2:  # a share or an SSIM, which are at most 1
        ends = [max(0.0, ends[0]), min(1.0, ends[1])]
    shown = f"{value:.{digits}f} ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"
    return f"| {words} | {shown} | " + " | ".join(f"{other}" for other in others) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SHIPPED, help="another run or exported folder: its scores are only printed")
    parser.add_argument("--starts", type=int, default=48)
    parser.add_argument("--steps", type=int, help="other solver steps: their scores are only printed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scores.json"
        line = ["rollout", options.model, "--starts", str(options.starts), "--threads", "1", "--json", str(out)]
        if code := command([*line, *(["--steps", str(options.steps)] if options.steps else [])]):
            raise SystemExit(code)
        scores = json.loads(out.read_text())
    figures = {**selected(scores), "interval": selected(scores["interval"])}
    figures["real_runs_not_over_64"] = scores["rollout"]["64"]["rerun_running"]
    if options.model == SHIPPED and options.steps is None:
        save(
            "maze_chase_scores", {**figures, "detector_error": scores["detector_error"], "protocol": scores["protocol"]}
        )
    print(tables(figures))


if __name__ == "__main__":
    main()
