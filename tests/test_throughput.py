"""Images and operations per second: the count against closed forms and against a step that was really done."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rqvae.backends.peaks import peak_tflops
from rqvae.callbacks.throughput import Throughput, Work
from rqvae.configuration import read
from rqvae.durations import Duration
from rqvae.img_datasets.interfaces import LabeledImageData
from rqvae.models.interfaces import LatentShape, Stage1Encodings, Stage1Losses, Stage1Model, Stage1ModelOutput
from rqvae.models.losses.interfaces import ImageLoss
from rqvae.models.losses.lpips import LPIPSLoss
from rqvae.trainers.step_cost import step_work
from tests.conftest import only, rows
from tests.test_loop import assembled

SPEEDS = ("train/images_per_s", "train/images_per_s_device", "train/tflops_per_s_device")


class OneLayer(ImageLoss):
    """The images' distance after a linear layer."""

    def __init__(self) -> None:
        super().__init__("layer")
        self.linear = nn.Linear(16, 10)

    def forward(self, output: Stage1ModelOutput, inputs: LabeledImageData) -> torch.Tensor:
        return self.linear(output.xs_recon).square().mean()


class TwoLayers(Stage1Model):
    """A strided convolution to (8, 4, 4), and a linear layer back to all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.linear = nn.Linear(8 * 4 * 4, 3 * 16 * 16)

    def latent_shape(self, image_shape: Any) -> LatentShape:
        return (8, image_shape[1] // 4, image_shape[2] // 4)

    def encode(self, inputs: LabeledImageData) -> Stage1Encodings:
        return Stage1Encodings(self.conv(inputs.require_img()))

    def decode(self, encodings: Stage1Encodings) -> Stage1ModelOutput:
        return Stage1ModelOutput(self.linear(encodings.zs.flatten(1)).unflatten(1, (3, 16, 16)))

    def forward(self, inputs: LabeledImageData) -> Stage1ModelOutput:
        return self.decode(self.encode(inputs))

    def compute_loss(self, output: Stage1ModelOutput, inputs: LabeledImageData) -> Stage1Losses:
        loss = (output.xs_recon - inputs.require_img()).square().mean()
        return Stage1Losses(loss, torch.zeros_like(loss))


CONV = 2 * (8 * 4 * 4) * (3 * 4 * 4)
LINEAR = 2 * (8 * 4 * 4) * (3 * 16 * 16)


def total(work: tuple[Work, ...]) -> float:
    return sum(part.flops for part in work)


def test_work_of_two_layers_is_the_closed_form() -> None:
    run = replace(read(["configs/debug/stage1.yaml"]).instantiate(), stage1=TwoLayers(), lpips=None)
    assert total(step_work(run)) == 3 * (CONV + LINEAR)  # type: ignore[arg-type]
    own = step_work(replace(run, losses=[OneLayer()]))  # type: ignore[arg-type]
    assert total(own) - total(step_work(run)) == 2 * (2 * 16 * 10 * 3 * 16), "forward and the images' gradient"
    generator = read(["configs/debug/stage2.yaml"]).instantiate()
    without = step_work(generator)
    assert without[0].flops == 0, "pixels cost nothing"
    assert step_work(replace(generator, stage1=TwoLayers()))[0].flops == CONV  # type: ignore[arg-type]


@pytest.mark.parametrize("weighting", ["fixed", "last_layer"])
@pytest.mark.parametrize("reuse", [True, False])
def test_work_of_a_gan_is_the_closed_form(weighting: Any, reuse: bool) -> None:
    """Autoencoder 3 (+ 1), discriminator 2 (+ 1 for the weight) in the generator's loss and 3 x 2 in its own."""
    run = read(["configs/debug/stage1_gan.yaml"]).instantiate()
    discriminator = nn.Conv2d(3, 5, 4, stride=2, padding=1)
    one = 2 * (5 * 8 * 8) * (3 * 4 * 4)
    gan = replace(run.gan, discriminator=discriminator, weighting=weighting, reuse_forward=reuse)  # type: ignore[union-attr]
    always, adversarial = step_work(replace(run, stage1=TwoLayers(), gan=gan, lpips=None), 7)  # type: ignore[arg-type]
    assert (always.starts, adversarial.starts) == (0, 7)
    assert always.flops == 3 * (CONV + LINEAR)
    expected = (8 if weighting == "fixed" else 9) * one + (0 if reuse else CONV + LINEAR)
    assert adversarial.flops == expected


@pytest.mark.parametrize("name", ["stage1", "stage1_gan", "stage2", "stage2_unet", "stage2_uvit"])
def test_work_is_that_of_a_step_that_was_done(name: str) -> None:
    """As torch counts a real step, less the gradients of the inputs of first layers, which nobody asks for."""
    run, _, trainer, (micros, _) = assembled(f"configs/debug/{name}.yaml")
    counted = total(step_work(run)) * run.data.batch_size
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainer.optimise(micros)
    done = counter.get_total_flops()
    assert 0.9 * counted < done <= 1.001 * counted


def test_work_of_lpips_is_that_of_its_passes() -> None:
    """Forward of both images, backward to the reconstruction; with an adaptive weight once more of the latter."""
    line = ["--lpips", '{"net": "alex"}', "--data.dataset.init_args.size", "64"]
    run = read(["configs/debug/stage1_gan.yaml"], line).instantiate()
    _, always, adaptive, _ = step_work(run)
    network = LPIPSLoss(net="alex").outline()
    recon = torch.empty(1, 3, 64, 64, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        loss = network(recon, torch.empty(1, 3, 64, 64, device="meta"))
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert always.flops == pytest.approx(forward.get_total_flops() + backward.get_total_flops(), rel=1e-3)
    assert adaptive.flops == pytest.approx(backward.get_total_flops(), rel=1e-3)


def test_counting_leaves_no_trace() -> None:
    run = read(["configs/debug/stage1_gan.yaml"]).instantiate()
    before = {k: v.clone() for k, v in run.stage1.state_dict().items()}
    state = torch.get_rng_state()
    step_work(run)
    step_work(read(["configs/debug/stage2.yaml"]).instantiate())
    torch.manual_seed(0)
    torch.set_rng_state(state)
    step_work(run)
    assert torch.equal(torch.get_rng_state(), state)
    after = run.stage1.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert {p.device.type for p in run.stage1.parameters()} == {"cpu"}


@dataclass
class FakeClock:
    """16 images a step, rows every 4 steps."""

    step: int = 0

    @property
    def images(self) -> int:
        return 16 * self.step

    def due(self, every: Duration) -> bool:
        return self.step % int(every.amount) == 0


def observe(observer: Throughput, seconds: list[float], monkeypatch: pytest.MonkeyPatch, start: int = 0) -> list[dict]:
    """The rows of steps that took so many seconds."""
    found: list[dict] = []
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = FakeClock(start)
    run: Any = SimpleNamespace(clock=clock, is_main=True, log_scalars=found.append)
    observer.on_fit_start(run)
    for duration in seconds:
        now[0] += duration
        clock.step += 1
        observer.after_step(run, {})
    return found


def test_speeds_are_images_and_operations_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    work = [Work(3e12), Work(1e12, starts=6)]
    observer = Throughput(Duration.parse(4), work, devices=2, peak_tflops=120.0)
    first, second, third = observe(observer, [60.0, *[2.0] * 11], monkeypatch)
    # the first step, with its warm-up, is in no row
    assert first["train/images_per_s"] == second["train/images_per_s"] == 8.0
    assert first["train/images_per_s_device"] == 4.0
    assert first["train/tflops_per_s_device"] == pytest.approx(4 * 3)
    assert first["train/mfu"] == pytest.approx(0.1)
    assert second["train/tflops_per_s_device"] == pytest.approx(4 * (3 + 2 / 4)), "steps 6 and 7 of 4 to 7"
    assert third["train/mfu"] == pytest.approx(4 * 4 / 120)


def test_a_row_after_one_step_has_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    resumed = observe(Throughput(Duration.parse(4), [Work(1e12)]), [8.0, 2.0, 2.0, 2.0, 2.0], monkeypatch, start=3)
    assert [row["train/images_per_s"] for row in resumed] == [2.0, 8.0]
    assert resumed[0] == {**resumed[0], "train/tflops_per_s_device": 2.0}
    assert "train/mfu" not in resumed[0]


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "fp64", 67),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "fp16", 165.2),
        ("NVIDIA GeForce RTX 4090 D", "fp16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "fp16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("TPU v4", "bf16", 275),
        ("TPU v5 lite", "bf16", 197),
        ("TPU v5p", "bf16", 459),
        ("TPU v6 lite", "bf16", 918),
        ("GAUDI2", "bf16", 432),
        ("GAUDI3", "bf16", 1835),
        ("x86_64", "fp32", None),
    ],
)
def test_peaks_by_the_drivers_name(name: str, precision: str, expected: float | None) -> None:
    assert peak_tflops(name, precision) == expected


def test_every_row_of_a_run_has_its_speed(tmp_path: Path, cli) -> None:
    line = ["train", "configs/debug/stage1_gan.yaml", "--save-dir", tmp_path, "--project", "p", "--train.steps", 6]
    quick = ["--pictures.every", "null", "--online_eval.every", "null", "--checkpoint.every", 6]
    assert cli(*line, *quick, "--run-name", "known", "--train.peak_tflops", 0.5) == 0
    assert cli(*line, *quick, "--run-name", "unknown") == 0
    known, unknown = (only(tmp_path / "p", f"{name}_*") for name in ("known", "unknown"))
    assert len(rows(known)) == len(rows(unknown)) == 6
    for row in rows(known):
        assert all(row[key] > 0 for key in SPEEDS)
        assert row["train/mfu"] == pytest.approx(row["train/tflops_per_s_device"] / 0.5)
        assert row["train/images_per_s_device"] == row["train/images_per_s"]
    for row in rows(unknown):
        assert all(row[key] > 0 for key in SPEEDS)
        assert "train/mfu" not in row
    assert "train/mfu is left out" not in (known / "log.txt").read_text()
    assert (unknown / "log.txt").read_text().count("train/mfu is left out") == 1


def test_a_model_that_needs_numbers_still_trains(tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("Could not run 'aten::nonzero' on meta\nmore words")

    monkeypatch.setattr("rqvae.trainers.measuring.step_work", refuse)
    line = ["train", "configs/debug/stage2.yaml", "--save-dir", tmp_path, "--project", "p", "--train.steps", 2]
    assert cli(*line, "--train.peak_tflops", 1) == 0
    run = only(tmp_path / "p")
    assert SPEEDS[0] in rows(run)[-1]
    assert "train/mfu" not in rows(run)[-1]
    assert "no count of operations on meta: Could not run 'aten::nonzero' on meta\n" in (run / "log.txt").read_text()


def test_a_peak_of_nothing_is_refused(tmp_path: Path, cli, capfd) -> None:
    line = ["train", "configs/debug/stage2.yaml", "--save-dir", tmp_path]
    assert cli(*line, "--train.peak_tflops", 0) == 2
    assert "train.peak_tflops: expected more than 0 or null, got 0" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
