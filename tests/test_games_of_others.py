"""Games that are not ours: environments of Gymnasium, and folders of frames that others have recorded."""

from __future__ import annotations

import csv
import json
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from PIL import Image

from rqvae.commands import play
from rqvae.commands.options import load_world_model, open_recording
from rqvae.errors import BadInput
from rqvae.games.collect import collect, import_folder
from rqvae.games.gymnasium_game import GymnasiumGame
from rqvae.games.windows import recorded_windows
from rqvae.img_datasets.game_frames import GameFrames, rank_split
from rqvae.play.session import Session
from tests.conftest import only

SIDE = 16


class Blinking(gymnasium.Env[np.ndarray, int]):
    """A console whose sprite is drawn in one of four frames: a dot that goes right (1) or left (0).

    Its colour is drawn for each episode, so that no two of them share a frame.
    """

    observation_space = gymnasium.spaces.Box(0, 255, (2 * SIDE, 2 * SIDE, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.column, self.frame = int(self.np_random.integers(4, 12)), 0
        self.colour = self.np_random.integers(50, 256, 3).astype(np.uint8)
        return self._draw(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.frame += 1
        if self.frame % 4 == 0:
            self.column += 1 if action else -1
        return self._draw(), 0.25, not 0 < self.column < SIDE - 1, False, {}

    def _draw(self) -> np.ndarray:
        picture = np.full((2 * SIDE, 2 * SIDE, 3), 40, np.uint8)
        if self.frame % 4 == 1:
            picture[8:10, 2 * self.column : 2 * self.column + 2] = self.colour
        return picture

    def get_action_meanings(self) -> list[str]:
        return ["LEFT", "RIGHT"]


class Numbers(Blinking):
    """An environment that is no picture."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)


class Drawn(Blinking):
    """One whose observation is a number, whose picture is drawn, and whose actions begin at 5."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2, start=5)
    get_action_meanings = None

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        _, *rest = super().step(action - 5)
        return np.zeros(1, np.float32), *rest

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def render(self) -> np.ndarray:
        assert self.render_mode == "rgb_array"
        return self._draw()


class Continuous(Blinking):
    """An environment whose actions are not numbered."""

    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)


class Several(Blinking):
    """One with several buttons at once."""

    action_space = gymnasium.spaces.MultiBinary(3)


KINDS = (Blinking, Numbers, Drawn, Continuous, Several)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    for kind in KINDS:
        gymnasium.register(f"{kind.__name__}-v0", kind, disable_env_checker=True)
    yield
    for kind in KINDS:
        gymnasium.registry.pop(f"{kind.__name__}-v0")


def test_a_sprite_of_every_fourth_frame_is_seen_in_each() -> None:
    game = GymnasiumGame("Blinking-v0", SIDE, max_steps=3)
    assert game.action_names == ("LEFT", "RIGHT")
    game.reset(3)
    console: Any = game._env.unwrapped
    column = console.column
    for step in range(3):
        frame, reward, terminated, truncated = game.step(1)
        expected = np.full((SIDE, SIDE, 3), 40, np.uint8)
        expected[4, column + step] = console.colour
        assert np.array_equal(frame, expected)
        assert (reward, terminated, truncated) == (1.0, False, step == 2)


def test_an_environment_that_draws_its_pictures_is_the_same_game() -> None:
    shown, drawn = GymnasiumGame("Blinking-v0", SIDE), GymnasiumGame("Drawn-v0", SIDE)
    assert drawn.action_names == ("5", "6")
    assert np.array_equal(drawn.reset(1), shown.reset(1))
    for action in (0, 1, 1):
        assert np.array_equal(drawn.step(action)[0], shown.step(action)[0])


def test_an_episode_that_ends_within_a_step_ends() -> None:
    game = GymnasiumGame("Blinking-v0", SIDE, skip=100)
    game.reset(0)
    console: Any = game._env.unwrapped
    column = console.column
    _, reward, terminated, _ = game.step(0)
    assert terminated
    assert reward == column, "a quarter a frame, four frames a column"


def test_a_recording_of_an_environment_is_one_of_ours(tmp_path: Path) -> None:
    first = collect("Blinking-v0", 300, SIDE, tmp_path / "a", max_steps=12)
    assert first["env_version"] == f"gymnasium {gymnasium.__version__}"
    assert "not to be passed on" in first["licence"]
    assert first["action_names"] == ["LEFT", "RIGHT"]
    collect("Blinking-v0", 300, SIDE, tmp_path / "b", max_steps=12)
    one, two = ((tmp_path / name / "shard-00000.npz").read_bytes() for name in "ab")
    assert one == two, "a function of its parameters"
    assert collect("Blinking-v0", 300, SIDE, tmp_path / "a", max_steps=12) == first
    with pytest.raises(BadInput, match=r"meta\.json: skip: expected 2, got a recording with 4"):
        collect("Blinking-v0", 300, SIDE, tmp_path / "a", max_steps=12, skip=2)
    dataset = GameFrames("train", root=str(tmp_path / "a"), size=SIDE, num_actions=2, history=2, context=True)
    dataset.open()
    assert dataset.action_names == ("LEFT", "RIGHT")
    assert dataset[0].require_img().shape == (3, SIDE, SIDE)


@pytest.mark.parametrize(
    ("env", "arguments", "words"),
    [
        ("Numbers-v0", {}, r"expected pictures \(H, W, 3\) uint8"),
        ("Continuous-v0", {}, "expected numbered actions"),
        ("Several-v0", {}, r"expected numbered actions \(Discrete\), got MultiBinary"),
        ("nowhere:Blinking-v0", {}, "No module named 'nowhere'"),
        ("Nowhere-v0", {}, "expected maze-chase, a folder of frames or an environment of Gymnasium, got Nowhere-v0"),
        ("Blinking-v0", {"policy": "forager"}, "policy: expected persistent-random for Blinking-v0"),
        ("Blinking-v0", {"skip": 0}, "skip"),
    ],
)
def test_what_cannot_be_recorded(env: str, arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        collect(env, 10, SIDE, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_without_the_packages_the_command_to_install_them(
    monkeypatch: pytest.MonkeyPatch, cli, capfd, tmp_path
) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    assert cli("collect", "ALE/MsPacman-v5", "--out", tmp_path / "out") == 2
    line = capfd.readouterr().err.strip()
    assert "gymnasium is not installed; pip install 'mae-dit[atari]'" in line
    assert "\n" not in line
    assert not (tmp_path / "out").exists()


def test_atari_shows_the_maximum_over_all_skipped_frames() -> None:
    """Against the emulator itself."""
    ale_py = pytest.importorskip("ale_py")
    gymnasium.register_envs(ale_py)
    raw = gymnasium.make("ALE/MsPacman-v5", frameskip=1, repeat_action_probability=0.0)
    game = GymnasiumGame("ALE/MsPacman-v5", 64)
    raw.reset(seed=5)
    game.reset(5)
    for _ in range(80):
        four = np.max([raw.step(3)[0] for _ in range(4)], axis=0)
        expected = np.asarray(Image.fromarray(four).resize((64, 64), Image.Resampling.BOX))
        assert np.array_equal(game.step(3)[0], expected)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve frames in three episodes, as others have recorded them."""
    root = tmp_path / "others"
    root.mkdir()
    rng = np.random.default_rng(0)
    with (root / "frames.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file", "episode", "action", "reward"))
        for n in range(12):
            frame = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            Image.fromarray(frame).save(root / f"{n:03d}.png")
            table.writerow((f"{n:03d}.png", "abc"[n // 4], ("up", "down", "fire")[n % 3], n / 2))
    return root


def test_a_folder_of_pictures_becomes_a_recording(folder: Path, tmp_path: Path, cli, capfd) -> None:
    out = tmp_path / "recording"
    assert cli("collect", folder, "--size", SIDE, "--out", out) == 0
    assert "12 frames in 3 episodes" in capfd.readouterr().out
    assert cli("collect", folder, "--size", SIDE, "--out", out, "--max-steps", 3) == 2
    assert f"--max-steps: expected none beside the folder {folder}, got 3" in capfd.readouterr().err
    meta = json.loads((out / "meta.json").read_text())
    assert meta["action_names"] == ["down", "fire", "up"]
    with np.load(out / "shard-00000.npz") as table:
        for n, frame in enumerate(table["frames"]):
            assert np.array_equal(frame, np.asarray(Image.open(folder / f"{n:03d}.png")))
        assert table["action"].tolist() == [(2, 0, 1)[n % 3] for n in range(12)]
        assert table["episode"].tolist() == [n // 4 for n in range(12)]
        assert table["done"].tolist() == [n in (3, 7) for n in range(12)]
        assert table["reward"].tolist() == [n / 2 for n in range(12)]
    splits = [GameFrames(s, root=str(out), size=SIDE, num_actions=3) for s in ("train", "val", "test")]
    for split in splits:
        split.open()
    assert sorted(map(len, splits)) == [4, 4, 4]
    assert import_folder(folder, SIDE, out) == meta
    Image.new("RGB", (SIDE, SIDE)).save(folder / "005.png")
    with pytest.raises(BadInput, match=r"meta\.json: env: expected a folder with sha256"):
        import_folder(folder, SIDE, out)


def test_an_episode_ends_where_the_table_says_so(folder: Path, tmp_path: Path) -> None:
    """Without names of episodes, by `done` alone; written by a spreadsheet."""
    lines = [f"{n:03d}.png,{n % 2},{int(n in (3, 7, 11))}" for n in range(12)]
    (folder / "frames.csv").write_text("\n".join(["file,action,done", *lines]), encoding="utf-8-sig")
    assert import_folder(folder, SIDE, tmp_path / "out")["episodes"] == 3
    with np.load(tmp_path / "out" / "shard-00000.npz") as table:
        assert table["episode"].tolist() == [n // 4 for n in range(12)]
        assert table["done"].tolist() == [n in (3, 7, 11) for n in range(12)]


def broken_png() -> bytes:
    """A picture whose second block of data is damaged: Pillow finds out when it reads the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    blocks = [(b"IHDR", head), (b"IDAT", data[:50]), (b"IDAT", data[50:]), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in blocks]
    parts[2] = parts[2].replace(b"IDAT", b"\0\1\2\3")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "frames.csv").unlink(), r"frames\.csv: expected a table of frames"),
        (lambda root: (root / "frames.csv").write_text("file,key\n"), "there is no action"),
        (lambda root: (root / "frames.csv").write_text("file,action\n"), "expected a row a frame, got none"),
        (lambda root: (root / "frames.csv").write_text("file,action\n000.png,\n"), "line 2: expected a file and"),
        (lambda root: (root / "003.png").unlink(), r"003\.png: expected a PNG, got FileNotFoundError"),
        (lambda root: (root / "003.png").write_bytes(b"GIF"), r"003\.png: expected a PNG, got Unidentified"),
        (lambda root: Image.new("RGB", (SIDE, SIDE)).save(root / "003.png", "JPEG"), "stay lossless.*got JPEG"),
        (lambda root: Image.new("RGB", (8, SIDE)).save(root / "003.png"), "expected 16 x 16 pixels, got 8 x 16"),
        (
            lambda root: (root / "frames.csv").write_text("file,action,episode\n0.png,a,x\n"),
            r"0\.png: expected a PNG",
        ),
        (
            lambda root: (root / "frames.csv").write_text(
                "file,action,episode\n000.png,a,x\n001.png,a,y\n002.png,a,x\n"
            ),
            "line 4: episode x goes on after it ended",
        ),
        (
            lambda root: (root / "frames.csv").write_text("file,action,reward\n000.png,a,much\n"),
            "line 2: reward: expected a number, got much",
        ),
        (
            lambda root: (root / "frames.csv").write_text("file,action,done\n000.png,a,maybe\n"),
            "line 2: done: expected 0 or 1, got maybe",
        ),
        (
            lambda root: (root / "frames.csv").write_bytes("file,action\n000.png,à\n".encode("latin-1")),
            "expected UTF-8, got byte 0xe0 at 20",
        ),
        (lambda root: (root / "003.png").write_bytes(broken_png()), r"003\.png: expected a PNG, got SyntaxError"),
        (lambda root: Image.new("RGBA", (SIDE, SIDE)).save(root / "003.png"), "got a PNG of mode RGBA"),
        (lambda root: Image.new("I;16", (SIDE, SIDE)).save(root / "003.png"), "got a PNG of mode I;16"),
    ],
)
def test_a_folder_that_cannot_be_read(change, words: str, folder: Path, tmp_path: Path) -> None:
    change(folder)
    with pytest.raises(BadInput, match=words):
        import_folder(folder, SIDE, tmp_path / "out")
    assert not (tmp_path / "out" / "meta.json").exists()


def test_windows_of_a_recording_are_its_frames() -> None:
    episodes = [
        (np.full((n, 2, 2, 3), 0, np.uint8) + np.arange(n, dtype=np.uint8)[:, None, None, None]) for n in (9, 5)
    ]
    pairs = [
        (frames + 50 * k, np.arange(len(frames)) + 50 * k, np.arange(len(frames)) != 6)
        for k, frames in enumerate(episodes)
    ]
    windows = recorded_windows(pairs, 5, history=2, horizon=3, seed=0)
    assert windows.frames.shape == (5, 5, 2, 2, 3)
    starts = windows.frames[:, 0, 0, 0, 0].astype(int)
    assert sorted(starts) == [0, 1, 2, 3, 50], "each place once, none whose first target is known"
    assert np.array_equal(windows.actions, starts[:, None] + np.arange(4))
    assert np.array_equal(windows.frames[:, :, 0, 0, 0], starts[:, None] + np.arange(5))
    with pytest.raises(BadInput, match="expected 8 windows of 2 \\+ 4 frames, the recording has room for 4"):
        recorded_windows(pairs, 8, history=2, horizon=4, seed=0)


def test_a_model_of_a_recording_is_scored_on_frames_alone_and_played(tmp_path: Path, cli, capfd) -> None:
    collect("Blinking-v0", 400, SIDE, tmp_path / "frames", max_steps=12)
    (tmp_path / "small.yaml").write_text(
        f"""
data:
  dataset:
    class_path: rqvae.img_datasets.game_frames.GameFrames
    init_args: {{root: {tmp_path}/frames, size: {SIDE}, history: 2, context: true, padding: false, num_actions: 2}}
  train_transform: {{class_path: rqvae.img_datasets.transforms.Identity}}
  batch_size: 4
  workers: 0
stage1: {{class_path: rqvae.models.stage1.pixel.PixelStage1, init_args: {{patch: 4}}}}
stage2:
  class_path: rqvae.models.stage2.world_model.WorldModel
  init_args:
    backbone:
      class_path: rqvae.models.stage2.linear_dit.LinearDiT
      init_args: {{width: 16, depth: 1, heads: 2, cross_heads: 2}}
train: {{steps: 2}}
logging: {{wandb: disabled, tensorboard: false, progress: false}}
pictures: {{every: null}}
"""
    )
    assert cli("train", tmp_path / "small.yaml", "--save-dir", tmp_path, "--project", "p") == 0
    out = ["--json", tmp_path / "scores.json", "--html", tmp_path / "page.html"]
    line = ["rollout", only(tmp_path / "p"), "--recording", tmp_path / "frames", "--horizon", 4, "--seeds", "0,1"]
    assert cli(*line, "--starts", 3, *out) == 0
    assert "one step, moving pixels" in capfd.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores.keys() == {"one_step", "rollout", "interval", "by_seed", "protocol"}
    assert {"psnr_moving", "copy_last_moving", "mean_frame_moving"} <= scores["one_step"].keys()
    assert not any("rerun" in key for key in scores["one_step"])
    dataset = GameFrames("test", root=str(tmp_path / "frames"), size=SIDE, history=2, num_actions=2)
    dataset.open()
    episodes = [(*dataset.episode(k), dataset.fresh(k)) for k in range(dataset.episodes)]
    squares = []
    windows = recorded_windows(episodes, 3, history=2, horizon=4, seed=0)
    assert windows.sha256 == scores["protocol"]["windows"][0]
    for frames in windows.frames:
        squares += [((a.astype(float) - b) ** 2).mean() for a, b in zip(frames[1:-1], frames[2:], strict=True)]
    expected = np.mean([10 * np.log10(255**2 / square) for square in squares])
    assert scores["by_seed"][0]["one_step"]["copy_last"] == pytest.approx(expected, abs=0.5)
    assert "Dreams beside the real game" in (tmp_path / "page.html").read_text()
    assert cli(*line, "--ghosts", 2) == 2
    assert "--ghosts: expected none beside --recording" in capfd.readouterr().err
    assert cli(*line, "--starts", 300) == 2
    assert "expected 300 windows" in capfd.readouterr().err
    _plays_without_a_game(only(tmp_path / "p"), tmp_path / "frames", cli, capfd)


def _with_a_short_test_episode(root: Path) -> Path:
    """A recording of three episodes, of which the one of the split `test` is shorter than a window."""
    (root / "pictures").mkdir()
    table = ["file,action,episode"]
    for k, split in rank_split(0, 3).items():
        for n in range(2 if split == "test" else 5):
            Image.new("RGB", (SIDE, SIDE), (k, n, 0)).save(root / "pictures" / f"{k}{n}.png")
            table.append(f"{k}{n}.png,{'RIGHT' if n else 'LEFT'},{k}")
    (root / "pictures" / "frames.csv").write_text("\n".join([table[0], *sorted(table[1:])]))
    import_folder(root / "pictures", SIDE, root / "short")
    return root / "short"


def _plays_without_a_game(run: Path, frames: Path, cli: Callable[..., int], capfd: Any) -> None:
    """A dream of it begins from recorded frames; while no key is down it is played under the null action."""
    assert cli("play", run) == 2
    assert "expected a model of NOOP, UP" in (said := capfd.readouterr().err)
    assert "play it with --recording DIR" in said
    assert cli("play", run, "--recording", frames, "--ghosts", 2) == 2
    assert cli("play", run, "--recording", _with_a_short_test_episode(frames.parent), "--port", 0) == 2
    assert "expected 1 windows of 2 + 1 frames" in capfd.readouterr().err
    options = play.parser().parse_args([str(run), "--recording", str(frames)])
    spec, two_stage = load_world_model(str(run))
    world = play._world(options, spec, two_stage)
    assert (world.game, world.idle, world.action_names) == (None, 2, ("LEFT", "RIGHT"))
    session, start = Session(world, seed=4), world.starts(4)
    test = open_recording(str(frames), spec, "test")
    recorded = np.concatenate([test.episode(k)[0] for k in range(test.episodes)])
    assert (recorded == start.frames[-1]).all((1, 2, 3)).any()
    session.press(1)
    session.release()
    for expected in (1, 2, 2):
        assert session.tick().real is None
        assert session.history[-1][1] == expected
    with pytest.raises(BadInput, match="record: expected a game with an action NOOP.* got LEFT, RIGHT"):
        session.record(True)
