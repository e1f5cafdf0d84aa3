"""The causal workflow: nothing sees a later frame, and what is remembered is what would be computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rqvae.diffusion.guidance import ClassifierFree
from rqvae.diffusion.sampling import Sampler
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import ActionCondition, DataSpec, LabeledImageData
from rqvae.models.interfaces import Stage1Encodings
from rqvae.models.stage2.causal_dit import CausalDiT
from rqvae.models.stage2.linear_dit import LinearDiT
from rqvae.models.stage2.world_model import WorldModel
from rqvae.randomness import fill

K, SHAPE = 3, (6, 4, 8)
SPEC = DataSpec((3, 8, 16), num_actions=5, history=K, context=True)
WINDOW = K + 1


def small(shape: tuple[int, ...], spec: DataSpec) -> CausalDiT:
    return CausalDiT(shape, spec, depth=2, width=32, heads=2, temporal_heads=4)


def network() -> CausalDiT:
    """With random weights, also those that begin at zero."""
    torch.manual_seed(0)
    model = small(SHAPE, SPEC).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def frames(count: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    x, t = torch.randn(2, count, *SHAPE), torch.rand(2, count)
    return x, t, torch.randint(5, (2, count)), torch.ones(2, count, dtype=torch.bool)


@pytest.mark.parametrize("what", ["frame", "level", "action"])
def test_a_change_in_a_frame_changes_nothing_before_it(what: str) -> None:
    model, (x, t, led, seen) = network(), frames(WINDOW)
    with torch.no_grad():
        before, _ = model(x, t, led, seen)
        for s in range(WINDOW):
            x2, t2, led2 = x.clone(), t.clone(), led.clone()
            if what == "frame":
                x2[:, s] += 1
            elif what == "level":
                t2[:, s] = 1 - t2[:, s]
            else:
                led2[:, s] = (led2[:, s] + 1) % 5
            after, _ = model(x2, t2, led2, seen)
            assert torch.equal(before[:, :s], after[:, :s])
            for later in range(s, WINDOW):
                assert not torch.allclose(before[:, later], after[:, later], atol=1e-4), (s, later)


def test_frame_by_frame_with_memory_is_the_whole_window_at_once() -> None:
    """Nine frames, more than a window: the memory lets go of what the band of the whole computation does not see."""
    model, (x, t, led, seen) = network(), frames(9)
    seen[0, 1] = False
    with torch.no_grad():
        whole, _ = model(x, t, led, seen)
        memory, single = None, []
        for s in range(9):
            part = slice(s, s + 1)
            answer, memory = model(x[:, part], t[:, part], led[:, part], seen[:, part], memory)
            assert len(memory) == min(s + 1, K)
            single.append(answer)
        answer, memory = model(x[:, :4], t[:, :4], led[:, :4], seen[:, :4])
        rest, _ = model(x[:, 4:], t[:, 4:], led[:, 4:], seen[:, 4:], memory)
    torch.testing.assert_close(torch.cat(single, 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat((answer, rest), 1), whole, atol=1e-5, rtol=1e-5)


def test_attention_ends_at_the_window() -> None:
    """In one block frame s reads frames s - K to s alone."""
    torch.manual_seed(0)
    model = CausalDiT(SHAPE, SPEC, depth=1, width=32, heads=2, temporal_heads=4).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t, led, seen = frames(7)
    changed = x.clone()
    changed[:, 0] += 1
    with torch.no_grad():
        one, two = model(x, t, led, seen)[0], model(changed, t, led, seen)[0]
    assert torch.equal(one[:, WINDOW:], two[:, WINDOW:])
    assert not torch.allclose(one[:, K], two[:, K], atol=1e-4)


def test_a_missing_frame_is_not_seen() -> None:
    model, (x, t, led, seen) = network(), frames(WINDOW)
    seen[:, :2] = False
    changed = x.clone()
    changed[:, :2] += 1
    with torch.no_grad():
        one, two = model(x, t, led, seen)[0], model(changed, t, led, seen)[0]
    assert torch.equal(one[:, 2:], two[:, 2:])
    assert one.isfinite().all()


def world(random: bool = True, **options: object) -> WorldModel:
    torch.manual_seed(0)
    model = WorldModel(SHAPE, SPEC, backbone=small, workflow="causal", **options)
    if random:
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return model


def batch(model: WorldModel) -> tuple[Stage1Encodings, LabeledImageData]:
    torch.manual_seed(1)
    context, target, actions = torch.randn(2, K, *SHAPE), torch.randn(2, *SHAPE), torch.randint(5, (2, K))
    numbers = [fill(model.draws(SHAPE), 0, i) for i in range(2)]
    draws = {name: torch.stack([row[name] for row in numbers]) for name in numbers[0]}
    condition = ActionCondition(context, actions, torch.ones(2, K, dtype=torch.bool), 5, encoded=True)
    return Stage1Encodings(target), LabeledImageData(condition=condition, draws=draws)


@pytest.mark.parametrize("options", [{}, {"residual": False, "prediction": "velocity"}])
@pytest.mark.parametrize("steps", [1, 4])
def test_samples_with_memory_are_those_of_the_whole_window(options: dict[str, object], steps: int) -> None:
    model = world(**options).eval()
    _, inputs = batch(model)
    noise, sampler = torch.randn(2, *SHAPE), Sampler(steps=steps)
    got = model.infer(inputs, noise=noise, sampler=sampler).zs_pred
    with torch.no_grad():
        whole, _ = sampler(model._predict, noise, inputs.condition, path=model.path, prediction=model.prediction)
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)
    assert got.std() > 0.05


def test_the_context_is_computed_once_a_frame() -> None:
    model, lengths = world().eval(), []
    model.backbone.network.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.infer(batch(model)[1], noise=torch.randn(2, *SHAPE))
    assert lengths == [K, 1, 1, 1, 1]


def test_guidance_asks_under_the_null_action_too() -> None:
    model = world().eval()
    condition, x, t = batch(model)[1].condition, torch.randn(2, *SHAPE), torch.tensor(0.7, dtype=torch.float64)
    with torch.no_grad():
        got = ClassifierFree(3.0)(model._predict_under(condition), x, t, condition)
        with_actions, without = (model._predict(x, t, each) for each in (condition, condition.null()))
    torch.testing.assert_close(got, without + 3 * (with_actions - without), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(with_actions, without, atol=1e-4)


def test_every_frame_is_noised_by_its_own_level_and_is_a_target() -> None:
    model = world(residual=False, drop_condition=0.0, context_noise_share=1.0).train()
    encodings, inputs = batch(model)
    output = model(encodings, inputs)
    clean = torch.cat((inputs.condition.context, encodings.zs[:, None]), 1)
    t = inputs.draws["t"][:, :, None, None, None]
    assert t.shape[1] == WINDOW
    assert len(t.flatten().unique()) == 2 * WINDOW
    noisy = (1 - t) * clean + t * inputs.draws["noise"]
    torch.testing.assert_close(output.zs_degraded, noisy[:, 1:])
    led = torch.cat((torch.full((2, 1), 6), inputs.condition.actions), 1)
    answer, _ = model.backbone.network(noisy, inputs.draws["t"], led, torch.ones(2, WINDOW, dtype=torch.bool))
    expected = (answer - clean)[:, 1:].square().mean()
    torch.testing.assert_close(model.compute_loss(encodings, output, inputs).loss_total, expected)
    hidden = replace(inputs.condition, mask=torch.tensor([[False, False, True], [True, True, True]]))
    output = model(encodings, replace(inputs, condition=hidden))
    errors = (output.zs_pred - output.additional_attr["target"]).square().flatten(2).mean(2)
    expected = torch.stack((errors[0, 1:].mean(), errors[1].mean()))
    torch.testing.assert_close(model.compute_loss(encodings, output, inputs).per_sample, expected)


def test_some_samples_have_a_clean_context_and_their_last_frame_is_the_target() -> None:
    model = world(residual=False, drop_condition=0.0, context_noise_share=0.6).train()
    encodings, inputs = batch(model)
    inputs = replace(inputs, draws={**inputs.draws, "context_level": torch.tensor([0.5, 0.7])})
    output = model(encodings, inputs)
    levels = torch.stack((inputs.draws["t"][0], torch.tensor([0, 0, 0, inputs.draws["t"][1, -1]])))
    assert torch.equal(output.additional_attr["levels"], levels[:, 1:])
    torch.testing.assert_close(output.zs_degraded[1, :-1], inputs.condition.context[1, 1:])
    played = model.backbone(output.zs_degraded[:, -1], levels[:, -1], inputs.condition)
    torch.testing.assert_close(output.zs_pred[1, -1], played[1], atol=1e-5, rtol=1e-5)
    expected = (played[1] - encodings.zs[1]).square().mean()
    losses = model.compute_loss(encodings, output, inputs)
    torch.testing.assert_close(losses.per_sample[1], expected, atol=1e-5, rtol=1e-5)


def test_what_is_added_to_an_answer_is_never_noised() -> None:
    """Of a network that answers zero: a clean frame before is the answer; after noised ones there is only the zero."""
    model = world(random=False, context_noise_share=0.6).train()
    encodings, inputs = batch(model)
    inputs = replace(inputs, draws={**inputs.draws, "context_level": torch.tensor([0.5, 0.7])})
    output = model(encodings, inputs)
    assert output.zs_pred[0].abs().max() == 0
    assert torch.equal(output.zs_pred[1], inputs.condition.context[1])


def test_every_parameter_learns_and_an_untrained_model_copies() -> None:
    model = world().train()
    encodings, inputs = batch(model)
    model.compute_loss(encodings, model(encodings, inputs), inputs).loss_total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    fresh = world(random=False).eval()
    shown = fresh.infer(inputs, noise=torch.randn(2, *SHAPE)).zs_pred
    torch.testing.assert_close(shown, inputs.condition.context[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_space": "pixel"}, "stage2.loss_space: expected latent in the workflow causal"),
        ({"context_noise": 0.3}, "stage2.context_noise: expected 0"),
        ({"backbone": LinearDiT}, "expected a CausalDiT for the workflow causal, got LinearDiT"),
        ({"workflow": "latent_concat"}, "stage2.workflow: expected causal for a CausalDiT"),
    ],
)
def test_bad_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        WorldModel(SHAPE, SPEC, **{"workflow": "causal", "backbone": small, **options})
    with pytest.raises(BadInput, match="temporal_heads: expected a divisor of width = 128, got 3"):
        CausalDiT(SHAPE, SPEC, temporal_heads=3)
    with pytest.raises(BadInput, match=r"frames: expected \(B, S, 6, 4, 8\)"):
        network()(torch.zeros(1, 2, 6, 4, 4), *frames(2)[1:])
