"""Control is judged by the real game: known scores of the game itself, of a copier, and of forks that ghosts decide."""

from __future__ import annotations

import numpy as np
import pytest

from rqvae.games.detector import MazeDetector
from rqvae.games.maze_chase import MazeChase
from rqvae.games.windows import Windows, maze_windows
from rqvae.trainers.rollout_baselines import reseeded
from rqvae.trainers.rollout_control import HELD, control, find_forks
from rqvae.trainers.rollout_scores import one_step, persistence


class Oracle:
    """A dreamer that plays the real game: every score of it is known."""

    def __init__(self, game: MazeChase, windows: Windows, draws: int | None = None) -> None:
        self.game, self.windows, self.draws = game, windows, draws

    def __call__(self, context: np.ndarray, past: np.ndarray, ahead: np.ndarray, seed: int) -> np.ndarray:
        dreams = []
        for n in range(len(context)):
            at = next(i for i in range(len(self.windows)) if np.array_equal(self.windows.context[i], context[n]))
            state = self.windows.states[at]
            self.game.restore_state(state if self.draws is None else reseeded(state, self.draws + n))
            dreams.append([self.game.step(int(a) % 5)[0] for a in ahead[n]])
        return np.array(dreams)


def test_the_scores_of_the_game_itself_are_perfect_and_of_a_copier_are_not() -> None:
    game = MazeChase()
    windows, detector = maze_windows(game, 6, history=3, horizon=8, seed=0), MazeDetector(game)
    oracle = Oracle(MazeChase(), windows)
    scores = control(oracle, windows, game, detector, 0)
    assert (scores["open_turns"], scores["blocked_refused"], scores["straight_on"]) == (1.0, 1.0, 1.0)
    assert scores["open_turns_count"] > 5
    assert scores["blocked_refused_count"] > 3
    assert scores["open_turns_null"] < 0.5
    assert (scores["open_turns_all"], scores["blocked_refused_all"]) == (1.0, 1.0)
    dreams = oracle(windows.context, windows.actions[:, :2], windows.actions[:, 2:], 0)
    assert persistence(dreams, windows, detector, (1, 8)) == {
        "player_visible": {"1": 1.0, "8": 1.0},
        "ghosts_visible": {"1": 1.0, "8": 1.0},
    }

    def copier(context: np.ndarray, past: np.ndarray, ahead: np.ndarray, seed: int) -> np.ndarray:
        return np.repeat(context[:, -1:], ahead.shape[1], axis=1)

    step = one_step(copier, windows, 0)
    assert step["psnr"] == step["copy_last"]
    assert step["psnr_moving"] == step["copy_last_moving"]
    assert control(copier, windows, game, detector, 0)["open_turns"] == 0
    gone = persistence(np.zeros_like(dreams), windows, detector, (8,))
    assert gone == {"player_visible": {"8": 0.0}, "ghosts_visible": {"8": 0.0}}


@pytest.fixture(scope="module")
def many() -> Windows:
    return maze_windows(MazeChase(), 60, history=3, horizon=HELD, seed=3)


def test_where_no_ghost_can_catch_the_player_every_draw_of_the_ghosts_scores_one(many: Windows) -> None:
    """A perfect simulator with other draws misses only forks that the scores leave out."""
    game = MazeChase()
    for draws in (0, 1000):
        scores = control(Oracle(MazeChase(lives=9), many, draws), many, game, MazeDetector(game), 0)
        assert (scores["open_turns"], scores["blocked_refused"], scores["straight_on"]) == (1.0, 1.0, 1.0)
        assert scores["open_turns_all"] < 1


def test_over_all_forks_the_game_again_is_beside_the_dreams(many: Windows) -> None:
    game, seeds = MazeChase(), range(5)
    detector = MazeDetector(game)
    found = [control(Oracle(MazeChase(lives=9), many, 1000 * s), many, game, detector, s) for s in seeds]
    for kind in ("open_turns", "blocked_refused"):
        oracle, again = (np.mean([scores[f"{kind}_all{of}"] for scores in found]) for of in ("", "_rerun"))
        assert again == pytest.approx(oracle, abs=0.03)
    assert 0.9 < np.mean([scores["open_turns_all_rerun"] for scores in found]) < 1


def test_where_there_is_no_fork_of_a_kind_there_is_no_score(many: Windows) -> None:
    """A single window, in which the player is at a crossing or stands before every wall already."""
    game = MazeChase()
    lacking = 0
    for n in range(len(many)):
        one = Windows(
            many.frames[n : n + 1], many.actions[n : n + 1], 3, many.states[n : n + 1], many.ghosts[n : n + 1]
        )
        kinds = {fork.kind for fork in find_forks(one, game)}
        if "blocked" in kinds:
            continue
        lacking += 1
        scores = control(Oracle(MazeChase(lives=9), one), one, game, MazeDetector(game), 0)
        assert [scores[key] for key in ("blocked_refused", "blocked_refused_all_rerun")] == [None, None]
        assert scores["blocked_refused_count"] == 0
    assert lacking


def test_the_forks_are_those_of_the_map(many: Windows) -> None:
    game = MazeChase()
    forks = find_forks(many, game)
    assert {fork.kind for fork in forks} == {"open", "blocked", "noop"}
    assert {fork.safe for fork in forks} == {True, False}
    for fork in forks:
        state = many.states[fork.window]
        ways = game.ways[state.player]
        assert fork.action != state.facing
        if fork.kind == "open":
            assert fork.cells[0] == ways[fork.action]
        elif state.facing in ways:
            assert fork.cells[0] == ways[state.facing]
        else:
            assert fork.cells[0] == state.player
