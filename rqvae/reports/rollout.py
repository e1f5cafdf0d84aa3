"""The page of a world model's evaluation: scores beside what needs no model, curves, grids, dreams that move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rqvae.metrics.animations import apng_bytes, beside
from rqvae.metrics.grids import grouped_grid, image_grid
from rqvae.reports.grids import png_bytes
from rqvae.reports.horizons import Line, draw_horizons
from rqvae.reports.page import Cell, Page, Tile

SCORES = {"psnr": "PSNR, dB", "psnr_moving": "PSNR on moving pixels, dB", "ssim": "SSIM", "lpips": "LPIPS"}
CONTROL = {
    "open_turns": "open turns executed",
    "blocked_refused": "blocked turns refused",
    "straight_on": "straight on without a key",
    "open_turns_null": "open turns under the null action",
    "open_turns_all": "open turns executed, a ghost's catch counted as not",
    "blocked_refused_all": "blocked turns refused, a ghost's catch counted as not",
}
PERSISTENCE = {"player_visible": "player on screen", "ghosts_visible": "ghosts as many as in the real game"}
HEADER = ["score", "model", "95 % from", "to", "copy last", "mean frame", "game again"]
NOTE = (
    "Means over evaluation seeds, with the 95 % interval of the mean (Student's t over the seeds). Beside the model: "
    "the last real frame kept, the mean frame of the game, and the real game from the same state under the same "
    "actions with other random numbers of its ghosts, which is what a perfect simulator would score (games that are "
    "over by then do not count). A model that answers with the mean of all futures can have a better PSNR than it, so "
    "read PSNR with what is still on screen."
)


@dataclass(frozen=True)
class RolloutPictures:
    """What the page shows.

    Args:
        context: (N, K, H, W, 3) uint8, real.
        future: (N, T, H, W, 3) uint8, real.
        dreams: (N, T, H, W, 3) uint8 after the same actions.
    """

    context: np.ndarray
    future: np.ndarray
    dreams: np.ndarray


def write_rollout_page(
    path: Path, name: str, scores: Mapping[str, Any], pictures: RolloutPictures, facts: Mapping[str, Cell]
) -> Path:
    """Write one self-contained page.

    Args:
        path: of the HTML file.
        name: of the model.
        scores: of `rqvae.trainers.rollout.evaluate`.
        pictures: of one seed.
        facts: how it was evaluated, besides `scores["protocol"]`.

    Returns:
        `path`.

    Raises:
        BadInput: pictures of another shape or type.
    """
    protocol = scores["protocol"]
    line = f"{protocol['starts']} starts, {protocol['horizon']} frames, seeds {', '.join(map(str, protocol['seeds']))}."
    page = Page(f"World model {name}", line, "The page loads nothing: pictures and drawings are inside it.")
    page.tiles(*world_tiles(scores))
    page.heading("Dreams beside the real game")
    _add_films(page, pictures)
    page.heading("Scores")
    page.table(HEADER, _rows(scores), NOTE)
    page.heading("Over the horizon")
    page.drawing(_curves(scores), "Scores of the frame so many steps ahead; shaded: 95 % interval over the seeds.")
    intervals = scores["interval"]["rollout"]
    rows = [r for h, row in scores["rollout"].items() for r in _frame_rows(f"h = {h}", row, intervals[h], "copy_first")]
    page.table(HEADER, rows, "The same scores as numbers.")
    page.heading("Frames")
    _add_grids(page, pictures)
    page.heading("How it was evaluated")
    told: list[list[Cell]] = [[key, _cell(value)] for key, value in {**facts, **protocol}.items()]
    page.table(["", "value"], told, "The windows are fixed by the seeds; their sha256 names them.")
    return page.write(path)


def world_tiles(scores: Mapping[str, Any]) -> list[Tile]:
    """The scores that are read first, of `rqvae.trainers.rollout.evaluate`."""
    step = scores["one_step"]
    copied = step["copy_last_moving"]
    words = "copying has no moving pixel" if copied is None else f"copying the last frame: {copied:.1f} dB"
    tiles = [Tile("One step, moving pixels", step["psnr_moving"], "dB", words)]
    for key, name in [item for item in CONTROL.items() if item[0] in scores][:2]:
        tiles.append(Tile(name.capitalize(), scores[key], "", "held for three steps, every one must be right"))
    for key, name in PERSISTENCE.items():
        for last, share in list(scores.get(key, {}).items())[-1:]:
            tiles.append(Tile(f"{name.capitalize()}, h = {last}", share, "", "share of the dreams"))
    return tiles


def _frame_rows(when: str, row: Mapping[str, Any], interval: Mapping[str, Any], copied: str) -> list[list[Cell]]:
    """The scores of frames, each beside its baselines'."""
    rows: list[list[Cell]] = []
    for key, name in SCORES.items():
        if key in row:
            others = [row.get(_key(base, key)) for base in (copied, "mean_frame", "rerun")]
            rows.append([f"{when}: {name}", row[key], *_ends(interval[key]), *others])
    return rows


def _rows(scores: Mapping[str, Any]) -> list[list[Cell]]:
    """One step, control, what is still there, and distributions."""
    rows = _frame_rows("one step", scores["one_step"], scores["interval"]["one_step"], "copy_last")
    for key, name in CONTROL.items():
        if key not in scores:
            continue
        again = scores.get(f"{key}_rerun")
        rows.append([name, scores[key], *_ends(scores["interval"][key]), None, None, again])
    for key, name in PERSISTENCE.items():
        for h, share in scores.get(key, {}).items():
            ends, again = _ends(scores["interval"][key][h]), scores[f"{key}_rerun"][h]
            rows.append([f"h = {h}: {name}", share, *ends, None, None, again])
    distances = scores.get("frechet", {})
    for key in (key for key in distances if f"{key}_rerun" in distances):
        others = [distances[f"{key}_copy_first"], None, distances[f"{key}_rerun"]]
        rows.append([f"Fréchet distance, {key}", distances[key], *_ends(scores["interval"]["frechet"][key]), *others])
    if "detector_error" in scores:
        rows.append(["error of the detector on real frames", scores["detector_error"], None, None, None, None, None])
    return rows


def _key(baseline: str, score: str) -> str:
    """The name of a baseline's score: `copy_last` is its PSNR, `copy_last_moving`, `copy_last_ssim`."""
    return {"psnr": baseline, "psnr_moving": f"{baseline}_moving"}.get(score, f"{baseline}_{score}")


def _ends(interval: Sequence[float] | None) -> list[Cell]:
    return [None, None] if interval is None else [*interval]


def _curves(scores: Mapping[str, Any]) -> str:
    rollout, interval = scores["rollout"], scores["interval"]
    horizons, panels = [int(h) for h in rollout], {}
    for key, title in SCORES.items():
        if key not in next(iter(rollout.values())):
            continue
        lines = {"model": _line([row[key] for row in rollout.values()], [r[key] for r in interval["rollout"].values()])}
        for base, name in (("copy_first", "copy last"), ("mean_frame", "mean frame"), ("rerun", "game again")):
            if _key(base, key) in next(iter(rollout.values())):
                lines[name] = Line([row[_key(base, key)] for row in rollout.values()])
        panels[title] = lines
    for key, title in PERSISTENCE.items():
        if key not in scores:
            continue
        again = Line(list(scores[f"{key}_rerun"].values()))
        model = _line(list(scores[key].values()), list(interval[key].values()))
        panels[title.partition(" as")[0]] = {"model": model, "game again": again}
    return draw_horizons(horizons, panels)


def _line(values: Sequence[float | None], intervals: Sequence[Sequence[float] | None]) -> Line:
    ends = [_ends(interval) for interval in intervals]
    return Line(values, [low for low, _ in ends], [high for _, high in ends])  # type: ignore[misc]


def _add_films(page: Page, pictures: RolloutPictures, count: int = 4) -> None:
    films = {}
    for n in range(min(count, len(pictures.dreams))):
        last = pictures.context[n, -1:]
        dream, real = np.concatenate((last, pictures.dreams[n])), np.concatenate((last, pictures.future[n]))
        films[f"start {n + 1}"] = apng_bytes(beside(dream, real), fps=8)
    caption = "Left the dream, right the real game under the same actions, from the last frame that both share."
    page.gallery(films, caption, zoom=4, width=280)


def _add_grids(page: Page, pictures: RolloutPictures, count: int = 8) -> None:
    some = slice(0, count)
    target, dream = pictures.future[some, :1], pictures.dreams[some, :1]
    error = np.minimum(4 * np.abs(target.astype(np.int64) - dream), 255).astype(np.uint8)
    sheet = grouped_grid([pictures.context[some], target, dream, error])
    caption = "One step: the frames of context, the true next frame, the predicted one, their difference × 4."
    page.picture(png_bytes(sheet), caption, zoom=3)
    steps = [t for t in (1, 2, 4, 8, 16, 32, 64) if t <= pictures.dreams.shape[1]]
    for n in range(min(2, len(pictures.dreams))):
        frames = np.concatenate([film[n, [t - 1 for t in steps]] for film in (pictures.future, pictures.dreams)])
        sheet = image_grid(frames.transpose(0, 3, 1, 2), columns=len(steps))
        page.picture(
            png_bytes(sheet), f"Start {n + 1}, frames {', '.join(map(str, steps))} ahead.", 3, ("real", "dream")
        )


def _cell(value: Any) -> Cell:
    """A fact as a cell; long lists of hashes by their first characters."""
    if isinstance(value, list):
        return ", ".join(str(part)[:16] for part in value)
    return str(value) if isinstance(value, dict) else value
