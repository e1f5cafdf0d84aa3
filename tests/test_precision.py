"""fp16 with a scaled loss, on the CPU too: overflows are skipped, several updates do not meet, a resume is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rqvae import backends
from rqvae.backends.scaling import LossScaler
from rqvae.callbacks.interfaces import Observer
from rqvae.models.losses.adaptive import last_layer_weight, reconstruction_weight
from rqvae.trainers.updates import Update, UpdateSettings
from tests.conftest import assert_same, only, rows, tensors, without_times
from tests.test_loop import NoReads, assembled

FP16 = ("--train.precision", "fp16")


def update_of(scaler: LossScaler | None, clip: float | None = 0.01) -> Update:
    torch.manual_seed(0)
    module = nn.Linear(6, 3)
    return Update("u", module, module, lambda *_: None, UpdateSettings(lr=0.1, clip=clip), scaler=scaler)  # type: ignore[arg-type, return-value]


def step(update: Update, factor: float = 1.0) -> Tensor:
    """One step on a fixed batch, as the trainer does it."""
    backend = backends.create("cpu")
    x = torch.linspace(-1, 1, 24).view(4, 6)
    backend.backward(factor * update.module(x).square().mean(), update.scaler)
    backend.reduce(update.params)
    update.unscale()
    return backend.step(update.optimizer, update.params, clip=update.settings.clip, scaler=update.scaler)


@pytest.mark.parametrize("clip", [0.01, None])
def test_a_scaled_step_is_the_unscaled_one(clip: float | None) -> None:
    """Bit for bit in fp32, as scales are powers of two: so clipping comes after unscaling."""
    plain, scaled = update_of(None, clip), update_of(LossScaler("cpu"), clip)
    for _ in range(4):
        assert torch.equal(step(plain), step(scaled))
    for a, b in zip(plain.params, scaled.params, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(plain.optimizer.state[a]["exp_avg"], scaled.optimizer.state[b]["exp_avg"])


def test_an_overflow_changes_nothing_but_the_scale() -> None:
    update = update_of(LossScaler("cpu", start=1024.0, growth_interval=2))
    step(update)
    before = {k: v.clone() for k, v in update.state_dict().items()}
    weights = [p.detach().clone() for p in update.params]
    assert float(step(update, float("inf"))) == 0.0, "a skipped step is no fault"
    assert all(torch.equal(p, w) for p, w in zip(update.params, weights, strict=True))
    after = update.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {
        "loss_scaler.scale",
        "loss_scaler.good_steps",
    }
    assert float(update.figures(torch.zeros(()))["loss_scale"]) == 512.0
    for _ in range(2):
        assert float(step(update)) > 0
    assert float(update.scaler.value) == 1024.0  # type: ignore[union-attr]


def test_gradients_that_are_never_finite_are_a_fault() -> None:
    update = update_of(LossScaler("cpu", start=4.0))
    norms = [float(step(update, float("inf"))) for _ in range(4)]
    assert norms[:3] == [0.0, 0.0, 0.0]
    assert not torch.tensor(norms[3]).isfinite()


def test_one_overflow_does_not_touch_the_other_update() -> None:
    one, two = update_of(LossScaler("cpu")), update_of(LossScaler("cpu"))
    step(one, float("inf"))
    step(two)
    assert float(one.scaler.value) == 2.0**15  # type: ignore[union-attr]
    assert float(two.scaler.value) == 2.0**16  # type: ignore[union-attr]


def test_scale_survives_a_checkpoint() -> None:
    one, two = update_of(LossScaler("cpu")), update_of(LossScaler("cpu"))
    for factor in (1.0, float("inf"), 1.0, 1.0):
        step(one, factor)
    two.load_state_dict(one.state_dict())
    assert one.scaler.state_dict() == two.scaler.state_dict() != LossScaler("cpu").state_dict()  # type: ignore[union-attr]
    update_of(None).load_state_dict(one.state_dict())  # a run that goes on in fp32 needs no scale
    two.load_state_dict(update_of(None).state_dict())  # one that comes from fp32 keeps its own


@pytest.mark.parametrize("law", [last_layer_weight, reconstruction_weight])
def test_adaptive_weight_of_tiny_gradients(law: Any) -> None:
    """In fp16 the gradients of a mean over many elements vanish unless the losses are scaled."""

    def weight(dtype: torch.dtype, scale: Tensor | None) -> float:
        torch.manual_seed(0)
        layer, x = nn.Linear(8, 64).to(dtype), torch.randn(4096, 8).to(dtype)
        recon = layer(x)
        last = layer.weight if law is last_layer_weight else recon
        losses = recon.float().abs().mean() / 16, recon.float().sigmoid().mean() / 64
        return float(law(*losses, last, lambda x: x, scale))

    exact = weight(torch.float64, None)
    assert weight(torch.float16, torch.tensor(2.0**14)) == pytest.approx(exact, rel=0.01)
    assert weight(torch.float16, None) != pytest.approx(exact, rel=0.1)
    assert torch.tensor(weight(torch.float16, torch.tensor(2.0**60))).isnan(), "an overflow is not a measurement"


@pytest.mark.parametrize("name", ["stage1_gan", "stage2"])
def test_fp16_follows_fp32(name: str, tmp_path: Path, cli: Any) -> None:
    line = ["train", f"configs/debug/{name}.yaml", "--project", name, "--run-name", "r", "--train.steps", 5]
    line += ["--pictures.every", "null", "--data.workers", 0]
    line += ["--online_eval.every", "null"] if name == "stage1_gan" else []
    for precision in ("fp32", "fp16"):
        assert cli(*line, "--save-dir", tmp_path / precision, "--train.precision", precision) == 0
    exact, half = (rows(only(tmp_path / precision / name)) for precision in ("fp32", "fp16"))
    # the first steps may look for a scale, and Adam's first moves are as large as any
    key = "train/loss_recon" if name == "stage1_gan" else "train/loss_total"
    assert half[0][key] == pytest.approx(exact[0][key], rel=5e-3)
    assert half[-1][key] == pytest.approx(exact[-1][key], rel=0.1)
    assert half[-1]["train/loss_scale"] >= 2.0**10
    kept = tensors(only(tmp_path / "fp16" / name), 5)
    assert {v.dtype for v in kept.values() if v.is_floating_point()} <= {torch.float32, torch.float64}
    names = {"autoencoder", "discriminator"} if name == "stage1_gan" else {"generator"}
    assert {k for k in kept if k.endswith("loss_scaler.scale")} == {f"optimizer/{n}:loss_scaler.scale" for n in names}


def test_fp16_resumes_exactly(tmp_path: Path, cli: Any) -> None:
    line = ["train", "configs/debug/stage1_gan.yaml", *FP16, "--project", "p", "--run-name", "r", "--train.steps", 4]
    line += ["--pictures.every", "null", "--online_eval.every", "null", "--data.workers", 0, "--checkpoint.every", 2]
    assert cli(*line, "--save-dir", tmp_path / "whole") == 0
    whole = only(tmp_path / "whole" / "p")
    assert cli(*line, "--save-dir", tmp_path / "half", "--resume-ckpt", whole / "checkpoints" / "step_00000002") == 0
    half = only(tmp_path / "half" / "p")
    assert_same(tensors(whole, 4), tensors(half, 4))

    def numbers(run: Path) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if "per_s" not in k} for row in without_times(run)]

    assert numbers(whole)[-2:] == numbers(half)


def test_a_run_that_never_is_finite_stops(tmp_path: Path, cli: Any, capfd: Any) -> None:
    line = ["train", "configs/debug/stage2.yaml", *FP16, "--project", "p", "--run-name", "r", "--save-dir", tmp_path]
    assert cli(*line, "--updates.generator.lr", "1e30", "--updates.generator.clip", "null") == 3
    assert "is not finite" in capfd.readouterr().err


def test_an_overflow_of_the_adaptive_weight_skips_the_step(tmp_path: Path) -> None:
    _, parts, trainer, (micros, _) = assembled("configs/debug/stage1_gan.yaml", *FP16)
    autoencoder, discriminator = parts.updates
    for update in parts.updates:
        update.scaler.load_state_dict({"scale": torch.tensor(2.0**60), "good_steps": torch.tensor(0)})  # type: ignore[union-attr]
    weights = [p.detach().clone() for p in autoencoder.params]
    logged = trainer.optimise(micros)
    assert all(torch.equal(p, w) for p, w in zip(autoencoder.params, weights, strict=True))
    assert all(bool(value.isfinite()) for value in logged.values()), "a part of the method, not a fault"
    assert float(autoencoder.scaler.value) == 2.0**59  # type: ignore[union-attr]
    assert float(discriminator.scaler.value) == 2.0**59  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["stage1_gan", "stage2"])
def test_no_host_sync_in_a_scaled_step(name: str) -> None:
    _, _, trainer, steps = assembled(f"configs/debug/{name}.yaml", *FP16)
    with NoReads():
        for micros in steps:
            trainer.optimise(micros)
            trainer.clock.tick()


def test_observers_see_the_loss_own_gradients() -> None:
    seen: dict[str, list[float]] = {}
    for precision in ("fp32", "fp16"):
        _, _, trainer, (micros, _) = assembled("configs/debug/stage2.yaml", "--train.precision", precision)

        class Look(Observer):
            def after_backward(self, run: object, update: Any, into: str = precision) -> None:
                seen[into] = [float(p.grad.norm()) for p in update.params]

        trainer.observers = [Look()]
        trainer.optimise(micros)
    assert seen["fp16"] == pytest.approx(seen["fp32"], rel=0.05, abs=1e-4)


def test_unknown_precision_is_one_line(tmp_path: Path, cli: Any, capfd: Any) -> None:
    line = ["train", "configs/debug/stage2.yaml", "--project", "p", "--run-name", "r", "--save-dir", tmp_path]
    assert cli(*line, "--train.precision", "fp8") == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert "precision" in message
    assert json.dumps("fp8").strip('"') in message
