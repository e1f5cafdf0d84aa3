"""What is computed does not depend on how many processes compute it."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import finish, largest_difference, only, rows, start, tensors

STEPS = 6


def command(name: str, save_dir: Path, accumulate: int, *more: object) -> list[object]:
    return [
        "train", f"configs/debug/{name}.yaml", "--save-dir", save_dir, "--project", "p", "--run-name", "r",
        "--train.precision", "fp64", "--train.accumulate", accumulate, "--train.steps", STEPS, "--data.workers", 0,
        *more,
    ]  # fmt: skip


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("name", ["stage1_gan", pytest.param("stage2", marks=pytest.mark.slow)])
def test_two_processes_equal_one(name: str, accumulate: int, tmp_path: Path, cli) -> None:
    dump = tmp_path / "hashes"
    dump.mkdir()
    observer = json.dumps([{"class_path": "tests.observers.RankWeights", "init_args": {"folder": str(dump)}}])
    process = start(*command(name, tmp_path / "two", accumulate, "--world-size", 2, "--observers", observer))
    code, errors = finish(process)
    assert code == 0, errors
    assert cli(*command(name, tmp_path / "one", accumulate)) == 0
    one, two = only(tmp_path / "one" / "p"), only(tmp_path / "two" / "p")
    a, b = tensors(one, STEPS), tensors(two, STEPS)
    assert any(v.dtype.is_floating_point and v.dtype.itemsize == 8 for v in a.values())
    assert largest_difference(a, b) < 1e-9
    for x, y in zip(rows(one), rows(two), strict=True):
        for key in ("train/loss_total", "train/grad_norm"):
            assert x[key] == pytest.approx(y[key], rel=1e-9)
    ranks = [json.loads((dump / f"rank_{r}.json").read_text()) for r in (0, 1)]
    assert ranks[0] == ranks[1], "replicas differ"
    assert set(ranks[0]) == ({"autoencoder", "discriminator"} if name == "stage1_gan" else {"generator"})


@pytest.mark.parametrize("name", ["stage1_gan", "stage2"])
def test_accumulation_equals_one_big_batch(name: str, tmp_path: Path, cli) -> None:
    fixed = ["--gan.weighting", "fixed"] if name == "stage1_gan" else []
    for accumulate in (1, 4):
        assert cli(*command(name, tmp_path / str(accumulate), accumulate, *fixed)) == 0
    a, b = (tensors(only(tmp_path / str(n) / "p"), STEPS) for n in (1, 4))
    logged = [k for k in a if k.startswith("log/")]
    for key in logged:
        del a[key]
        b.pop(key, None)
    assert largest_difference(a, b) < 1e-9


def test_loader_workers_change_nothing(tmp_path: Path, cli) -> None:
    for workers in (0, 2):
        line = ["train", "configs/debug/stage1.yaml", "--save-dir", tmp_path / str(workers), "--project", "p"]
        assert cli(*line, "--run-name", "r", "--train.steps", 4, "--data.workers", workers) == 0
    a, b = (tensors(only(tmp_path / str(n) / "p"), 4) for n in (0, 2))
    assert all(a[k].equal(b[k]) for k in a)


@pytest.mark.slow
def test_no_worker_outlives_a_killed_launcher(tmp_path: Path) -> None:
    slow = json.dumps([{"class_path": "tests.observers.Slow", "init_args": {"seconds": 0.3}}])
    line = command("stage1_gan", tmp_path, 1, "--world-size", 2, "--observers", slow, "--train.steps", 400)
    process = start(*line, "--data.workers", 1, start_new_session=True)

    def alive() -> list[str]:
        listing = subprocess.run(["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True, check=True).stdout
        return [row for row in listing.splitlines() if str(tmp_path) in row]

    end = time.monotonic() + 120
    while time.monotonic() < end and (len(alive()) < 5 or not list(tmp_path.glob("p/r_*/metrics.jsonl"))):
        time.sleep(0.1)
    assert len(alive()) >= 5, "a launcher, two ranks and their loader workers"
    process.kill()
    process.wait()
    time.sleep(10)
    assert alive() == []
