"""Rollout steps in training: windows with several targets, each predicted after the model's estimate of the last."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rqvae.errors import BadInput
from rqvae.games.collect import collect
from rqvae.img_datasets.game_frames import GameFrames
from rqvae.img_datasets.interfaces import ActionCondition, DataSpec, LabeledImageData
from rqvae.models.interfaces import Stage1Encodings, base_connector
from rqvae.models.stage1.pixel import PixelStage1
from rqvae.models.stage2.linear_dit import LinearDiT
from rqvae.models.stage2.world_model import WorldModel
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import fill
from tests.conftest import ROOT

K, SHAPE = 2, (12, 8, 8)
WORKFLOWS = ["latent_concat", "latent_history", "pixel"]


def small(shape: tuple[int, ...], spec: DataSpec) -> LinearDiT:
    return LinearDiT(shape, spec, depth=1, width=32, heads=2, cross_heads=2)


def whole(steps: int, **options: object) -> TwoStage:
    torch.manual_seed(0)
    spec = DataSpec((3, 16, 16), num_actions=5, history=K, context=True, rollout_steps=steps)
    world = WorldModel(SHAPE, spec, backbone=small, drop_condition=0.0, **options)
    for p in world.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return TwoStage(PixelStage1(2), base_connector(), world, spec.image_shape).train()


def batch(model: TwoStage, steps: int) -> LabeledImageData:
    torch.manual_seed(1)
    n = K + steps - 1
    numbers = [fill(model.stage2.draws(model.latent_shape), 0, i) for i in range(2)]
    draws = {name: torch.stack([row[name] for row in numbers]) for name in numbers[0]}
    actions, mask = torch.randint(5, (2, n)), torch.ones(2, n, dtype=torch.bool)
    return LabeledImageData(
        torch.rand(2, 3, 16, 16), ActionCondition(torch.rand(2, n, 3, 16, 16), actions, mask, 5), draws=draws
    )


@pytest.mark.parametrize("workflow", WORKFLOWS)
@pytest.mark.parametrize("prediction", ["x0", "velocity"])
def test_each_step_is_the_one_step_loss_after_the_models_own_estimate(workflow: str, prediction: str) -> None:
    """The unrolled loss against one-step losses, whose context is put together by hand."""
    options = {"workflow": workflow, "prediction": prediction, "residual": False}
    if workflow == "pixel" and prediction != "x0":
        options["loss_space"] = "pixel"
    many, one = whole(2, **options), whole(1, **options)
    one.stage2.load_state_dict(many.stage2.state_dict())
    inputs = batch(many, 2)
    prepared = many.prepare(inputs)
    frames = torch.cat((prepared.condition.context, prepared.encodings.zs[:, None]), 1)
    losses = []
    for i in range(2):
        condition = ActionCondition(
            frames[:, i : i + K], inputs.condition.actions[:, i : i + K], inputs.condition.mask[:, :K], 5, encoded=True
        )
        draws = {name: inputs.draws[name][:, i] for name in ("noise", "t")}
        step = LabeledImageData(condition=condition, draws=draws)
        target = Stage1Encodings(frames[:, K + i])
        output = one.stage2(target, step)
        losses.append(one.stage2.compute_loss(target, output, step).loss_total)
        t = draws["t"].view(-1, 1, 1, 1)
        clean = output.zs_pred if prediction == "x0" else output.zs_degraded - t * output.zs_pred
        if workflow == "pixel" and prediction == "x0":
            clean = 2 * one.codec.decode(clean) - 1
        frames = torch.cat((frames[:, : K + i], clean.detach()[:, None], frames[:, K + i + 1 :]), 1)
    found, output = many.training_loss(inputs)
    torch.testing.assert_close(found.loss_total, torch.stack(losses).mean(), atol=1e-6, rtol=1e-5)
    assert output.additional_attr["levels"].shape == (2, 2)
    assert found.per_sample.shape == (2,)
    found.loss_total.backward()
    torch.stack(losses).mean().backward()
    for p, q in zip(many.stage2.parameters(), one.stage2.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


def test_four_steps_with_context_noise_train_every_parameter() -> None:
    model = whole(4, context_noise=0.3)
    model.training_loss(batch(model, 4))[0].loss_total.backward()
    assert [n for n, p in model.stage2.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_of_a_longer_window_the_last_frames_are_dreamed_on_from() -> None:
    model = whole(4).eval()
    condition, noise = batch(model, 4).condition, torch.randn(2, *SHAPE)
    last = replace(
        condition, context=condition.context[:, -K:], actions=condition.actions[:, -K:], mask=condition.mask[:, -K:]
    )
    assert torch.equal(model.sample(condition, noise).zs_pred, model.sample(last, noise).zs_pred)


def test_windows_have_all_targets_of_one_episode(tmp_path: Path) -> None:
    collect("maze-chase", 600, 32, tmp_path)
    options = {"root": str(tmp_path), "size": 32, "history": 3, "context": True, "padding": False}
    data, plain = GameFrames("train", **options, rollout_steps=4), GameFrames("train", **options)
    data.open()
    plain.open()
    assert len(plain) - len(data) == 3 * data.episodes
    assert data.spec.rollout_steps == 4
    assert data.fingerprint() != plain.fingerprint()
    starts = {}
    for k in range(data.episodes):
        frames, actions = data.episode(k)
        for i in range(len(frames) - 6):
            starts[frames[i : i + 7].tobytes() + actions[i : i + 6].tobytes()] = k
    for index in range(0, len(data), 5):
        sample = data[index]
        window = torch.cat((sample.condition.context, sample.img[None])).permute(0, 2, 3, 1).numpy()
        assert window.tobytes() + sample.condition.actions.numpy().tobytes() in starts
    assert data.as_window(3)["y"].shape == (1, 3, 5)
    assert data.as_window(3)["obs"].shape == (9, 32, 32)


@pytest.mark.parametrize("options", [{"padding": True, "context": True}, {"padding": False, "context": False}])
def test_targets_that_are_missing_are_refused(options: dict[str, bool]) -> None:
    with pytest.raises(BadInput, match=r"rollout_steps: expected 1 unless context: true and padding: false"):
        GameFrames("train", root="nowhere", size=32, rollout_steps=2, **options)
    with pytest.raises(BadInput, match=r"loss_space: expected latent for data.dataset rollout_steps 2"):
        whole(2, loss_space="both")


def test_the_config_key_is_checked(cli, capfd) -> None:
    line = ["train", ROOT / "configs/maze_chase/world_model.yaml", "--dry-run"]
    assert cli(*line, "--data.dataset.init_args.rollout_steps", 3) == 2
    assert "rollout_steps" in capfd.readouterr().err
    assert cli(*line, "--data.dataset.init_args.rollout_steps", 2) == 0
