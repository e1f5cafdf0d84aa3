"""`rollout` and `play` on a run that `train` has made."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import rqvae
from benchmarks.maze_chase_scores import GATES, tables
from rqvae import shipped
from rqvae.games.collect import collect
from rqvae.games.maze_chase import MazeChase
from tests.conftest import ROOT, only


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world model of a few steps."""
    from rqvae.cli import run as command

    folder = tmp_path_factory.mktemp("world")
    collect("maze-chase", 300, 32, folder / "frames")
    backbone = "--stage2.init_args.backbone.init_args"
    line = ["train", ROOT / "configs/maze_chase/world_model.yaml", "--save-dir", folder, "--project", "p"]
    line += ["--data.dataset.init_args.root", folder / "frames", "--data.workers", 0, "--data.batch_size", 8]
    line += ["--train.steps", 2, f"{backbone}.width", 32, f"{backbone}.depth", 1, "--logging.progress", "false"]
    assert command([str(word) for word in line]) == 0
    return only(folder / "p")


def test_rollout_writes_every_field_and_is_the_same_again(run: Path, tmp_path: Path, cli, capfd) -> None:
    line = ["rollout", run, "--starts", 2, "--horizon", 4, "--seeds", "0,1", "--json"]
    assert cli(*line, tmp_path / "one.json") == 0
    table = capfd.readouterr().out
    assert "one step, moving pixels" in table
    scores = json.loads((tmp_path / "one.json").read_text())
    kinds = ("copy_last", "mean_frame", "rerun")
    expected = {"psnr", "psnr_moving", "ssim", *kinds, *(f"{k}_{s}" for k in kinds for s in ("moving", "ssim"))}
    assert scores["one_step"].keys() == scores["interval"]["one_step"].keys() == expected
    low, high = scores["interval"]["one_step"]["psnr"]
    assert low < scores["one_step"]["psnr"] < high
    named = {
        "open_turns",
        "blocked_refused",
        "player_visible",
        "ghosts_visible",
        "detector_error",
        "rollout",
        "protocol",
    }
    assert named <= scores.keys()
    assert scores["rollout"].keys() == {"1", "2", "4"}
    assert scores["protocol"]["seeds"] == [0, 1]
    assert cli(*line, tmp_path / "two.json", "--batch-size", 1, "--html", tmp_path / "page" / "two.html") == 0
    assert "Dreams beside the real game" in (tmp_path / "page" / "two.html").read_text()
    again = json.loads((tmp_path / "two.json").read_text())
    assert again["protocol"] == scores["protocol"]
    assert again["one_step"]["psnr"] == pytest.approx(scores["one_step"]["psnr"], abs=0.01)


def test_a_model_knows_its_actions_by_name_without_its_recording(run: Path, tmp_path: Path, cli) -> None:
    frames, away = run.parent.parent / "frames", tmp_path / "away"
    frames.rename(away)
    try:
        assert rqvae.load(run).spec.names == MazeChase(32).action_names
        assert cli("export", run, tmp_path / "out") == 0
    finally:
        away.rename(frames)
    assert rqvae.load(tmp_path / "out").spec.names == MazeChase(32).action_names


def test_rollout_refuses_what_is_no_world_model(run: Path, tmp_path: Path, cli, capfd) -> None:
    assert cli("rollout", tmp_path) == 2
    assert cli("rollout", run, "--starts", 0) == 2
    assert "starts >= 1" in capfd.readouterr().err
    assert cli("rollout", run, "--batch-size", 0) == 2
    assert "batch_size: expected at least 1, got 0" in capfd.readouterr().err
    assert cli("rollout", run, "--solver", "fly") == 2
    assert "--solver: expected one of euler" in capfd.readouterr().err
    assert cli("sample", run, "--num", 2, "--out", tmp_path / "out") == 2
    assert "python -m rqvae rollout" in capfd.readouterr().err


def test_the_model_of_the_package_knows_the_game(tmp_path: Path, cli) -> None:
    """On windows that it never saw; its card has all scores on more of them."""
    size = sum(file.stat().st_size for file in shipped.folder("maze-chase").rglob("*"))
    assert size < 15e6
    out = tmp_path / "scores.json"
    assert cli("rollout", "maze-chase", "--starts", 8, "--horizon", 4, "--seeds", 7, "--threads", 1, "--json", out) == 0
    scores = json.loads(out.read_text())
    assert scores["one_step"]["psnr_moving"] > scores["one_step"]["copy_last_moving"] + 10
    assert scores["blocked_refused"] > 0.88
    assert scores["open_turns_null"] < 0.2 < 0.8 < scores["open_turns"]
    assert rqvae.load("maze-chase").spec.names == MazeChase(32).action_names


def test_the_card_of_the_package_shows_the_measured_scores() -> None:
    """What the benchmark printed and keeps, every number of it, and the gates that the model was to pass."""
    scores = json.loads((ROOT / "benchmarks" / "results" / "maze_chase_scores.json").read_text())["figures"]
    assert tables(scores) in (shipped.folder("maze-chase") / "README.md").read_text()
    one_step = scores["one_step"]
    assert one_step["psnr_moving"] >= one_step["copy_last_moving"] + 10
    for key, gate in GATES.items():
        assert (scores[key]["64"] if "visible" in key else scores[key]) >= gate


def test_play_serves_a_browser_and_ends_with_ctrl_c() -> None:
    """The command itself: a port of its own, frames over a real socket, keys, and an end without a trace."""
    client = pytest.importorskip("websockets.sync.client")
    line = [sys.executable, "-m", "rqvae", "play", "maze-chase", "--port", "0", "--fps", "50"]
    server = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[2]
        with client.connect(address.replace("http", "ws") + "play") as browser:
            facts = json.loads(browser.recv(timeout=30))
            assert facts["actions"] == ["NOOP", "UP", "RIGHT", "LEFT", "DOWN"]
            browser.send(json.dumps({"press": 2}))
            steps = []
            for _ in range(5):
                message = browser.recv(timeout=30)
                (size,) = struct.unpack(">I", message[:4])
                steps.append(json.loads(message[4 : 4 + size])["step"])
            assert steps == [1, 2, 3, 4, 5]
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=30)
    finally:
        server.kill()
    assert "Traceback" not in errors
    assert server.returncode in (0, 130)
