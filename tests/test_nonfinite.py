"""Updates whose gradients are not finite: left out on the device and counted; too many of them end the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rqvae import backends
from rqvae.backends.guarded import step_if_at_most
from rqvae.callbacks.interfaces import Intervention, Observer
from rqvae.errors import BadInput
from rqvae.trainers.finite import first_not_finite
from rqvae.trainers.meter import Meter
from rqvae.trainers.nonfinite import Skips
from rqvae.trainers.trainer import Trainer
from tests.conftest import assert_same, finish, means_of, only, rows, start, tensors, without_times
from tests.test_loop import NoReads, assembled


class PoisonGradients(Intervention):
    """Gradients of an update become NaN at some steps (counted from 1)."""

    def __init__(self, steps: list[int], update: str = "generator", to: float = float("nan")) -> None:
        self.steps, self.update, self.to = steps, update, to

    def before_update(self, run: Any, update: Any) -> None:
        if run.clock.step + 1 in self.steps and update.name == self.update:
            for p in update.params:
                p.grad.view(-1)[:1].fill_(self.to)


class PoisonImages(Observer):
    """The images of one rank become NaN at some steps, as from a broken decoder."""

    def __init__(self, steps: list[int], rank: int) -> None:
        self.steps, self.rank = steps, rank

    def before_step(self, run: Any, micros: Any) -> None:
        if run.clock.step + 1 in self.steps and run.backend.rank == self.rank:
            for micro in micros:
                micro.require_img().fill_(float("nan"))


def poison(steps: list[int], update: str = "generator") -> list[str]:
    path = f"{__name__}.PoisonGradients"
    return ["--interventions", json.dumps([{"class_path": path, "init_args": {"steps": steps, "update": update}}])]


def line(config: str, save_dir: Path, *more: object) -> list[object]:
    quiet = ["--pictures.every", "null", "--online_eval.every", "null"]
    words = ["train", f"configs/debug/{config}.yaml", "--save-dir", save_dir, "--project", "p", "--run-name", "r"]
    return [*words, *quiet, *more]


def turn(trainer: Trainer, micros: Any) -> None:
    """One optimizer step without a folder."""
    trainer.optimise(micros)
    for ema in trainer.ema:
        ema.update(trainer.clock.step, trainer._applied)
    trainer.clock.tick()


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that a checkpoint would hold."""
    return {f"{name}:{k}": v for name, group in trainer.state.tensors().items() for k, v in group.items()}


@pytest.mark.parametrize(("config", "update"), [("stage2", "generator"), ("stage1_gan", "discriminator")])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_left_out_update_equals_a_loop_that_never_made_it(config: str, update: str, precision: str, bad: float) -> None:
    """Weights, averages and moments, bit for bit; the other update of a GAN is made as ever."""
    config = f"configs/debug/{config}.yaml"
    more = ["--train.precision", precision, "--ema.power", "[0.1]"]
    _, parts, guarded, steps = assembled(config, *more, "--train.skip_nonfinite", "1")
    guarded.interventions = [PoisonGradients([2], update, bad)]
    for micros in (*steps, steps[0]):
        turn(guarded, micros)
    found = everything(guarded)
    assert guarded.state.skips.in_use

    _, _, plain, steps = assembled(config, *more)
    turn(plain, steps[0])
    skipped = next(u for u in plain.updates if u.name == update)
    if len(plain.updates) == 1:
        plain.clock.tick()
    else:
        starts, skipped.starts = skipped.starts, 10**9
        turn(plain, steps[1])
        skipped.starts = starts
    turn(plain, steps[0])
    expected = everything(plain)
    assert_same({k: found[k] for k in expected}, expected)


@pytest.mark.parametrize("name", ["stage1", "stage1_gan", "stage2"])
def test_decision_is_taken_on_the_device(name: str) -> None:
    _, _, trainer, steps = assembled(
        f"configs/debug/{name}.yaml", "--train.skip_nonfinite", "1", "--ema.power", "[0.1]"
    )
    with NoReads():
        for micros in steps:
            turn(trainer, micros)


@pytest.mark.slow
def test_without_faults_the_policy_changes_nothing(tmp_path: Path, cli) -> None:
    for k in (0, 3):
        assert cli(*line("stage1_gan", tmp_path / str(k), "--train.skip_nonfinite", k)) == 0
    a, b = (only(tmp_path / str(k) / "p") for k in (0, 3))
    plain = tensors(a, 20)
    assert_same({k: tensors(b, 20)[k] for k in plain}, plain)
    more = {"train/skipped_steps", "train/skipped_steps_discriminator"}
    for x, y in zip(without_times(a), without_times(b), strict=True):
        assert {k: y[k] for k in x if "_per_s" not in k} == {k: v for k, v in x.items() if "_per_s" not in k}
        assert {y[k] for k in more} == {0.0}


def test_counted_in_the_rows_which_leave_their_values_out(tmp_path: Path, cli) -> None:
    """Rows of 5 steps: a mean over the 4 that were made; the run of single steps says what they are."""
    steps = poison([3, 4, 9])
    assert cli(*line("stage2", tmp_path / "single", *steps, "--train.skip_nonfinite", 2)) == 0
    assert cli(*line("stage2", tmp_path / "five", *steps, "--train.skip_nonfinite", 2, "--train.log_every", 5)) == 0
    single, five = rows(only(tmp_path / "single" / "p")), rows(only(tmp_path / "five" / "p"))
    assert [r["step"] for r in single if r["train/skipped_steps"]] == [3, 4, 9]
    assert [r["step"] for r in single if r["train/loss_total"] is None] == [3, 4, 9], "nothing was observed"
    assert [r["train/skipped_steps"] for r in five] == [2, 1, 0, 0]
    made = [r["train/loss_total"] for r in single[:5] if r["train/loss_total"] is not None]
    assert len(made) == 3
    assert five[0]["train/loss_total"] == pytest.approx(sum(made) / 3, rel=1e-6)
    assert_same(tensors(only(tmp_path / "single" / "p"), 20), tensors(only(tmp_path / "five" / "p"), 20))


@pytest.mark.parametrize("log_every", [1, 5])
def test_once_more_than_allowed_stops_the_run(log_every: int, tmp_path: Path, cli, capfd) -> None:
    more = ["--train.skip_nonfinite", 2, "--train.log_every", log_every, "--checkpoint.every", 5]
    assert cli(*line("stage2", tmp_path, *poison([3, 7, 8, 9]), *more)) == 3
    said = capfd.readouterr().err.splitlines()[-1]
    assert "step 9: update generator: the gradients were not finite in 3 steps in a row, from step 7 on" in said
    assert "(samples 48 to 71 of the stream)" in said, "three steps of 8"
    assert "expected at most train.skip_nonfinite = 2" in said
    assert "step_00000005" in said
    assert [p.name for p in (only(tmp_path / "p") / "checkpoints").iterdir()] == ["step_00000005"]


def test_a_checkpoint_before_the_next_row_stops_it_too(tmp_path: Path, cli, capfd) -> None:
    more = ["--train.skip_nonfinite", 1, "--train.log_every", 20, "--checkpoint.every", 5]
    assert cli(*line("stage2", tmp_path, *poison([7, 8]), *more)) == 3
    assert "step 8: update generator" in capfd.readouterr().err
    assert [p.name for p in (only(tmp_path / "p") / "checkpoints").iterdir()] == ["step_00000005"]


def test_streak_and_row_survive_a_resume(tmp_path: Path, cli, capfd) -> None:
    """Steps 14 to 16: two before the checkpoint of step 15, one after it."""
    more = ["--train.skip_nonfinite", 2, "--train.log_every", 6]
    assert cli(*line("stage2", tmp_path / "whole", *poison([14, 15]), *more)) == 0
    whole = only(tmp_path / "whole" / "p")
    half = ["--resume-ckpt", whole / "checkpoints" / "step_00000015"]
    assert cli(*line("stage2", tmp_path / "half", *poison([14, 15]), *more, *half)) == 0
    resumed = only(tmp_path / "half" / "p")
    assert_same(tensors(whole, 20), tensors(resumed, 20))
    speeds = ("_per_s", "tflops", "mfu")
    kept = [{k: v for k, v in row.items() if not any(s in k for s in speeds)} for row in without_times(whole)[-2:]]
    assert kept == [{k: v for k, v in r.items() if not any(s in k for s in speeds)} for r in without_times(resumed)]
    assert kept[0]["train/skipped_steps"] == 2
    capfd.readouterr()
    assert cli(*line("stage2", tmp_path / "more", *poison([14, 15, 16]), *more, *half)) == 3
    assert "step 16: update generator: the gradients were not finite in 3 steps in a row" in capfd.readouterr().err


def test_a_fault_of_one_rank_is_left_out_on_all(tmp_path: Path) -> None:
    dump = tmp_path / "hashes"
    dump.mkdir()
    watch = {"class_path": "tests.observers.RankWeights", "init_args": {"folder": str(dump)}}
    broken = {"class_path": f"{__name__}.PoisonImages", "init_args": {"steps": [3], "rank": 1}}
    more = ["--observers", json.dumps([watch, broken]), "--train.skip_nonfinite", 1, "--world-size", 2]
    code, errors = finish(start(*line("stage2", tmp_path, *more, "--train.steps", 6)))
    assert code == 0, errors
    ranks = [json.loads((dump / f"rank_{r}.json").read_text()) for r in (0, 1)]
    assert ranks[0] == ranks[1], "replicas differ"
    assert [r["train/skipped_steps"] for r in rows(only(tmp_path / "p"))] == [0, 0, 1, 0, 0, 0]
    assert all(v.isfinite().all() for v in tensors(only(tmp_path / "p"), 6).values())


class PoisonMoment(Observer):
    """The second moment of one weight becomes infinite, which no loss shows for a while."""

    def after_step(self, run: Any, losses: Any) -> None:
        state = run.updates[0].optimizer.state[run.updates[0].params[0]]
        state["exp_avg_sq"].view(-1)[0] = float("inf")


def test_state_that_is_not_finite_is_not_published(tmp_path: Path, cli, capfd) -> None:
    more = ["--observers", json.dumps([{"class_path": f"{__name__}.PoisonMoment"}]), "--train.steps", 5]
    assert cli(*line("stage2", tmp_path, *more)) == 3
    said = capfd.readouterr().err.splitlines()[-1]
    assert "step 5: optimizer/generator:" in said
    assert "exp_avg_sq is not finite" in said
    assert not list(tmp_path.rglob("COMPLETE"))


def test_first_not_finite_names_the_tensor() -> None:
    backend = backends.create("cpu")
    good = {"a": torch.ones(3), "n": torch.ones(2, dtype=torch.int64), "none": torch.empty(0)}
    assert first_not_finite(backend, {"m": good}) is None
    assert first_not_finite(backend, {"m": {"n": good["n"]}}) is None
    assert first_not_finite(backend, {"m": good, "o": {"x": good["a"], "y": good["a"] / 0}}) == "o:y"


def test_optimizer_that_cannot_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(BadInput, match="expected an optimizer that takes found_inf"):
        step_if_at_most(torch.optim.SGD([p], 0.1, foreach=True), torch.ones(()), torch.tensor(torch.inf))


def test_an_unusually_large_norm_is_left_out_once_it_is_known_what_is_usual() -> None:
    """The mean over applied updates: a plain one over the first 100, exponential with weight 1/100 from there on."""
    skips = Skips(["generator"], torch.device("cpu"))
    norms = [1.0 + 0.001 * i for i in range(100)]
    for step, norm in enumerate([50.0, *norms[1:]]):
        ceiling = skips.ceiling("generator", 4.0)
        assert ceiling.isinf().all(), "too early to say"
        assert skips.judge("generator", torch.tensor(norm), step, 2, ceiling)
    usual = (50.0 + sum(norms[1:])) / 100
    resumed = Skips(["generator"], torch.device("cpu"))
    resumed.load_state_dict(skips.state_dict())
    for norm, kept in ((4.1 * usual, False), (3.9 * usual, True), (float("nan"), False), (1.0, True)):
        ceiling = resumed.ceiling("generator", 4.0)
        assert float(ceiling) == pytest.approx(4.0 * usual, rel=1e-5)
        assert bool(resumed.judge("generator", torch.tensor(norm), 0, 2, ceiling)) == kept
        usual += (norm - usual) / 100 if kept else 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_spike_changes_no_weight(precision: str) -> None:
    overrides = ["--train.skip_nonfinite", "1", "--train.skip_spikes", "3", "--train.precision", precision]
    _, _, trainer, steps = assembled("configs/debug/stage2.yaml", *overrides)
    skips = trainer.state.skips
    turn(trainer, steps[0])
    skips._applied["generator"] += 1000
    skips._usual["generator"] *= 0.1

    def trained() -> dict[str, torch.Tensor]:
        return {name: x.clone() for name, x in everything(trainer).items() if not name.startswith("log/")}

    before = trained()
    turn(trainer, steps[1])
    assert_same(trained(), before)
    skips._usual["generator"] *= 100
    turn(trainer, steps[1])
    with pytest.raises(AssertionError):
        assert_same(trained(), before)


def test_meter_leaves_out_what_was_not_applied() -> None:
    meter = Meter(backends.create("cpu"))
    for value, applied in ((1.0, True), (float("nan"), False), (5.0, True)):
        meter.add({"x": torch.tensor(value)}, applied=torch.tensor(applied))
    assert means_of(meter) == {"train/x": 3.0}
    assert means_of(meter) == {}


def test_bad_setting(tmp_path: Path, cli, capfd) -> None:
    assert cli(*line("stage2", tmp_path, "--train.skip_nonfinite", -1)) == 2
    assert "train.skip_nonfinite: expected at least 0, got -1" in capfd.readouterr().err
    assert cli(*line("stage2", tmp_path, "--train.skip_spikes", 3)) == 2
    assert "train.skip_spikes: expected train.skip_nonfinite of at least 1" in capfd.readouterr().err
