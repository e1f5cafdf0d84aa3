"""The thirteen defects of the origin's next-frame code, each with the test that turns red when it is put back.

What other files hold already is named here and not done twice.

| defect of the origin | what holds it off |
|---|---|
| 1. `no_grad` around the encoder: the history encoder never learns | `test_world_pixel.py::test_the_gradient_goes_through_the_frozen_encoder`, `::test_an_encoder_that_cuts_the_gradient_is_refused` |
| 2. a latent answer compared with pixels, or noise asked of a decoder | `test_answer_and_target_are_of_one_space`; `test_world_pixel.py::test_the_loss_is_the_one_that_is_written_down` |
| 3. decode, mix, encode between steps destroys the state | `test_the_state_between_steps_is_the_solvers_own`; `test_world_pixel.py::test_the_sampler_walks_in_pixels_and_sees_where_it_is` |
| 4. encoded pixel noise as the start, which is not N(0, 1) | `test_sampling_starts_from_the_noise_itself` |
| 5. the first noise at every step in place of the state | `test_the_state_between_steps_is_the_solvers_own`; `test_world_model.py::test_the_state_of_the_sampler_is_seen` |
| 6. validation asks the inner network, past history encoder and frames | `test_every_step_of_sampling_sees_the_frames` |
| 7. null and actions of different axes and rows under guidance | `test_guidance_doubles_every_row_alike`; `test_world_model.py::test_the_null_action_keeps_the_frames` |
| 8. an embedding of a fixed size | `test_any_number_of_actions_and_frames` |
| 9. one null in training, another in sampling | `test_there_is_one_null`; `test_linear_dit.py::test_the_null_action_is_not_noop` |
| 10. batch norm in the history encoder | `test_a_sample_does_not_depend_on_its_batch`; `test_world_model.py::test_history_encoder_has_no_batch_statistics` |
| 11. windows across episodes | `test_world_model.py::test_windows_stay_inside_an_episode`, `test_world_rollout.py::test_windows_have_all_targets_of_one_episode` |
| 12. the present key in all history slots | `test_the_network_sees_the_keys_that_were_pressed`; `test_play.py::test_a_played_frame_is_the_sampled_one` |
| 12. the autoencoder among the model's weights | `test_world_pixel.py::test_the_autoencoder_is_in_no_state_dict_and_no_average` |
| 12. a checkpoint of no bytes; one session for all | `test_resume.py`, `test_checkpoint_policy.py` (COMPLETE); `test_play.py::test_sessions_are_their_own_and_limited` |
| 13. scores that reward copying, an autoencoder that loses the sprites | `test_a_lost_sprite_is_in_the_score`; `test_world_model.py::test_pixel_errors_are_those_of_skimage` |
"""  # noqa: E501  (a table row is one line)

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rqvae.diffusion.guidance import ClassifierFree
from rqvae.diffusion.sampling import Sampler
from rqvae.games.maze_chase import MazeChase
from rqvae.games.windows import maze_windows
from rqvae.img_datasets.interfaces import ActionCondition, DataSpec, LabeledImageData
from rqvae.metrics.moving import PixelErrors
from rqvae.models.connectors.scale_shift import ScaleShift
from rqvae.models.stage1.kl_vae import KLVAE
from rqvae.models.stage2.causal_dit import CausalDiT
from rqvae.models.stage2.linear_dit import LinearDiT
from rqvae.models.stage2.world_model import WorldModel
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import fill
from rqvae.trainers.dream import Dream

K, A = 2, 5
WORKFLOWS = ["latent_concat", "latent_history", "pixel", "causal"]
INNER = {"latent_concat": "network", "latent_history": "history", "pixel": "history", "causal": "network"}


def whole(workflow: str, actions: int = A, history: int = K, **options: Any) -> TwoStage:
    """The workflow over a small autoencoder and scaled latents, all weights random."""
    torch.manual_seed(0)
    spec = DataSpec((3, 16, 16), num_actions=actions, history=history, context=True)

    def network(shape: tuple[int, ...], data: DataSpec) -> torch.nn.Module:
        if workflow == "causal":
            return CausalDiT(shape, data, depth=1, width=32, heads=2, temporal_heads=2)
        return LinearDiT(shape, data, depth=1, width=32, heads=2, cross_heads=2)

    connector = ScaleShift(mean=[0.1, 0.2, 0.3, 0.4], std=[0.5, 1.0, 2.0, 1.5])
    options = {"residual": False, **options}
    world = WorldModel((4, 4, 4), spec, backbone=network, workflow=workflow, **options)  # type: ignore[arg-type]
    for p in world.parameters():
        torch.nn.init.normal_(p, std=0.2)
    vae = KLVAE(latent_channels=4, width=8, multipliers=[1, 1, 2], blocks=1, norm_groups=4)
    return TwoStage(vae, connector, world, spec.image_shape)


def condition(n: int = 2, actions: int = A, history: int = K) -> ActionCondition:
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(n, history, 3, 16, 16, generator=generator)
    chosen = torch.randint(actions, (n, history), generator=generator)
    return ActionCondition(frames, chosen, torch.ones(n, history, dtype=torch.bool), actions)


def batch(model: TwoStage, n: int = 2, actions: int = A, history: int = K) -> LabeledImageData:
    numbers = [fill(model.stage2.draws(model.latent_shape), 0, i) for i in range(n)]
    draws = {name: torch.stack([row[name] for row in numbers]) for name in numbers[0]}
    image = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return LabeledImageData(image, condition(n, actions, history), draws=draws)


def noise(model: TwoStage, n: int = 2) -> torch.Tensor:
    return torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(3))


def asked(model: TwoStage) -> list[tuple[torch.Tensor, torch.Tensor, Any]]:
    """(x, t, condition) of every question that a sampler asks from now on."""
    questions: list[tuple[torch.Tensor, torch.Tensor, Any]] = []
    predictor = model.stage2._predict_under

    def noting(given: Any) -> Any:
        predict = predictor(given)

        def predict_and_note(x: torch.Tensor, t: torch.Tensor, seen: Any) -> torch.Tensor:
            questions.append((x, t, seen))
            return predict(x, t, seen)

        return predict_and_note

    model.stage2._predict_under = noting
    return questions


@pytest.mark.parametrize("workflow", WORKFLOWS)
@pytest.mark.parametrize("prediction", ["x0", "velocity"])
def test_answer_and_target_are_of_one_space(workflow: str, prediction: str) -> None:
    """2: the shapes are equal, so that nothing is broadcast; what is noised has the shape of the sampler's state."""
    for space in ["latent", "pixel", "both"]:
        if (workflow == "causal" and space != "latent") or (
            workflow == "pixel" and prediction != "x0" and space != "pixel"
        ):
            continue
        model = whole(workflow, loss_space=space, prediction=prediction)
        _, output = model.train().training_loss(batch(model))
        parts = output.additional_attr
        pairs = [(output.zs_pred, parts["target"])] if "target" in parts else []
        pairs += [(parts["pixels"], parts["pixel_target"])] if "pixels" in parts else []
        assert pairs
        assert all(found.shape == target.shape for found, target in pairs)
        assert output.zs_degraded.shape[-3:] == model.latent_shape


def test_what_a_network_answers_by_default_is_the_clean_frame() -> None:
    """2: a decoder cannot give noise, so that a velocity must be asked for."""
    assert WorldModel.__init__.__kwdefaults__["prediction"] == "x0"


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_sampling_starts_from_the_noise_itself(workflow: str) -> None:
    """4: the first x is the noise that was given, bit for bit, at t = 1; encoded noise is far from N(0, 1)."""
    model, start = whole(workflow).eval(), noise(whole(workflow))
    questions = asked(model)
    model.sample(condition(), start)
    assert torch.equal(questions[0][0], start)
    assert float(questions[0][1]) == 1


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_the_state_between_steps_is_the_solvers_own(workflow: str) -> None:
    """3, 5: x at each step is the x before plus its velocity times dt, not decoded and encoded, and not the first."""
    model, start = whole(workflow).eval(), noise(whole(workflow))
    questions, prepared = asked(model), model.prepare(LabeledImageData(torch.rand(2, 3, 16, 16), condition()))
    model.sample(condition(), start, Sampler(steps=3))
    assert len(questions) == 3
    with torch.no_grad():
        for (x, t, _), (then, t_then, _) in zip(questions[:-1], questions[1:], strict=True):
            clean = model.stage2.backbone(x, t.float().expand(2), prepared.condition)
            expected = x + float(t_then - t) * (x - clean) / float(t)
            torch.testing.assert_close(then, expected, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(then, x, atol=1e-2)


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_every_step_of_sampling_sees_the_frames(workflow: str) -> None:
    """6: the part that reads frames is called in each step (once for all in the causal workflow), and they matter."""
    model, start = whole(workflow).eval(), noise(whole(workflow))
    calls: list[int] = []
    getattr(model.stage2.backbone, INNER[workflow]).register_forward_hook(lambda *_: calls.append(1))
    shown = model.decode(model.sample(condition(), start, Sampler(steps=3)))
    assert len(calls) == (4 if workflow == "causal" else 3)
    for k in range(K):
        frames = condition().context.clone()
        frames[:, k] = 1 - frames[:, k]
        other = model.decode(model.sample(replace(condition(), context=frames), start, Sampler(steps=3)))
        assert (shown - other).abs().max() > 1e-4, k


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_guidance_doubles_every_row_alike(workflow: str) -> None:
    """7: with and without actions side by side: 2 B rows of x, frames, actions and mask, which give the mean asked."""
    model, start = whole(workflow).eval(), noise(whole(workflow), 3)
    prepared = model.prepare(LabeledImageData(torch.rand(3, 3, 16, 16), condition(3))).condition
    questions = asked(model)
    got = model.sample(condition(3), start, Sampler(steps=1, guidance=ClassifierFree(2.0))).zs_pred
    x, _, both = questions[0]
    sizes = {len(part) for part in (x, both.context, both.actions, both.mask)}
    assert sizes == {6}
    assert both.actions.shape == (6, K)
    t = torch.ones(3)
    with torch.no_grad():
        one, null = (model.stage2.backbone(start, t, c) for c in (prepared, prepared.null()))
    torch.testing.assert_close(got, 2 * one - null, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("workflow", WORKFLOWS)
@pytest.mark.parametrize(("actions", "history"), [(1, 1), (9, 6)])
def test_any_number_of_actions_and_frames(workflow: str, actions: int, history: int) -> None:
    """8: embeddings have the data's sizes; nothing is configured twice. Dropping actions works at all of them."""
    model = whole(workflow, actions, history, drop_condition=0.5)
    losses, _ = model.train().training_loss(batch(model, 4, actions, history))
    losses.loss_total.backward()
    assert losses.loss_total.isfinite()
    given = condition(2, actions, history)
    given = replace(given, actions=torch.full_like(given.actions, actions - 1))
    guided = Sampler(steps=1, guidance=ClassifierFree(2.0))
    assert model.eval().sample(given, noise(model), guided).zs_pred.isfinite().all()


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_there_is_one_null(workflow: str) -> None:
    """9: what dropped training samples see is what guidance asks under; its vectors learn, and it is not NOOP."""
    model = whole(workflow, drop_condition=1.0).train()
    seen: list[Any] = []
    name = "window" if workflow == "causal" else "forward"
    name = "latent" if workflow == "pixel" else name
    inner = getattr(model.stage2.backbone, name)
    setattr(model.stage2.backbone, name, lambda x, t, c: (seen.append(c), inner(x, t, c))[1])
    model.training_loss(batch(model))[0].loss_total.backward()
    assert torch.equal(seen[0].actions, condition().null().actions)
    assert (seen[0].actions == A).all()
    tables = [m for m in model.stage2.modules() if isinstance(m, torch.nn.Embedding)]
    assert tables
    rows = [table.weight.grad.abs().sum(1) for table in tables]
    assert all((row > 0).sum() >= 1 for row in rows)
    model.eval()
    questions = asked(model)
    model.sample(condition(), noise(model), Sampler(steps=1, guidance=ClassifierFree(2.0)))
    assert torch.equal(questions[0][2].actions[2:], seen[0].actions)
    noop = replace(condition(), actions=torch.zeros_like(condition().actions))
    null, none = (model.sample(c, noise(model)).zs_pred for c in (condition().null(), noop))
    assert not torch.allclose(null, none, atol=1e-4)


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_a_sample_does_not_depend_on_its_batch(workflow: str) -> None:
    """10: noise levels of other samples leave no trace, in training mode either; there is no running statistic."""
    model = whole(workflow, drop_condition=0.0).train()
    four = model.prepare(batch(model, 4))
    first = replace(
        four,
        encodings=replace(four.encodings, zs=four.encodings.zs[:1]),
        condition=replace(
            four.condition,
            **{name: getattr(four.condition, name)[:1] for name in ("context", "actions", "mask")},
        ),
        img=four.img[:1],
        draws={name: x[:1] for name, x in four.draws.items()},
    )
    together, alone = model.stage2(four.encodings, four), model.stage2(first.encodings, first)
    torch.testing.assert_close(alone.zs_pred, together.zs_pred[:1], atol=1e-5, rtol=1e-5)
    assert not [name for name, _ in model.stage2.named_buffers() if "running" in name]


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_the_network_sees_the_keys_that_were_pressed(workflow: str) -> None:
    """12: the last K keys in their order, as in training, and not the present one in every slot."""
    model = whole(workflow).eval()
    questions = asked(model)
    dream = Dream.begin(model, condition(1).context, torch.tensor([[3]]), A)
    for key in (4, 1, 2):
        dream.step(torch.tensor([key]), noise(model, 1))
    seen = [q[2].actions.tolist() for q in questions[:: len(questions) // 3]]
    assert seen == [[[3, 4]], [[4, 1]], [[1, 2]]]


def test_a_lost_sprite_is_in_the_score() -> None:
    """13: over all pixels copying beats an autoencoder that blurs sprites; over the moving ones it is worth nothing."""
    windows = maze_windows(MazeChase(), 12, history=2, horizon=8, seed=0)
    before, target = (windows.frames[:, i : i + 8].reshape(-1, 32, 32, 3) for i in (1, 2))
    blurred = target.reshape(-1, 8, 4, 8, 4, 3).mean((2, 4), keepdims=True)
    lossy = np.broadcast_to(blurred, (len(target), 8, 4, 8, 4, 3)).reshape(target.shape).astype(np.uint8)
    copying, blurring, true = PixelErrors(), PixelErrors(), PixelErrors()
    for errors, frames in ((copying, before), (blurring, lossy), (true, target)):
        errors.update(frames, target, before)
    assert copying.psnr > blurring.psnr
    assert copying.psnr_moving < 6 < blurring.psnr_moving
    assert true.psnr_moving == np.inf
