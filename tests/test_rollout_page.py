"""Baselines, intervals, frame scores and the page of `rollout`: against the game itself, scikit-image and scipy."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from skimage.metrics import structural_similarity

from rqvae.errors import BadInput
from rqvae.games.detector import MazeDetector
from rqvae.games.maze_chase import MazeChase
from rqvae.games.windows import maze_windows
from rqvae.metrics.animations import apng_bytes, beside, gif_bytes
from rqvae.metrics.extractors import Features
from rqvae.metrics.frame_scores import FrameScores
from rqvae.metrics.frechet import frechet_features
from rqvae.metrics.grids import grouped_grid
from rqvae.metrics.intervals import finite, tree_intervals, tree_means
from rqvae.reports.rollout import RolloutPictures, write_rollout_page
from rqvae.trainers.rollout import evaluate
from rqvae.trainers.rollout_baselines import make_baselines, mean_frame
from rqvae.trainers.rollout_scores import frechet, rollout_scores


@pytest.fixture(scope="module")
def game() -> MazeChase:
    return MazeChase()


def test_the_game_again_has_the_same_player_and_other_ghosts(game: MazeChase) -> None:
    windows, state = maze_windows(game, 8, history=3, horizon=12, seed=0), game.clone_state()
    baselines, detector = make_baselines(game, windows, 0, steps=4).again, MazeDetector(game)
    assert baselines is not None
    assert game.clone_state() == state
    ghosts = []
    for t in range(4):  # from the logged state: what the player does is the action's, what ghosts do is drawn
        again, logged = detector(baselines.steps[:, t]), detector(windows.future[:, t])
        seen = (again.player_cell() >= 0) & (logged.player_cell() >= 0)
        assert seen.mean() > 0.9
        assert np.array_equal(again.player_cell()[seen], logged.player_cell()[seen])
        ghosts.append((again.ghosts == logged.ghosts).all(1))
    assert 0 < np.mean(ghosts) < 1
    same, other = (make_baselines(game, windows, seed, steps=4).again for seed in (0, 1))
    assert same is not None
    assert other is not None
    assert np.array_equal(same.reruns, baselines.reruns)
    assert not np.array_equal(other.reruns, baselines.reruns)
    for n in np.flatnonzero(~baselines.running.all(1)):
        last = baselines.running[n].sum()
        assert (baselines.reruns[n, last:] == baselines.reruns[n, last - 1]).all()
    assert baselines.running[:, 0].all()


def test_the_mean_frame_is_exact_where_nothing_changes(game: MazeChase) -> None:
    mean = mean_frame(game)
    wall = game.walls.repeat(4, axis=0).repeat(4, axis=1)
    assert np.array_equal(mean[wall], game.render()[wall])
    assert np.abs(mean[~wall].astype(int) - game.render()[~wall]).max() > 20


def test_frame_scores_are_those_of_skimage() -> None:
    rng = np.random.default_rng(0)
    before, target, guess = rng.integers(0, 256, (3, 2, 16, 16, 3), dtype=np.uint8)
    sums = FrameScores()
    sums.update(guess, target, before)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
    pairs = zip(guess, target, strict=True)
    crop = [structural_similarity(a, b, data_range=255, full=True, **settings)[1][5:-5, 5:-5].mean() for a, b in pairs]
    result = sums.result("copy_last")
    assert result.keys() == {"copy_last", "copy_last_moving", "copy_last_ssim"}
    assert result["copy_last_ssim"] == pytest.approx(np.mean(crop), abs=1e-9)
    assert sums.result().keys() == {"psnr", "psnr_moving", "ssim"}
    distances = FrameScores(lambda a, b: (a - b).abs().mean((1, 2, 3)))  # type: ignore[arg-type]  # in place of LPIPS
    distances.update(guess[:1], target[:1], before[:1])
    distances.update(guess[1:], target[1:], before[1:])
    expected = np.abs(guess.astype(float) - target).mean() / 255
    assert distances.result("rerun")["rerun_lpips"] == pytest.approx(expected, abs=1e-9)
    assert distances.result()["lpips"] == pytest.approx(expected, abs=1e-9)


def test_intervals_are_those_of_scipy() -> None:
    rows = [{"a": {"b": x}, "c": c, "n": None} for x, c in ((1.0, 2.0), (4.0, None), (2.5, float("inf")))]
    assert tree_means(rows) == {"a": {"b": 2.5}, "c": 2.0, "n": None}
    found, values = tree_intervals(rows), [1.0, 4.0, 2.5]
    expected = stats.t.interval(0.95, 2, loc=2.5, scale=stats.sem(values))
    assert found["a"]["b"] == pytest.approx(expected, rel=1e-5)
    assert found["c"] is found["n"] is None
    assert finite({"a": {"b": float("nan")}, "c": 1.0}) == {"a": {"b": None}, "c": 1.0}


class Colour(torch.nn.Module):
    """Features that are known: the mean colour."""

    name = "fd_colour"

    def forward(self, images: torch.Tensor) -> Features:
        return Features(images.float().mean((2, 3)))


def test_the_frechet_distance_is_of_the_frames_at_the_horizons(game: MazeChase) -> None:
    windows = maze_windows(game, 6, history=2, horizon=4, seed=2)
    baselines, colours = make_baselines(game, windows, 0), Colour()
    of = frechet(windows.future, windows, [1, 4], baselines, colours)
    assert of["fd_colour"] == pytest.approx(0, abs=1e-6)
    true = windows.future[:, [0, 3]].reshape(-1, 32, 32, 3).mean((1, 2))
    kept = windows.context[:, -1:].repeat(2, axis=1).reshape(-1, 32, 32, 3).mean((1, 2))
    assert of["fd_colour_copy_first"] == pytest.approx(frechet_features(kept, true).value, rel=1e-3)
    assert of["fd_colour_rerun"] > 0


def copier(context: np.ndarray, past: np.ndarray, ahead: np.ndarray, seed: int) -> np.ndarray:
    return np.repeat(context[:, -1:], ahead.shape[1], axis=1)


def test_over_re_runs_do_not_count(game: MazeChase) -> None:
    windows = maze_windows(game, 3, history=2, horizon=4, seed=2)
    baselines = make_baselines(game, windows, 0)
    whole = baselines.again
    assert whole is not None
    broken = whole.reruns.copy()
    broken[1] = 0
    running = whole.running.copy()
    running[1] = False
    cut = replace(baselines, again=replace(whole, reruns=broken, running=running))
    without = rollout_scores(windows.future, windows, [4], cut)["4"]
    assert without["rerun_running"] < 1
    both = whole.reruns[[0, 2], 3][whole.running[[0, 2], 3]], windows.future[[0, 2], 3][whole.running[[0, 2], 3]]
    error = np.square((both[0].astype(float) - both[1]) / 255).mean()
    assert without["rerun"] == pytest.approx(-10 * np.log10(error), abs=1e-9)


def test_a_copier_scores_what_copying_scores_and_its_page_says_so(game: MazeChase, tmp_path: Path) -> None:
    shown: list = []
    scores = evaluate(copier, game, history=2, starts=3, horizon=4, seeds=(0, 1, 2), look=shown.append)  # type: ignore[arg-type]
    json.dumps(scores, allow_nan=False)
    for row in scores["rollout"].values():
        assert (row["psnr"], row["ssim"]) == (row["copy_first"], row["copy_first_ssim"])
    assert [len(rollout.windows) for rollout in shown] == [3, 3, 3]
    first = shown[0]
    pictures = RolloutPictures(first.windows.context, first.windows.future, first.dreams)
    path = write_rollout_page(tmp_path / "page.html", "copier", scores, pictures, {"model": "<copier>"})
    text = path.read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)|https?://(?!www\.w3\.org)", text)
    assert "&lt;copier&gt;" in text
    for value in (scores["one_step"]["psnr"], scores["interval"]["one_step"]["psnr"][0], scores["ghosts_visible"]["4"]):
        assert f'<data value="{json.dumps(value)}">' in text
    films = re.findall(r"data:image/apng;base64,([^\"]+)", text)
    assert len(films) == 3


def test_films_keep_every_pixel() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 256, (2, 5, 8, 6, 3), dtype=np.uint8)
    both = beside(left, right, gap=3)
    assert both.shape == (5, 8, 15, 3)
    film = Image.open(io.BytesIO(apng_bytes(both, fps=8)))
    assert (film.n_frames, film.info["duration"]) == (5, 125.0)
    for t in range(5):
        film.seek(t)
        assert np.array_equal(np.asarray(film.convert("RGB"))[:, :6], left[t])
        assert np.array_equal(np.asarray(film.convert("RGB"))[:, 9:], right[t])
    gif = Image.open(io.BytesIO(gif_bytes(left, fps=10, scale=2)))
    assert (gif.n_frames, gif.size, gif.info["duration"]) == (5, (12, 16), 100)
    with pytest.raises(BadInput, match=r"frames: expected uint8 \(T, H, W, 3\)"):
        apng_bytes(left.astype(np.float32), fps=8)


def test_a_grid_of_groups_has_every_frame_in_its_place() -> None:
    rng = np.random.default_rng(0)
    context, target = rng.integers(0, 255, (2, 3, 4, 5, 3), dtype=np.uint8), rng.integers(0, 255, (2, 1, 4, 5, 3))
    sheet = grouped_grid([context, target.astype(np.uint8)], gap=1, between=4, scale=2)
    assert sheet.shape == (2 * 8 + 1, 3 * 10 + 2 + 4 + 10, 3)
    assert np.array_equal(sheet[9::2, 22:32:2], context[1, 2])
    assert np.array_equal(sheet[:8:2, 36::2], target[0, 0])
    assert (sheet[:, 32:36] == 255).all()
    with pytest.raises(BadInput, match="grouped_grid"):
        grouped_grid([context, target[:1].astype(np.uint8)])
