"""Defects that leading public repositories have or had: each test is named after one, and shown to see it.

A check runs twice, on our code and with the defect put in; the second must fail it. Defects with a test elsewhere are
listed in `ELSEWHERE`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import rqvae
from rqvae import backends
from rqvae.callbacks.interfaces import Observer
from rqvae.diffusion.guidance import ClassifierFree
from rqvae.img_datasets.feed import Positions
from rqvae.img_datasets.interfaces import ClassCondition, LabeledImageData, Transform
from rqvae.models.ema import EMA
from rqvae.models.losses.lpips import LPIPSLoss
from rqvae.run import DataSettings
from rqvae.trainers import checkpoint, generate
from rqvae.trainers.clock import Clock
from rqvae.trainers.evaluation_trainer import SplitWalk, as_pictures
from rqvae.trainers.updates import Update
from tests.conftest import ROOT, finish, largest_difference, only, rows, start, tensors
from tests.test_loop import assembled

ELSEWHERE = {
    "replicas of the discriminator drift apart": "test_world_size.py::test_two_processes_equal_one",
    "gradients of one update end in the other": (
        "test_loop.py::test_generator_step_leaves_no_gradient_in_the_discriminator"
    ),
    "the host waits for the device in each step": "test_loop.py::test_no_host_sync_in_a_step",
    "a loss that is not finite is hidden": "test_loop.py::test_not_finite_stops_the_run_by_name",
    "only the last micro-batch is logged": "test_loop.py::test_meter_means_are_over_all_micro_batches",
    "autoguidance computes twice what it uses": (
        "test_diffusion.py::test_autoguidance_extrapolates_from_the_guide_with_b_rows_in_each"
    ),
    "interval guidance computes the null half": "test_diffusion_model.py::test_interval_spares_rows_of_the_backbone",
    "unknown config keys are ignored": "test_bad_input.py::test_config_mistakes",
    "an average in bf16 stalls": "test_ema.py::test_average_of_bf16_weights_is_fp32_and_does_not_stall",
    "image folders are labelled in the order of the disk": "test_datasets.py::test_image_folder_is_sorted_and_labelled",
    "a half-written checkpoint is loaded": "test_resume.py::test_half_written_checkpoint_is_not_used",
    "the adaptive weight is that of one rank": "test_losses.py::test_last_layer_weight_is_that_of_the_whole_batch",
    "a path of the shipped configs never ran": "test_configs.py::test_every_config_trains_and_moves_every_tensor",
}  # fmt: skip


@pytest.mark.parametrize("place", ELSEWHERE.values())
def test_elsewhere_is_there(place: str) -> None:
    file, _, name = place.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)


def test_ema_that_is_evaluated_is_the_online_model() -> None:
    """A compiled forward that was bound before the copy answers with the online weights under every name."""
    _, parts, trainer, steps = assembled("configs/debug/stage1.yaml")
    module = parts.modules["stage1"]
    module.compile(backend="eager")
    for micros in steps:
        trainer.optimise(micros)
        for ema in trainer.ema:
            ema.update(5)
    images = LabeledImageData(img=steps[0][0].require_img())

    def answer(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(images).xs_recon

    averaged = copy.deepcopy(module)
    averaged.load_state_dict({**module.state_dict(), **trainer.ema[0].state_dict()})
    online, expected = answer(module), answer(averaged)
    with parts.evaluated():
        evaluated = answer(module)
    assert not torch.allclose(online, expected, atol=1e-5), "two steps at a rate of 1e-3 move the weights"
    torch.testing.assert_close(evaluated, expected)
    averaged.forward = module.forward  # the defect: an instance attribute that a deepcopy keeps bound to the original
    assert not torch.allclose(answer(averaged), expected, atol=1e-5)


def test_lpips_under_no_grad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    weights = torchvision.models.alexnet(weights=None).features.state_dict()
    torch.save({f"features.{k}": v for k, v in weights.items()}, tmp_path / "alex.pth")
    lpips = json.dumps({"net": "alex", "trunk_weights": str(tmp_path / "alex.pth")})
    size = ["--data.dataset.init_args.size", "64", "--data.batch_size", "2"]
    _, parts, _, ((micro,), _) = assembled("configs/debug/stage1.yaml", "--lpips", lpips, *size)

    def has_gradient() -> bool:
        update = parts.updates[0]
        loss = update.loss(micro, 0).parts["loss_lpips"]
        if not loss.requires_grad:
            return False
        grads = torch.autograd.grad(loss, update.params, allow_unused=True)
        return all(bool((grad != 0).any()) for grad in grads if grad is not None)

    assert has_gradient()
    monkeypatch.setattr(LPIPSLoss, "forward", torch.no_grad()(LPIPSLoss.forward))
    assert not has_gradient()


class CountReduced(Observer):
    """Counts the gradient elements that DDP reduces: `rank_R.json` in `folder`, elements by update, and the steps.

    Args:
        folder: where to.
        every_micro_batch: the defect, communication after each micro-batch.
    """

    def __init__(self, folder: str, every_micro_batch: bool = False) -> None:
        self.folder, self.every_micro_batch = Path(folder), every_micro_batch
        self.reduced: dict[str, int] = {}

    def on_fit_start(self, run: Any) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(name, bucket):  # DDP takes no annotations but its own, as objects
            self.reduced[name] = self.reduced.get(name, 0) + bucket.buffer().numel()
            return allreduce_hook(None, bucket)

        for update in run.updates:
            assert isinstance(update.wrapped, DistributedDataParallel)
            update.wrapped.register_comm_hook(update.name, hook)
        if self.every_micro_batch:
            accumulate = run.backend.accumulate
            run.backend.accumulate = lambda module, *, sync: accumulate(module, sync=True)

    def on_fit_end(self, run: Any) -> None:
        sizes = {update.name: sum(p.numel() for p in update.params) for update in run.updates}
        facts = {"reduced": self.reduced, "sizes": sizes, "steps": run.clock.step}
        (self.folder / f"rank_{run.backend.rank}.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(("defect", "times"), [(False, 1), pytest.param(True, 4, marks=pytest.mark.slow)])
def test_gradients_are_reduced_in_each_micro_batch(defect: bool, times: int, tmp_path: Path) -> None:
    """Each gradient element crosses the wire once an optimizer step, under accumulation over 4 micro-batches."""
    arguments = {"folder": str(tmp_path), "every_micro_batch": defect}
    observer = [{"class_path": f"{__name__}.{CountReduced.__qualname__}", "init_args": arguments}]
    process = start(
        "train", "configs/debug/stage1_gan.yaml", "--save-dir", tmp_path, "--project", "p", "--world-size", 2,
        "--train.accumulate", 4, "--train.steps", 2, "--observers", json.dumps(observer), "--data.workers", 0,
        "--online_eval.every", "null", "--pictures.every", "null",
    )  # fmt: skip
    code, errors = finish(process)
    assert code == 0, errors
    for rank in (0, 1):
        facts = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert facts["steps"] == 2
        assert set(facts["sizes"]) == {"autoencoder", "discriminator"}
        for name, size in facts["sizes"].items():
            assert facts["reduced"][name] == times * size * facts["steps"], name


def test_gradients_are_zeroed_in_each_micro_batch() -> None:
    def gradients(accumulate: int, *, defect: bool = False) -> list[torch.Tensor]:
        more = ["--train.accumulate", str(accumulate), "--train.precision", "fp64"]
        _, parts, trainer, (micros, _) = assembled("configs/debug/stage2.yaml", *more)
        found: list[torch.Tensor] = []
        update = parts.updates[0]

        class Look(Observer):
            def after_backward(self, *_: Any) -> None:
                found.extend(p.grad.clone() for p in update.params)

        trainer.observers = [Look()]
        if defect:
            loss = update.loss
            update.loss = lambda batch, micro: (update.optimizer.zero_grad(), loss(batch, micro))[1]
        trainer.optimise(micros)
        return found

    def agree(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return all(torch.allclose(x, y, rtol=1e-9, atol=1e-13) for x, y in zip(a, b, strict=True))

    whole = gradients(1)
    assert agree(gradients(4), whole)
    assert not agree(gradients(4, defect=True), whole)


LINE = ["--project", "p", "--run-name", "r", "--train.steps", 6, "--checkpoint.every", 2, "--checkpoint.keep_last", 9]
QUIET = ["--pictures.every", "null", "--online_eval.every", "null", "--data.workers", 0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with a GAN and OneCycle, with a checkpoint every 2."""
    from rqvae.cli import run

    folder = tmp_path_factory.mktemp("whole")
    line = ["train", "configs/debug/stage1_gan.yaml", "--save-dir", folder, *LINE, *QUIET]
    assert run([str(word) for word in line]) == 0
    return only(folder / "p")


@pytest.mark.parametrize(
    ("owner", "method"),
    [(Update, "load_state_dict"), (EMA, "load_state_dict"), (Clock, "load_state_dict"), (None, "")],
    ids=["optimizer_state_is_not_loaded", "ema_is_not_loaded", "schedule_and_data_restart", "ours"],
)
def test_resume_that_does_not_resume(
    owner: Any, method: str, whole: Path, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optimizer loaded before it exists or not at all, restored state thrown away, schedule and data from the start."""
    if owner:
        monkeypatch.setattr(owner, method, lambda self, state: None)
    source = whole / "checkpoints" / "step_00000002"
    line = ["train", "configs/debug/stage1_gan.yaml", "--save-dir", tmp_path, *LINE, *QUIET, "--resume-ckpt", source]
    assert cli(*line) == 0
    resumed = only(tmp_path / "p")
    a, b = tensors(whole, 6), tensors(resumed, 6)
    same = all(torch.equal(a[key], b[key]) for key in a)
    rates = [[row["train/lr"] for row in rows(run)[-4:]] for run in (whole, resumed)]
    assert same == (owner is None)
    assert (rates[0] == rates[1] and len(rows(resumed)) == 4) == (owner is not Clock)


def test_optimizer_of_the_discriminator_is_not_saved_and_ema_never_updated(whole: Path) -> None:
    first, last = tensors(whole, 2), tensors(whole, 6)
    for name in ("autoencoder", "discriminator"):
        moments = {k: v for k, v in last.items() if k.startswith(f"optimizer/{name}:") and k.endswith("exp_avg")}
        assert moments
        assert all(bool(v.any()) for v in moments.values())
    averages = [key for key in last if key.startswith("ema_0.9/")]
    assert averages
    for key in averages:
        online = last[f"model/{key.partition('/')[2]}"]
        assert not torch.equal(last[key], first[key]), f"{key} was never updated"
        assert not torch.equal(last[key], online), f"{key} is the online weight"


def test_checkpoint_loads_on_as_many_ranks_as_wrote_it_only(tmp_path: Path, cli) -> None:
    """1 -> 2 -> 1 processes, each from the other's checkpoint, end where one process ends."""
    config = ["train", "configs/debug/stage2.yaml", *LINE, *QUIET, "--train.precision", "fp64"]
    assert cli(*config, "--save-dir", tmp_path / "one") == 0
    one = only(tmp_path / "one" / "p")
    line = [*config, "--save-dir", tmp_path / "two", "--world-size", 2]
    code, errors = finish(start(*line, "--resume-ckpt", one / "checkpoints" / "step_00000002"))
    assert code == 0, errors
    two = only(tmp_path / "two" / "p")
    assert checkpoint.read_meta(two / "checkpoints" / "step_00000004")["world_size"] == 2
    line = [*config, "--save-dir", tmp_path / "back"]
    assert cli(*line, "--resume-ckpt", two / "checkpoints" / "step_00000004") == 0
    end = tensors(only(tmp_path / "back" / "p"), 6)
    assert largest_difference(tensors(one, 6), end) < 1e-9
    assert largest_difference(tensors(one, 4), end) > 1e-6, "the measure can tell"


def test_latest_checkpoint_is_the_largest_file(tmp_path: Path) -> None:
    for step, size in ((9, 1000), (10, 10)):
        checkpoint.save(tmp_path / "checkpoints" / f"step_{step:08d}", {"model/x": {"x": torch.ones(size)}}, {})
    assert checkpoint.find(tmp_path).name == "step_00000010"


def test_guidance_touches_three_channels_only() -> None:
    x, condition = torch.randn(2, 4, 3, 3), ClassCondition(torch.tensor([0, 1]), 6)

    def predict(x: torch.Tensor, t: torch.Tensor, condition: ClassCondition) -> torch.Tensor:
        return condition.label.to(x).view(-1, 1, 1, 1).expand_as(x)

    def first_three(predict: Any, x: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        guided = ClassifierFree(3.0)(predict, x, t, condition)
        return torch.cat((guided[:, :3], predict(x, t, condition)[:, 3:]), 1)

    def is_whole(guidance: Callable[..., torch.Tensor]) -> bool:
        expected = condition.null().label + 3.0 * (condition.label - condition.null().label)
        return torch.equal(guidance(predict, x, torch.tensor(0.5), condition), expected.view(-1, 1, 1, 1).expand_as(x))

    assert is_whole(ClassifierFree(3.0))
    assert not is_whole(first_three)
    assert condition.null().label.tolist() == [6, 6], "the null class is the data's, not 1000"


def test_validation_through_the_train_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    class Paint(Transform):
        def __init__(self, level: float) -> None:
            self.level = level

        def __call__(self, sample: LabeledImageData, rng: torch.Generator) -> LabeledImageData:
            return replace(sample, img=torch.full((3, 16, 16), self.level))

    levels = {"train": 0.25, "val": 0.5, "test": 0.75}
    run, *_ = assembled("configs/debug/stage1.yaml")
    paints = {f"{split}_transform": lambda _, level=level: Paint(level) for split, level in levels.items()}
    data = replace(run.data, **paints)

    def own_transforms() -> bool:
        walks = {split: SplitWalk(data, split, backends.create("cpu")) for split in levels}  # type: ignore[arg-type]
        return all(bool((walks[split].first(2).require_img() == level).all()) for split, level in levels.items())

    assert own_transforms()
    make = DataSettings.make
    monkeypatch.setattr(DataSettings, "make", lambda self, split: (make(self, split)[0], make(self, "train")[1]))
    assert not own_transforms()


def test_images_are_truncated_to_bytes() -> None:
    levels = torch.arange(256, dtype=torch.float64).repeat_interleave(2)
    offset = torch.tensor([-0.4, 0.4], dtype=torch.float64).repeat(256)
    images = ((levels + offset) / 255).clamp(0, 1).float().view(1, 1, 16, 32).expand(1, 3, 16, 32)
    expected = levels.to(torch.uint8).view(16, 32).numpy()

    def rounds(to_bytes: Callable[[torch.Tensor], np.ndarray]) -> bool:
        return bool((to_bytes(images)[0, 0] == expected).all())

    assert rounds(as_pictures)
    assert not rounds(lambda x: (x * 255).to(torch.uint8).numpy())


@pytest.fixture(scope="module")
def generator_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rqvae.cli import run

    folder = tmp_path_factory.mktemp("generator")
    line = ["train", "configs/debug/stage2.yaml", "--save-dir", folder, "--project", "p", "--train.steps", 1, *QUIET]
    assert run([str(word) for word in line]) == 0
    return only(folder / "p")


def with_loud_weights(run: Path) -> Any:
    """A pipeline whose answer depends on its condition: one step from zero it would round to the same bytes."""
    pipeline = rqvae.load(run)
    assert pipeline.two_stage is not None
    torch.manual_seed(0)
    with torch.no_grad():
        for p in pipeline.two_stage.stage2.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return pipeline


def test_class_labels_are_permuted(generator_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image beside label k is the one that class k makes."""
    pipeline = with_loud_weights(generator_run)
    labels = (4, 0, 2)
    condition = ClassCondition(torch.tensor(labels), pipeline.spec.num_classes)
    expected = as_pictures(pipeline.sample(3, condition, steps=2, seed=5)).transpose(0, 2, 3, 1)

    def agree(name: str) -> bool:
        request = generate.SampleRequest(tmp_path / name, 3, labels, seed=5)
        sampler = replace(pipeline.two_stage.stage2.sampler, steps=2)
        generate.generate(pipeline.two_stage, pipeline.spec, sampler, backends.create("cpu"), request, {})
        with np.load(tmp_path / name) as arrays:
            return arrays["arr_1"].tolist() == list(labels) and np.array_equal(arrays["arr_0"], expected)

    assert agree("ours.npz")
    condition_of = generate.condition_of
    monkeypatch.setattr(generate, "condition_of", lambda spec, labels_b: condition_of(spec, labels_b.flip(0)))
    assert not agree("permuted.npz")


def test_sampling_in_train_mode_drops_conditions(generator_run: Path) -> None:
    """Conditions are dropped in the training forward alone, by the batch's own draw."""
    pipeline = with_loud_weights(generator_run)
    two_stage, stage2 = pipeline.two_stage, pipeline.two_stage.stage2
    seen: list[list[int]] = []
    stage2.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2].label.tolist()))
    condition = ClassCondition(torch.tensor([1, 3]), 6)
    stage2.train()
    stage2.drop_condition = 1.0
    noise = torch.randn(2, *two_stage.latent_shape)
    images = two_stage.decode(two_stage.sample(condition, noise))
    assert set(map(tuple, seen)) == {(1, 3)}
    assert stage2.training, "the mode is given back"
    assert torch.equal(images, two_stage.eval().decode(two_stage.sample(condition, noise))), "no dropout either"
    seen.clear()
    draws = {"noise": noise, "t": torch.full((2,), 0.5), "drop": torch.tensor([0.1, 0.9])}
    batch = LabeledImageData(img=torch.rand(2, 3, 16, 16), condition=condition, draws=draws)
    stage2.drop_condition = 0.5
    for training, expected in ((True, [6, 3]), (False, [1, 3])):
        stage2.train(training)
        two_stage.training_loss(batch)
        assert seen.pop() == expected


def test_all_ranks_see_the_same_data() -> None:
    def of_rank(rank: int) -> list[list[int]]:
        return list(Positions(0, 32, 8, accumulate=2, rank=rank, world_size=2))

    ranks = [of_rank(rank) for rank in (0, 1)]
    assert sorted(i for micros in ranks for micro in micros for i in micro) == list(range(32))
    assert sorted(i for micro in (*of_rank(0), *of_rank(0)) for i in micro) != list(range(32))
