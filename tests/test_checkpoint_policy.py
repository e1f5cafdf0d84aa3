"""Which checkpoints stay, how they are written beside training, what a small disk does, and the lock without locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rqvae.callbacks.interfaces import Observer
from rqvae.errors import BadInput, RunFailed
from rqvae.trainers import checkpoint, run_folder
from rqvae.trainers.heartbeat import Heartbeat
from rqvae.trainers.run_folder import RunLock
from rqvae.trainers.settings import BestSettings
from rqvae.trainers.writing import BackgroundWriter, host_copy
from tests.conftest import assert_same, finish, only, rows, start, tensors, without_times
from tests.test_resume import wait_for_step


class SlowDisk(Observer):
    """Every file of a checkpoint takes a while, as on a slow disk; from file `fails` on the disk is full."""

    def __init__(self, seconds: float, fails: int = 10**9, step_seconds: float = 0.0) -> None:
        self.seconds, self.fails, self.step_seconds, self.files = seconds, fails, step_seconds, 0

    def on_fit_start(self, run: Any) -> None:
        self.undo = checkpoint.write_tensors

        def slow(tensors: Any, file: Path) -> None:
            time.sleep(self.seconds)
            self.files += 1
            if self.files >= self.fails:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.undo(tensors, file)

        checkpoint.write_tensors = slow  # type: ignore[assignment]

    def after_step(self, run: Any, losses: Any) -> None:
        time.sleep(self.step_seconds)

    def on_fit_end(self, run: Any) -> None:
        checkpoint.write_tensors = self.undo


class Scripted(Observer):
    """A score that is known beforehand, at even steps."""

    scores = {2: 1.0, 4: 5.0, 6: 3.0, 8: float("nan"), 10: 6.0, 12: 2.0}

    def after_step(self, run: Any, losses: Any) -> None:
        if run.clock.step in self.scores:
            run.log_scalars({"val/scripted": self.scores[run.clock.step]})


def observers(*found: tuple[type[Observer], dict[str, Any]]) -> list[str]:
    parts = [{"class_path": f"{__name__}.{kind.__name__}", "init_args": arguments} for kind, arguments in found]
    return ["--observers", json.dumps(parts)]


def line(save_dir: Path, *more: object, config: str = "stage2") -> list[object]:
    words = ["train", f"configs/debug/{config}.yaml", "--save-dir", save_dir, "--project", "p", "--run-name", "r"]
    return [*words, "--pictures.every", "null", "--online_eval.every", "null", *more]


def kept(run: Path) -> list[int]:
    return [int(p.name.removeprefix("step_")) for p in checkpoint.in_run(run)]


ASYNC = ["--checkpoint.asynchronous", "true"]


# ---- best


def test_best_stays_beside_the_newest(tmp_path: Path, cli) -> None:
    best = ["--checkpoint.best.metric", "val/scripted", "--checkpoint.keep_last", 1, "--checkpoint.every", 100]
    for mode, expected in (("max", [10, 20]), ("min", [2, 20])):
        more = [*observers((Scripted, {})), *best, "--checkpoint.best.mode", mode]
        assert cli(*line(tmp_path / mode, *more)) == 0
        run = only(tmp_path / mode / "p")
        assert kept(run) == expected
        found = checkpoint.read_meta(run / "checkpoints" / "step_00000020")["best"]
        assert found == {"metric": "val/scripted", "value": Scripted.scores[expected[0]], "step": expected[0]}


@pytest.mark.parametrize("how", [[], ASYNC])
def test_best_survives_a_resume(how: list[str], tmp_path: Path, cli) -> None:
    """Killed after the best score: no later one takes its place, and what stays is that of an undisturbed run."""
    best = ["--checkpoint.best.metric", "val/scripted", "--checkpoint.best.mode", "min"]
    more = [*best, "--checkpoint.keep_last", 1, "--checkpoint.every", 100, *how]
    slow = observers((Scripted, {}), (SlowDisk, {"seconds": 0.0, "step_seconds": 0.2}))
    assert cli(*line(tmp_path / "whole", *more, *observers((Scripted, {})))) == 0
    process = start(*line(tmp_path / "cut", *more, *slow))
    run = wait_for_step(tmp_path / "cut", 7)
    process.kill()
    process.wait()
    assert kept(run) == [2]
    assert cli(*line(tmp_path / "cut", *more, *slow)) == 0
    whole = only(tmp_path / "whole" / "p")
    assert kept(run) == kept(whole) == [2, 20]
    for step in (2, 20):
        assert_same(tensors(run, step), tensors(whole, step))


def test_best_of_a_real_score(tmp_path: Path, cli) -> None:
    more = ["--online_eval.every", 4, "--checkpoint.best.metric", "val/psnr", "--checkpoint.keep_last", 1]
    assert cli(*line(tmp_path, *more, config="stage1")) == 0
    run = only(tmp_path / "p")
    scores = {r["step"]: r["val/psnr"] for r in rows(run) if "val/psnr" in r}
    assert len(scores) == 5
    assert kept(run) == sorted({max(scores, key=lambda step: scores[step]), 20})


@pytest.mark.parametrize(
    ("metric", "more", "words"),
    [
        ("val/pnsr", [], "expected a score of online_eval (val/psnr, val/ssim) or a name of train/, got val/pnsr"),
        ("val/psnr", ["--online_eval.every", "null"], "(it is off)"),
        ("val/psnr", ["--do-online-eval", "False"], "(it is off)"),
        ("train/loss_tota", [], "train/loss_latent, train/loss_recon, train/loss_total, train/lr"),
    ],
)
def test_unknown_metric_is_refused(metric: str, more: list[str], words: str, tmp_path: Path, cli, capfd) -> None:
    rest = ["--online_eval.every", 10, "--checkpoint.best.metric", metric, *more]
    assert cli(*line(tmp_path, *rest, config="stage1")) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert "checkpoint.best.metric: expected" in said
    assert words in said
    assert said.endswith(f"got {metric}")


def test_better() -> None:
    assert BestSettings("m").better(1.0, None)
    assert BestSettings("m").better(2.0, 1.0)
    assert not BestSettings("m").better(1.0, 1.0)
    assert BestSettings("m", "min").better(0.5, 1.0)
    assert not BestSettings("m").better(float("nan"), None)


# ---- asynchronous


def test_asynchronous_run_equals_a_synchronous_one(tmp_path: Path, cli) -> None:
    """Files are written while the next steps change the weights; they hold those of their own step."""
    slow = observers((SlowDisk, {"seconds": 0.05}))
    for name, more in (("plain", []), ("async", [*ASYNC, *slow])):
        assert cli(*line(tmp_path / name, "--checkpoint.keep_last", 4, *more, config="stage1_gan")) == 0
    a, b = (only(tmp_path / name / "p") for name in ("plain", "async"))
    assert kept(a) == kept(b) == [5, 10, 15, 20]
    for step in kept(a):
        assert_same(tensors(a, step), tensors(b, step))
    speeds = ("_per_s", "mfu")
    same = [[{k: v for k, v in r.items() if not any(s in k for s in speeds)} for r in without_times(x)] for x in (a, b)]
    assert same[0] == same[1]


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path, cli) -> None:
    slow = observers((SlowDisk, {"seconds": 0.15}))
    spans = {}
    for name, more in (("plain", []), ("async", ASYNC)):
        assert cli(*line(tmp_path / name, "--checkpoint.every", 10, "--train.steps", 30, *more, *slow)) == 0
        moments = {r["step"]: r["time"] for r in rows(only(tmp_path / name / "p"))}
        spans[name] = moments[11] - moments[10]
    assert spans["plain"] > 0.7, "five files"
    assert spans["async"] < 0.5 * spans["plain"]


def test_failure_of_the_thread_ends_the_run_and_leaves_earlier_ones(tmp_path: Path, cli, capfd) -> None:
    """Of five files a checkpoint, the second checkpoint's third."""
    assert cli(*line(tmp_path, *ASYNC, *observers((SlowDisk, {"seconds": 0.0, "fails": 8})))) == 3
    said = capfd.readouterr().err.splitlines()[-1]
    assert "step_00000010: checkpoint not written: the disk is full; earlier checkpoints are untouched" in said
    run = only(tmp_path / "p")
    assert kept(run) == [5]
    assert threading.active_count() == 1 or not [t for t in threading.enumerate() if t.name == "checkpoint"]
    assert cli(*line(tmp_path, *ASYNC, *observers((SlowDisk, {"seconds": 0.0, "fails": 8})))) == 3, (
        "goes on from step 5"
    )


def test_failure_of_the_last_checkpoint_is_raised_too(tmp_path: Path, cli, capfd) -> None:
    more = [*ASYNC, *observers((SlowDisk, {"seconds": 0.0, "fails": 1})), "--checkpoint.every", 100]
    assert cli(*line(tmp_path, *more)) == 3
    assert "step_00000020: checkpoint not written" in capfd.readouterr().err
    assert not (only(tmp_path / "p") / "FINISHED").exists()


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_signal_waits_for_the_thread(world: int, tmp_path: Path, cli) -> None:
    slow = observers((SlowDisk, {"seconds": 0.2, "step_seconds": 0.15}))
    rest = [*ASYNC, *slow, "--checkpoint.every", 1000, "--train.stop_check_seconds", 0.2, "--world-size", world]
    process = start(*line(tmp_path, *rest))
    run = wait_for_step(tmp_path, 3)
    os.kill(process.pid, signal.SIGTERM)
    code, errors = finish(process, 40)
    assert code == 143, errors
    assert kept(run) == [len(rows(run))]
    checkpoint.verify(checkpoint.in_run(run)[0])


@pytest.mark.slow
def test_killed_while_the_thread_writes(tmp_path: Path, cli) -> None:
    slow = observers((SlowDisk, {"seconds": 0.4, "step_seconds": 0.1}))
    process = start(*line(tmp_path / "cut", *ASYNC, *slow))
    run = wait_for_step(tmp_path / "cut", 11)
    time.sleep(0.3)
    process.kill()
    process.wait()
    half = run / "checkpoints" / "step_00000010"
    assert half.exists()
    assert not (half / "COMPLETE").exists()
    assert kept(run) == [5]
    assert cli(*line(tmp_path / "cut", *ASYNC, *slow)) == 0
    assert cli(*line(tmp_path / "whole")) == 0
    assert_same(tensors(run, 20), tensors(only(tmp_path / "whole" / "p"), 20))


def test_host_copy_shares_nothing() -> None:
    tied = torch.ones(4)
    copies = host_copy({"a": {"x": tied, "y": tied, "z": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)}})
    tied.zero_()
    assert torch.equal(copies["a"]["x"], torch.ones(4))
    assert copies["a"]["x"].data_ptr() != copies["a"]["y"].data_ptr()
    assert copies["a"]["z"].is_contiguous()


def test_writer_raises_once_and_goes_on() -> None:
    writer, done = BackgroundWriter(), []

    def fail() -> None:
        raise RunFailed("full")

    writer.submit(fail)
    with pytest.raises(RunFailed, match="full"):
        writer.submit(lambda: done.append(1))
    writer.submit(lambda: done.append(2))
    writer.wait()
    writer.wait()
    assert done == [2]


# ---- the disk


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def has(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free))

    return has


@pytest.mark.parametrize("how", [[], ASYNC])
def test_too_small_a_disk_is_said_before_a_byte_is_written(how: list[str], tmp_path: Path, cli, capfd, disk) -> None:
    disk(100_000)
    assert cli(*line(tmp_path, *how)) == 3
    said = capfd.readouterr().err
    assert "2 checkpoints" not in said
    assert "3 checkpoints of" in said, "the warning at the start"
    assert "the disk has 0.10 MiB free" in said
    last = said.splitlines()[-1]
    assert "step_00000005: checkpoint not written: the disk is full (expected" in last
    assert "got 0.10 MiB); earlier checkpoints are untouched" in last
    assert not list((only(tmp_path / "p")).glob("checkpoints/*"))


def test_expected_size_is_what_is_written(tmp_path: Path, cli, capfd, disk) -> None:
    """The start's estimate, in which the moments are not there yet, against the files of the first checkpoint."""
    disk(10**6)
    cli(*line(tmp_path / "small", config="stage1_gan"))
    words = next(x for x in capfd.readouterr().err.splitlines() if "checkpoints of" in x)
    expected = float(words.partition("checkpoints of ")[2].partition(" MiB")[0]) * 2**20
    disk(10**11)
    assert cli(*line(tmp_path / "large", "--train.steps", 1, "--gan.disc_start", 0, config="stage1_gan")) == 0
    assert "checkpoints of" not in capfd.readouterr().err
    folder = only(only(tmp_path / "large" / "p") / "checkpoints")
    written = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    assert expected == pytest.approx(written, rel=0.05)


def test_file_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    checkpoint.save(tmp_path / "a" / "b", {"m": {"x": torch.ones(3)}}, {})
    checkpoint.verify(tmp_path / "a" / "b")


# ---- the lock


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    quick = {"beat": 0.05, "stale": 60.0, "settle": 0.1}
    monkeypatch.setattr(run_folder, "Heartbeat", lambda folder: Heartbeat(folder, **quick))


@pytest.mark.usefixtures("no_locks")
def test_heartbeat_where_the_file_system_has_no_locks(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.acquire()
    before = (tmp_path / ".heartbeat").stat().st_mtime_ns
    time.sleep(0.3)
    assert (tmp_path / ".heartbeat").stat().st_mtime_ns > before
    with pytest.raises(BadInput, match="another run is training in this folder .* after 60 s it counts as dead"):
        RunLock(tmp_path).acquire()
    first.release()
    assert not list(tmp_path.glob(".heartbeat*"))
    second = RunLock(tmp_path)
    second.acquire()
    assert not second.lost
    second.release()


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(("age", "free"), [(55, False), (65, True)])
def test_dead_after_a_minute(age: float, free: bool, tmp_path: Path) -> None:
    file = tmp_path / ".heartbeat"
    file.write_text("a host that was switched off")
    os.utime(file, (time.time() - age, time.time() - age))
    lock = RunLock(tmp_path)
    if free:
        lock.acquire()
        lock.release()
    else:
        with pytest.raises(BadInput, match="counts as dead"):
            lock.acquire()


def test_of_two_that_find_it_dead_one_gets_it(tmp_path: Path) -> None:
    file = tmp_path / ".heartbeat"
    file.write_text("dead")
    os.utime(file, (1, 1))
    beats = [Heartbeat(tmp_path, 0.05, 60.0, 0.3) for _ in range(4)]
    ready, got = threading.Barrier(4), []

    def contend(beat: Heartbeat) -> None:
        ready.wait()
        try:
            beat.acquire()
            got.append(beat)
        except BadInput:
            pass

    threads = [threading.Thread(target=contend, args=(beat,)) for beat in beats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].release()


@pytest.mark.usefixtures("no_locks")
def test_run_that_lost_its_place_stops(tmp_path: Path, cli, capfd) -> None:
    """As after the machine slept: another one has written its name."""

    class Usurper(threading.Thread):
        def run(self) -> None:
            run = wait_for_step(tmp_path, 3)
            (run / ".heartbeat").write_text("another host")

    thread = Usurper()
    thread.start()
    slow = observers((SlowDisk, {"seconds": 0.0, "step_seconds": 0.1}))
    assert cli(*line(tmp_path, *slow)) == 3
    thread.join()
    assert "another process trains in this folder" in capfd.readouterr().err
    assert (only(tmp_path / "p") / ".heartbeat").read_text() == "another host", "it is not ours to remove"
