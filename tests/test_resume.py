"""The same command again goes on, bit for bit; signals leave a checkpoint."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from rqvae.trainers.checkpoint import outdated, prune, save, verify
from tests.conftest import assert_same, finish, only, rows, start, tensors, without_times

SLOW = '[{"class_path": "tests.observers.Slow", "init_args": {"seconds": 0.15}}]'


def command(config: str, save_dir: Path, *more: object) -> list[object]:
    return ["train", config, "--save-dir", save_dir, "--project", "p", "--run-name", "r", *more]


def wait_for_step(save_dir: Path, step: int, timeout: float = 60) -> Path:
    """Until the run has logged `step`."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        for file in save_dir.glob("p/r_*/metrics.jsonl"):
            if len(file.read_text().splitlines()) >= step:
                return file.parent
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {save_dir}")


@pytest.mark.parametrize("name", ["stage1_gan", "stage2"])
def test_killed_at_a_random_step_and_repeated_equals_undisturbed(name: str, tmp_path: Path, cli) -> None:
    config = f"configs/debug/{name}.yaml"
    assert cli(*command(config, tmp_path / "whole")) == 0
    process = start(*command(config, tmp_path / "killed", "--observers", SLOW))
    step = random.randint(2, 17)
    wait_for_step(tmp_path / "killed", step)
    process.kill()
    process.wait()
    # the observer that slowed it down is no part of what is computed, but of the config: the run goes on without it
    assert cli(*command(config, tmp_path / "killed", "--observers", SLOW)) == 0
    whole, killed = only(tmp_path / "whole" / "p"), only(tmp_path / "killed" / "p")
    assert_same(tensors(whole, 20), tensors(killed, 20))
    assert without_times(whole) == without_times(killed), f"killed at step {step}"
    assert [row["step"] for row in rows(killed)] == list(range(1, 21))


def test_finished_run_is_left_alone_and_fresh_starts_anew(tmp_path: Path, cli, caplog) -> None:
    line = command("configs/debug/stage1.yaml", tmp_path, "--train.steps", 2)
    assert cli(*line) == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert cli(*line) == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    time.sleep(1.1)
    assert cli(*line, "--fresh") == 0
    assert len(list((tmp_path / "p").iterdir())) == 2


@pytest.mark.parametrize(
    ("number", "code", "world", "group"),
    [
        (signal.SIGTERM, 143, 1, False),
        pytest.param(signal.SIGINT, 130, 1, True, marks=pytest.mark.slow),
        (signal.SIGTERM, 143, 2, False),
    ],
)
def test_signal_checkpoints_first(number: int, code: int, world: int, group: bool, tmp_path: Path, cli) -> None:
    """With loader workers, which get the signal too where it goes to the whole group."""
    line = command("configs/debug/stage2.yaml", tmp_path, "--observers", SLOW, "--checkpoint.every", 1000)
    line += ["--data.workers", 2, "--train.stop_check_seconds", 0.2, "--train.steps", 40]
    process = start(*line, "--world-size", world, start_new_session=True)
    run = wait_for_step(tmp_path, 3)
    (os.killpg if group else os.kill)(process.pid, number)
    returned, errors = finish(process, 25)
    assert returned == code, errors
    step = len(rows(run))
    assert step < 40
    assert tensors(run, step)
    assert cli(*line) == 0
    assert [row["step"] for row in rows(run)] == list(range(1, 41))


def test_resume_keeps_channels_last(tmp_path: Path, cli) -> None:
    """Moments are put beside the weights in the weights' memory format."""
    line = ["configs/debug/stage1_gan.yaml", "--train.channels_last", "true", "--data.workers", 0]
    assert cli("train", *line, "--save-dir", tmp_path / "whole", "--project", "p", "--run-name", "r") == 0
    whole = only(tmp_path / "whole" / "p")
    half = whole / "checkpoints" / "step_00000015"
    more = ["--save-dir", tmp_path / "half", "--project", "p", "--run-name", "r", "--resume-ckpt", half]
    assert cli("train", *line, *more) == 0
    assert_same(tensors(whole, 20), tensors(only(tmp_path / "half" / "p"), 20))


def test_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, cli, capfd) -> None:
    line = command("configs/debug/stage2.yaml", tmp_path / "cut")
    assert cli(*line) == 0
    run = only(tmp_path / "cut" / "p")
    (run / "FINISHED").unlink()
    file = run / "checkpoints" / "step_00000020" / "model" / "stage2.safetensors"
    before = tensors(run, 20)
    data = bytearray(file.read_bytes())
    data[-50:] = bytes(50)
    file.write_bytes(data)
    assert cli(*line) == 0
    said = capfd.readouterr().err
    assert "stage2.safetensors: expected sha256" in said
    assert "from step_00000015" in said
    assert_same(tensors(run, 20), before)
    verify(run / "checkpoints" / "step_00000020")


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    for step in (5, 6, 10):
        save(tmp_path / "checkpoints" / f"step_{step:08d}", {"model/a": {"x": torch.zeros(2)}}, {})
    folders = [tmp_path / "checkpoints" / f"step_{step:08d}" for step in (5, 6, 10)]
    prune(tmp_path, lambda found, good: outdated(found, good, folders[1].name, 1, ()))
    assert [folder.exists() for folder in folders] == [False, True, True]


def test_nothing_left_to_do_is_said(tmp_path: Path, cli, capfd) -> None:
    line = command("configs/debug/stage1.yaml", tmp_path, "--train.steps", 2)
    assert cli(*line) == 0
    assert cli(*line, "--run-name", "other", "--resume-ckpt", only(tmp_path / "p")) == 2
    assert "expected train.steps to be more" in capfd.readouterr().err
    assert len(list((tmp_path / "p").iterdir())) == 1


def test_other_data_is_another_run(tmp_path: Path, cli) -> None:
    from tests.test_bad_input import folder_config, write_photos

    for name, count in (("a", 16), ("b", 24)):
        write_photos(tmp_path / name, count)
        config = folder_config(tmp_path, tmp_path / name)
        line = ["train", "configs/debug/stage1.yaml", config, "--save-dir", tmp_path / "s", "--project", "p"]
        assert cli(*line, "--run-name", "r", "--train.steps", 2) == 0
        time.sleep(1.1)
    assert len(list((tmp_path / "s" / "p").iterdir())) == 2


def test_resume_ckpt_starts_a_new_run_from_the_full_state(tmp_path: Path, cli, caplog) -> None:
    config = "configs/debug/stage1_gan.yaml"
    assert cli(*command(config, tmp_path / "whole")) == 0
    whole = only(tmp_path / "whole" / "p")
    half = whole / "checkpoints" / "step_00000015"
    line = command(
        config, tmp_path / "half", "--resume-ckpt", half, "--logging.progress", "false", "--ema.warmup", "true"
    )
    assert cli(*line) == 0
    resumed = only(tmp_path / "half" / "p")
    assert_same(tensors(whole, 20), tensors(resumed, 20))
    assert [row["step"] for row in rows(resumed)] == [16, 17, 18, 19, 20]


def test_changed_keys_are_listed(tmp_path: Path, cli, capfd) -> None:
    config = "configs/debug/stage1.yaml"
    assert cli(*command(config, tmp_path, "--train.steps", 10)) == 0
    run = only(tmp_path / "p")
    time.sleep(1.1)
    assert cli(*command(config, tmp_path, "--train.steps", 12, "--resume-ckpt", run)) == 0
    assert "changed: train.steps: 10 -> 12" in capfd.readouterr().err


def test_second_run_in_the_same_folder_is_refused(tmp_path: Path, cli, capfd) -> None:
    line = command("configs/debug/stage2.yaml", tmp_path, "--observers", SLOW)
    process = start(*line)
    run = wait_for_step(tmp_path, 2)
    assert cli(*line) == 2
    assert "another run is training in this folder" in capfd.readouterr().err
    process.kill()
    process.wait()
    assert cli(*line) == 0, "the lock goes with the process that held it"
    assert len(rows(run)) == 20


def test_half_written_checkpoint_is_not_used(tmp_path: Path, cli) -> None:
    config = "configs/debug/stage2.yaml"
    assert cli(*command(config, tmp_path / "whole")) == 0
    process = start(*command(config, tmp_path / "cut", "--observers", SLOW))
    run = wait_for_step(tmp_path / "cut", 12)
    process.kill()
    process.wait()
    newest = sorted((run / "checkpoints").iterdir())[-1]
    (newest / "COMPLETE").unlink()
    assert cli(*command(config, tmp_path / "cut", "--observers", SLOW)) == 0
    assert_same(tensors(only(tmp_path / "whole" / "p"), 20), tensors(run, 20))


def test_noise_per_rank_resumes_exactly_too(tmp_path: Path, cli) -> None:
    found = {}
    for noise in ("per_rank", "per_sample"):
        line = ["train", "configs/debug/stage2.yaml", "--project", "p", "--run-name", "r", "--train.noise", noise]
        assert cli(*line, "--save-dir", tmp_path / noise) == 0
        whole = only(tmp_path / noise / "p")
        half = whole / "checkpoints" / "step_00000015"
        assert cli(*line, "--save-dir", tmp_path / f"{noise} half", "--resume-ckpt", half) == 0
        found[noise] = tensors(whole, 20)
        assert_same(found[noise], tensors(only(tmp_path / f"{noise} half" / "p"), 20))
    key = next(k for k in found["per_rank"] if k.startswith("model/stage2"))
    assert not found["per_rank"][key].equal(found["per_sample"][key])
