"""The recorder of games: what it writes replays, is reused, and is never half there."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rqvae.errors import BadInput
from rqvae.games import recording
from rqvae.games.collect import collect
from rqvae.games.maze import ACTION_NAMES
from rqvae.games.maze_chase import MazeChase
from rqvae.randomness import fold


def test_recording_replays_from_its_numbers(tmp_path: Path) -> None:
    done = []
    meta = collect("maze-chase", 1500, 32, tmp_path, seed=4, shard_frames=400, progress=done.append)
    assert sum(done) == 1500
    assert meta == json.loads((tmp_path / "meta.json").read_text())
    assert meta["action_names"] == list(ACTION_NAMES) == ["NOOP", "UP", "RIGHT", "LEFT", "DOWN"]
    assert len(meta["shards"]) >= 2
    tables = []
    for entry in meta["shards"]:
        content = (tmp_path / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        with np.load(tmp_path / entry["file"], allow_pickle=False) as table:
            tables.append(dict(table))
        assert len(tables[-1]["frames"]) == entry["frames"]
    column = {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}
    assert [str(column[n].dtype) for n in ("frames", "action", "reward", "done", "episode")] == [
        "uint8", "int16", "float32", "bool", "int32",
    ]  # fmt: skip
    assert column["frames"].shape == (1500, 32, 32, 3)
    assert not any(set(a["episode"]) & set(b["episode"]) for a, b in zip(tables, tables[1:], strict=False))
    assert set(column["episode"]) == set(range(meta["episodes"]))
    game = MazeChase(size=32)
    for k in range(meta["episodes"]):
        rows = np.flatnonzero(column["episode"] == k)
        frame = game.reset(fold(4, "episode", k))
        for i in rows:
            assert np.array_equal(column["frames"][i], frame)
            frame, reward, terminated, truncated = game.step(int(column["action"][i]))
            assert column["reward"][i] == reward
            assert column["done"][i] == (terminated or truncated)
        assert column["done"][rows[-1]] == (k < meta["episodes"] - 1 or meta["last_episode_complete"])


def test_a_complete_recording_is_reused_and_another_refused(tmp_path: Path) -> None:
    meta = collect("maze-chase", 300, 32, tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert collect("maze-chase", 300, 32, tmp_path) == meta
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    with pytest.raises(BadInput, match=r"meta\.json: frames: expected 301, got a recording with 300"):
        collect("maze-chase", 301, 32, tmp_path)
    with pytest.raises(BadInput, match=r"lives: expected 2, got a recording with 1"):
        collect("maze-chase", 300, 32, tmp_path, lives=2)
    older = {key: value for key, value in meta.items() if key != "lives"}
    (tmp_path / "meta.json").write_text(json.dumps(older))
    assert collect("maze-chase", 300, 32, tmp_path) == older, "from before there were lives"
    (tmp_path / "shard-00000.npz").write_bytes(b"short")
    assert collect("maze-chase", 300, 32, tmp_path) == meta, "a damaged one is done again"
    assert (tmp_path / "shard-00000.npz").stat().st_size == meta["shards"][0]["bytes"]


def test_a_failure_in_the_middle_leaves_no_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect("maze-chase", 900, 32, tmp_path / "whole", shard_frames=300)
    calls = []

    def full_disk(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        collect("maze-chase", 900, 32, tmp_path / "half", shard_frames=300)
    assert sorted(p.name for p in (tmp_path / "half").iterdir()) == ["shard-00000.npz"]
    monkeypatch.undo()
    assert collect("maze-chase", 900, 32, tmp_path / "half", shard_frames=300) == whole
    assert not list((tmp_path / "half").glob(".*"))


def test_a_kill_in_the_middle_leaves_only_whole_shards(tmp_path: Path) -> None:
    out = tmp_path / "killed"
    code = (
        "import sys; from pathlib import Path; from rqvae.games.collect import collect; "
        f"collect('maze-chase', 10**7, 32, Path({str(out)!r}), shard_frames=300)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("shard-*.npz"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert not (out / "meta.json").exists()
    for shard in out.glob("shard-*.npz"):
        with np.load(shard) as table:
            assert len(table["frames"]) >= 300
    assert collect("maze-chase", 400, 32, out)["frames"] == 400
    assert len(list(out.glob("shard-*.npz"))) == 1


def test_collect_bad_input(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match="expected maze-chase, a folder of frames or an environment of Gymnasium, got chess"
    ):
        collect("chess", 10, 32, tmp_path / "a")
    with pytest.raises(BadInput, match="frames"):
        collect("maze-chase", 0, 32, tmp_path / "a")
    assert not (tmp_path / "a").exists(), "nothing is written before the arguments are checked"
    with pytest.raises(BadInput, match="policy: expected one of persistent-random, forager, mixed, all, got best"):
        collect("maze-chase", 10, 32, tmp_path / "a", policy="best")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="file: expected a folder"):
        collect("maze-chase", 10, 32, tmp_path / "file")
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(BadInput, match=r"meta\.json"):
        collect("maze-chase", 10, 32, tmp_path)


def test_a_recording_may_end_where_an_episode_ends(tmp_path: Path) -> None:
    """`last_episode_complete` is then true, a plain bool that JSON can hold."""
    whole = collect("maze-chase", 400, 32, tmp_path / "whole")
    with np.load(tmp_path / "whole" / whole["shards"][0]["file"]) as shard:
        first_end = int(np.flatnonzero(shard["done"])[0]) + 1
    assert not whole["last_episode_complete"] or first_end == 400
    meta = collect("maze-chase", first_end, 32, tmp_path / "one")
    assert meta["last_episode_complete"] is True
    assert json.loads((tmp_path / "one" / "meta.json").read_text())["last_episode_complete"] is True
