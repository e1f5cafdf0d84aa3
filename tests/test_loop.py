"""The step itself: no host synchronisation, gradients where they belong, observers that leave no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rqvae import backends
from rqvae.callbacks.interfaces import Observer
from rqvae.configuration import read
from rqvae.durations import Duration
from rqvae.img_datasets.feed import Positions, make_loader
from rqvae.img_datasets.interfaces import LabeledImageData, LabeledImageDatasetWrapper
from rqvae.metrics.reconstruction import ReconstructionScores
from rqvae.run import AnyRun
from rqvae.trainers import stage1_trainer, stage2_trainer
from rqvae.trainers.clock import Clock
from rqvae.trainers.evaluation_trainer import SplitWalk, load_evaluated, reconstruct
from rqvae.trainers.meter import Meter
from rqvae.trainers.parts import Parts
from rqvae.trainers.settings import CheckpointSettings
from rqvae.trainers.state import TrainState
from rqvae.trainers.trainer import Trainer
from tests.conftest import assert_same, means_of, only, rows, tensors


class NoHostSync(TorchDispatchMode):
    """Raises where a value would have to be known on the host."""

    forbidden = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in self.forbidden:
            raise AssertionError(f"host synchronisation: {func.name()}")
        return func(*args, **(kwargs or {}))


class NoReads(NoHostSync):
    """Also raises on the methods of a tensor that bring it to the host, whatever device it is on."""

    def __enter__(self) -> Any:
        self.patch = pytest.MonkeyPatch()

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("host synchronisation")

        for method in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__"):
            self.patch.setattr(torch.Tensor, method, refuse)
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self.patch.undo()
        return super().__exit__(*error)


def assembled(config: str, *overrides: str) -> tuple[AnyRun, Parts, Trainer, list[list[LabeledImageData]]]:
    """A trainer without a folder, and the micro-batches of two steps."""
    run = read([config], overrides).instantiate()
    backend = backends.create("cpu", precision=run.train.precision)
    dataset, transform = run.data.make("train")
    dataset.open()
    clock = Clock(run.data.batch_size, len(dataset))
    clock.total_steps = clock.steps_of(Duration.parse(run.train.steps))
    build = stage1_trainer.build if run.stage == 1 else stage2_trainer.build
    parts = build(run, backend, clock)  # type: ignore[arg-type]
    stream = LabeledImageDatasetWrapper(dataset, transform, parts.draws, run.train.seed, shuffle=True)
    positions = Positions(0, 2 * run.data.batch_size, run.data.batch_size, run.train.accumulate)
    micros = list(backend.feed(make_loader(stream, positions, 0)))
    n = run.train.accumulate
    state = TrainState(backend, parts.modules, parts.ema, parts.updates, Meter(backend), {})
    trainer = Trainer(
        backend, parts.updates, parts.ema, None, clock, state, None, None, run.train, CheckpointSettings()  # type: ignore[arg-type]
    )  # fmt: skip
    return run, parts, trainer, [micros[:n], micros[n:]]


@pytest.mark.parametrize("name", ["stage1", "stage1_gan", "stage2"])
def test_no_host_sync_in_a_step(name: str) -> None:
    _, _, trainer, steps = assembled(f"configs/debug/{name}.yaml")
    with NoReads():
        for micros in steps:
            trainer.optimise(micros)
            for ema in trainer.ema:
                ema.update(trainer.clock.step)
            trainer.clock.tick()


def test_the_sync_detector_can_fail() -> None:
    with NoHostSync(), pytest.raises(AssertionError, match="host synchronisation: aten::_local_scalar_dense"):
        torch.ones(3).sum().item()
    with NoReads(), pytest.raises(AssertionError, match="host synchronisation"):
        torch.ones(3).cpu()


def test_generator_step_leaves_no_gradient_in_the_discriminator() -> None:
    _, parts, trainer, (micros, _) = assembled("configs/debug/stage1_gan.yaml")
    autoencoder, discriminator = parts.updates
    seen: list[str] = []

    class Look(Observer):
        def after_backward(self, run: object, update: Any) -> None:
            other = discriminator if update is autoencoder else autoencoder
            assert all(p.grad is None for p in other.params), f"{update.name} left gradients in {other.name}"
            assert all(p.grad is not None for p in update.params)
            seen.append(update.name)

    trainer.observers = [Look()]
    trainer.optimise(micros)
    assert seen == ["autoencoder", "discriminator"]


@pytest.mark.parametrize("reuse", ["true", "false"])
def test_discriminator_learns_from_the_generators_batch(reuse: str) -> None:
    _, parts, trainer, (micros, _) = assembled("configs/debug/stage1_gan.yaml", "--gan.reuse_forward", reuse)
    seen: list[torch.Tensor] = []
    parts.modules["discriminator"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer.optimise(micros)
    fakes, pairs = seen[: len(micros)], seen[len(micros) :]
    assert len(pairs) == len(micros)
    for micro, fake, pair in zip(micros, fakes, pairs, strict=True):
        real, second = pair.chunk(2)
        assert torch.equal(real, micro.require_img())
        # reused: the very reconstructions; else those of the weights that the step has just updated
        assert torch.equal(second, fake) == (reuse == "true")


def test_dropout_free_second_forward_uses_the_same_posterior_noise() -> None:
    run, _, _, (micros, _) = assembled("configs/debug/stage1_gan.yaml")
    with torch.no_grad():
        first, second = (run.stage1(micros[0]).xs_recon for _ in range(2))
        third = run.stage1(LabeledImageData(img=micros[0].img)).xs_recon
    assert torch.equal(first, second)
    assert not torch.equal(first, third), "without draws the encoding is the mean"


def test_evaluated_weights_are_the_averages(tmp_path: Path, cli) -> None:
    line = ["train", "configs/debug/stage1.yaml", "--save-dir", tmp_path, "--project", "p", "--run-name", "r"]
    assert cli(*line) == 0
    folder = only(tmp_path / "p")
    run = read(["configs/debug/stage1.yaml"]).instantiate()
    walk = SplitWalk(run.data, "val", backends.create("cpu"))

    def score() -> float:
        scores = ReconstructionScores()
        for batch, valid in walk.batches(16):
            scores.update(reconstruct(run.stage1.eval(), batch.require_img()), batch.require_img(), valid)
        return scores.result(scores.state())["psnr"]

    load_evaluated(run.stage1, "stage1", folder)
    average = score()
    online = {k.partition(":")[2]: v for k, v in tensors(folder, 20).items() if k.startswith("model/")}
    run.stage1.load_state_dict(online)
    assert rows(folder)[-1]["val/psnr"] == pytest.approx(average, abs=1e-4)
    assert abs(score() - average) > 1e-3


def test_observers_leave_no_trace(tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stage1_gan", "stage2"):
        line = ["train", f"configs/debug/{name}.yaml", "--project", name, "--run-name", "r", "--train.steps", 6]
        everything = ["--logging.tensorboard", "true", "--logging.wandb", "offline", "--logging.progress", "true"]
        often = ["--pictures.every", "2 steps", "--train.log_every", 1]
        often += ["--online_eval.every", "2 steps"] if name == "stage1_gan" else []
        assert cli(*line, "--save-dir", tmp_path / "all", *everything, *often) == 0
        with monkeypatch.context() as patch:
            patch.setattr("rqvae.trainers.assembly._observers", lambda *_: [])
            assert cli(*line, "--save-dir", tmp_path / "none", "--train.log_every", 1) == 0
        a, b = (tensors(only(tmp_path / which / name), 6) for which in ("all", "none"))
        assert_same(a, b)
    watched = only(tmp_path / "all" / "stage1_gan")
    assert list((watched / "tensorboard").iterdir())
    assert list(watched.rglob("*.wandb")), "the offline W&B run"
    assert len(list((watched / "samples").iterdir())) == 3


def test_not_finite_stops_the_run_by_name(tmp_path: Path, cli, capfd) -> None:
    line = ["train", "configs/debug/stage1.yaml", "--save-dir", tmp_path, "--project", "p", "--run-name", "r"]
    assert cli(*line, "--updates.autoencoder.lr", "1e30", "--updates.autoencoder.clip", "null") == 3
    message = capfd.readouterr().err.splitlines()[-1]
    assert "is not finite" in message
    assert "step " in message
    assert "train/loss_total" in message
    assert "checkpoint" in message
    assert "(samples 8 to 15 of the stream)" in message


def test_weights_that_are_not_finite_are_not_published(tmp_path: Path, cli, capfd) -> None:
    """Also where no row is due between the fault and the checkpoint."""
    line = ["train", "configs/debug/stage1.yaml", "--save-dir", tmp_path, "--project", "p", "--run-name", "r"]
    often = [
        "--train.log_every",
        20,
        "--checkpoint.every",
        5,
        "--pictures.every",
        "null",
        "--online_eval.every",
        "null",
    ]
    assert cli(*line, *often, "--updates.autoencoder.lr", "1e30", "--updates.autoencoder.clip", "null") == 3
    assert "is not finite" in capfd.readouterr().err
    assert not list(only(tmp_path / "p").glob("checkpoints/*/COMPLETE"))


def test_meter_means_are_over_all_micro_batches() -> None:
    meter = Meter(backends.create("cpu"))
    for value in (1.0, 2.0, 6.0):
        meter.add({"x": torch.tensor(value)})
    assert means_of(meter) == {"train/x": pytest.approx(3.0)}
    assert means_of(meter) == {}
    for _ in range(500):
        meter.add({"x": torch.ones((), dtype=torch.bfloat16)})
    assert means_of(meter) == {"train/x": 1.0}


def test_unfinished_row_survives_a_resume(tmp_path: Path, cli) -> None:
    """A row that spans a checkpoint has the same numbers as in an undisturbed run."""
    line = ["train", "configs/debug/stage1_gan.yaml", "--project", "p", "--run-name", "r", "--train.log_every", 6]
    assert cli(*line, "--save-dir", tmp_path / "whole") == 0
    whole = only(tmp_path / "whole" / "p")
    resume = ["--resume-ckpt", whole / "checkpoints" / "step_00000015"]
    assert cli(*line, "--save-dir", tmp_path / "half", *resume) == 0
    half = only(tmp_path / "half" / "p")
    a, b = rows(whole)[-2], rows(half)[0]
    assert a["step"] == b["step"] == 18
    assert {k: a[k] for k in a if k.startswith("train/loss")} == {k: b[k] for k in b if k.startswith("train/loss")}
    assert json.loads((half / "environment.json").read_text())["resumed_from"].endswith("step_00000015")


def test_lpips_trains(tmp_path: Path, cli) -> None:
    """With small random weights in the place of the ones that cannot be shipped."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    weights = {f"features.{k}": v for k, v in torchvision.models.alexnet(weights=None).features.state_dict().items()}
    torch.save(weights, tmp_path / "alex.pth")
    line = ["train", "configs/debug/stage1.yaml", "--project", "p", "--run-name", "r", "--train.steps", 2]
    line += ["--data.dataset.init_args.size", 64, "--pictures.every", "null", "--online_eval.every", "null"]
    lpips = json.dumps({"net": "alex", "trunk_weights": str(tmp_path / "alex.pth"), "weight": 2.0})
    assert cli(*line, "--save-dir", tmp_path / "with", "--lpips", lpips) == 0
    row = rows(only(tmp_path / "with" / "p"))[0]
    parts = row["train/loss_recon"] + row["train/loss_latent"] + 2 * row["train/loss_lpips"]
    assert row["train/loss_total"] == pytest.approx(parts, rel=1e-5)
    assert not [k for k in tensors(only(tmp_path / "with" / "p"), 2) if "lpips" in k or "alex" in k]


def test_bf16_keeps_weights_and_averages_in_fp32(tmp_path: Path, cli) -> None:
    for name in ("stage1_gan", "stage2"):
        line = ["train", f"configs/debug/{name}.yaml", "--project", name, "--run-name", "r", "--save-dir", tmp_path]
        assert cli(*line, "--train.precision", "bf16", "--train.steps", 3) == 0
        kept = tensors(only(tmp_path / name), 3)
        assert {v.dtype for v in kept.values() if v.is_floating_point()} <= {torch.float32, torch.float64}
        exact = read([f"configs/debug/{name}.yaml"])
        assert exact.resolved["train"]["precision"] == "fp32"
