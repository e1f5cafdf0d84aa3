"""The analyser beside a run: what it adds to the log, what it finds, and what its guard does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rqvae import backends
from rqvae.callbacks.health import Health, HealthGuard
from rqvae.callbacks.strata import LossStrata
from rqvae.health.live import look, read_looks
from rqvae.img_datasets.interfaces import MaskCondition
from rqvae.trainers.meter import Meter
from tests.conftest import assert_same, finish, means_of, only, rows, start, tensors
from tests.test_loop import NoReads, assembled

HEALTH = "rqvae.callbacks.health.Health"


def line(save_dir: Path, config: str = "stage2", *more: object) -> list[object]:
    short = ["--pictures.every", "null", "--data.workers", 0, "--train.log_every", 1, "--checkpoint.every", 1000]
    name = ["--save-dir", save_dir, "--project", "p", "--run-name", "r"]
    return ["train", f"configs/debug/{config}.yaml", *name, *short, *more]


def part(kind: str, class_path: str, **init_args: object) -> list[object]:
    return [f"--{kind}", json.dumps([{"class_path": class_path, "init_args": init_args}])]


def test_means_of_groups_are_those_of_numpy() -> None:
    rng, meter = np.random.default_rng(0), Meter(backends.create("cpu"))
    values, group = rng.normal(1e3, 1, 300), rng.integers(0, 3, 300)  # the last of 4 groups stays empty
    for some in np.split(np.arange(300), [10, 150]):
        meter.add_groups("loss", torch.tensor(values[some]), torch.tensor(group[some]), 4)
    half, counts = meter.state()
    meter = Meter(backends.create("cpu"))
    meter.load_state(half, counts)
    meter.add_groups("loss", torch.tensor([float("nan")]), torch.tensor([2]), 4)
    means = means_of(meter)
    assert np.isnan(means.pop("train/loss_2"))
    assert means == pytest.approx({f"train/loss_{g}": values[group == g].mean() for g in (0, 1)}, rel=1e-12)


def test_rows_have_the_loss_by_time_and_class() -> None:
    """Against the losses of the samples themselves."""
    _, _, trainer, steps = assembled("configs/debug/stage2.yaml")
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    class Note(LossStrata):
        def after_loss(self, run: Any, update: Any, micro: Any, losses: Any) -> None:
            super().after_loss(run, update, micro, losses)
            seen.append((losses.per_sample, losses.t, micro.condition.label))

    trainer.observers = [Note()]
    for micros in steps:
        trainer.optimise(micros)
    loss, t, label = (torch.cat(x).numpy() for x in zip(*seen, strict=True))
    means = means_of(trainer.meter)
    part_of = np.minimum((t * 4).astype(int), 3)
    for g in np.unique(part_of):
        assert means.pop(f"train/loss_t_bin_{g}") == pytest.approx(loss[part_of == g].mean(), rel=1e-6)
    for k in np.unique(label):
        assert means.pop(f"train/loss_class_{k}") == pytest.approx(loss[label == k].mean(), rel=1e-6)
    assert not any("bin" in name or "class" in name for name in means), "groups without samples have no value"


def test_under_a_mask_a_sample_counts_by_its_share_of_a_class() -> None:
    """Against sums over pixels; a NaN is in the means of the classes that its mask has, and in no other."""
    rng, meter = np.random.default_rng(0), Meter(backends.create("cpu"))
    mask, loss = rng.integers(0, 3, (5, 4, 6)), rng.random(5)
    mask[0], mask[1, :2], mask[4] = 3, 3, 1  # class 3 of 3 is a pixel without a label
    view: Any = SimpleNamespace(log_groups=meter.add_groups)

    def watch(mask: np.ndarray, loss: np.ndarray) -> None:
        micro: Any = SimpleNamespace(condition=MaskCondition(torch.tensor(mask), 3))
        seen: Any = SimpleNamespace(per_sample=torch.tensor(loss), t=None)
        LossStrata().after_loss(view, view, micro, seen)

    watch(mask[:2], loss[:2])
    watch(mask[2:], loss[2:])
    by_pixel = np.broadcast_to(loss[:, None, None], mask.shape)
    expected = {f"train/loss_class_{k}": by_pixel[mask == k].mean() for k in range(3)}
    assert means_of(meter) == pytest.approx(expected, rel=1e-6)
    watch(mask, np.where(np.arange(5) == 0, np.nan, loss))
    assert means_of(meter) == pytest.approx(expected, rel=1e-6), "the first has no label at all"
    watch(mask, np.where(np.arange(5) == 4, np.nan, loss))
    assert [name for name, value in means_of(meter).items() if np.isnan(value)] == ["train/loss_class_1"]


@pytest.mark.parametrize("name", ["stage1_gan", "stage2"])
def test_nothing_is_read_in_a_step(name: str) -> None:
    _, _, trainer, steps = assembled(f"configs/debug/{name}.yaml")
    trainer.observers = [Health(every="1000 steps")]
    with NoReads():
        for micros in steps:
            trainer.optimise(micros)
            trainer.clock.tick()
        with pytest.raises(AssertionError):  # the watch itself works
            next(trainer.updates[0].module.parameters()).sum().item()
    assert trainer.clock.step == len(steps)


def test_a_run_that_is_watched_and_replayed(tmp_path: Path, cli, capfd) -> None:
    common = ["--train.steps", 30]
    assert cli(*line(tmp_path / "plain", "stage2", *common)) == 0
    assert cli(*line(tmp_path / "watched", "stage2", *common, *part("observers", HEALTH, every="10 steps"))) == 0
    run = only(tmp_path / "watched" / "p")
    assert_same(tensors(run, 30), tensors(only(tmp_path / "plain" / "p"), 30))
    looks = read_looks(run)
    assert looks[-1].step == 30
    assert looks[-1].rows == len(rows(run))
    assert {f["id"] for f in looks[-1].findings} == {f["id"] for f in look(run).findings}
    assert any("loss_t_bin" in key for key in rows(run)[-1])
    capfd.readouterr()
    assert cli("health", "replay", run) == 0
    told = capfd.readouterr().out.splitlines()
    assert len(told) == len(looks)
    assert all(words.endswith("(as then)") for words in told)
    content = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    changed = {**json.loads(content[4]), "train/loss_total": None}
    (run / "metrics.jsonl").write_text("".join([*content[:4], json.dumps(changed) + "\n", *content[5:]]))
    assert cli("health", "replay", run) == 1
    assert "NUM.NONFINITE" in capfd.readouterr().out


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_guard_stops_all_ranks(ranks: int, tmp_path: Path) -> None:
    guard = part("interventions", f"{HEALTH}Guard", every="20 steps", stop="info", warn="info")
    more = [*guard, "--train.steps", 100_000, "--checkpoint.every", 50, "--train.stop_check_seconds", 0.1]
    code, errors = finish(start(*line(tmp_path, "stage2", *more, "--world-size", ranks)))
    assert code == 3, errors
    told = [words for words in errors.splitlines() if words.startswith("error:")]
    assert len(told) == 1
    assert "stopped: health: " in told[0]
    run = only(tmp_path / "p")
    assert json.loads((run / "health.jsonl").read_text().splitlines()[0])["findings"]
    assert "checkpoint" in told[0].rpartition(";")[2], "it says where to go on"


def test_guard_asks_for_a_checkpoint(tmp_path: Path, cli) -> None:
    """In the step in which the finding is told, whatever the interval of checkpoints."""

    run = tmp_path / "p"
    guard = part("interventions", "tests.observers.GuardThatFinds", at=7)
    assert cli(*line(tmp_path, "stage2", *guard, "--train.steps", 12)) == 0
    steps = sorted(int(p.name.rpartition("_")[2]) for p in (only(run) / "checkpoints").iterdir())
    assert steps == [7, 12]


def test_trouble_of_the_analyser_is_not_the_runs(tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqvae.callbacks.health.LOOK", ["health", "look", "--no-such-option"])
    assert cli(*line(tmp_path, "stage2", "--train.steps", 4, *part("observers", HEALTH, every="2 steps"))) == 0
    assert "health: no look, exit code 2" in (only(tmp_path / "p") / "log.txt").read_text()


def test_bad_input(tmp_path: Path, cli, capfd) -> None:
    cases = [
        (line(tmp_path, "stage2", *part("observers", HEALTH, every="soon")), "Health.every: "),
        (line(tmp_path, "stage2", *part("observers", HEALTH, t_bins=-1)), "LossStrata: expected t_bins"),
        (line(tmp_path, "stage2", *part("observers", HEALTH, warn="loud")), "warn"),
        (["health", "look", tmp_path], "expected rows of a run of this package, found none"),
        (["health", "replay", tmp_path], "there is no such file"),
    ]
    for words, message in cases:
        assert cli(*words) == 2
        told = capfd.readouterr().err.strip().splitlines()
        assert message in told[-1]
    (tmp_path / "health.jsonl").write_text('{"step": 1}\n')
    assert cli("health", "replay", tmp_path) == 2
    assert "health.jsonl, line 1: expected a look as JSON" in capfd.readouterr().err


def test_guard_acts_by_severity() -> None:
    asked: list[tuple[str, str]] = []

    class Run:
        def ask(self, what: str, why: str) -> None:
            asked.append((what, why))

    guard = HealthGuard(checkpoint="major", stop="critical")
    for severity in ("info", "minor", "major", "critical"):
        guard.found(Run(), {"severity": severity, "id": "LOSS.DIVERGED", "message": "it rises"})  # type: ignore[arg-type]
    assert asked == [(what, "health: LOSS.DIVERGED: it rises") for what in ("checkpoint", "stop")]
