"""The world model: workflows, dreams, windows, detector and scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rqvae.errors import BadInput
from rqvae.games.collect import collect
from rqvae.games.detector import MazeDetector
from rqvae.games.maze_chase import MazeChase
from rqvae.games.windows import maze_windows
from rqvae.img_datasets.game_frames import GameFrames
from rqvae.img_datasets.interfaces import ActionCondition, DataSpec, LabeledImageData, LabeledImageDatasetWrapper
from rqvae.img_datasets.transforms import Identity
from rqvae.metrics.moving import PixelErrors
from rqvae.models.interfaces import Stage1Encodings, base_connector
from rqvae.models.stage1.pixel import PixelStage1
from rqvae.models.stage2.linear_dit import LinearDiT
from rqvae.models.stage2.world_model import WorldModel
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import fill
from rqvae.trainers.dream import Dream, frame_noise, model_numbers
from rqvae.trainers.rollout import Dreamer

SPEC = DataSpec((3, 32, 32), num_actions=5, history=3, context=True)
SHAPE = (48, 8, 8)
WORKFLOWS = [("latent_concat", "conv2d"), ("latent_history", "conv2d"), ("latent_history", "conv3d")]


def small(shape: tuple[int, ...], spec: DataSpec) -> LinearDiT:
    return LinearDiT(shape, spec, depth=1, width=32, heads=2, cross_heads=2)


def model(**options: object) -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(SHAPE, SPEC, backbone=small, **options)


def batch(world: WorldModel, n: int = 2) -> tuple[Stage1Encodings, LabeledImageData]:
    torch.manual_seed(1)
    context, target = torch.randn(n, 3, *SHAPE), torch.randn(n, *SHAPE)
    actions, mask = torch.randint(5, (n, 3)), torch.ones(n, 3, dtype=torch.bool)
    numbers = [fill(world.draws(SHAPE), 0, i) for i in range(n)]
    draws = {name: torch.stack([row[name] for row in numbers]) for name in numbers[0]}
    condition = ActionCondition(context, actions, mask, 5)
    return Stage1Encodings(target), LabeledImageData(condition=condition, draws=draws)


@pytest.mark.parametrize(("workflow", "encoder"), WORKFLOWS)
def test_an_untrained_model_copies_the_last_frame(workflow: str, encoder: str) -> None:
    world = model(workflow=workflow, history_encoder=encoder).eval()
    encodings, inputs = batch(world)
    prediction = world(encodings, inputs).zs_pred
    assert isinstance(inputs.condition, ActionCondition)
    assert torch.equal(prediction, inputs.condition.context[:, -1])
    answer = world.infer(inputs, noise=torch.randn(2, *SHAPE))
    torch.testing.assert_close(answer.zs_pred, inputs.condition.context[:, -1], atol=1e-5, rtol=1e-5)
    assert answer.additional_attr == {"nfe": 4}


@pytest.mark.parametrize(("workflow", "encoder"), WORKFLOWS)
def test_every_parameter_learns(workflow: str, encoder: str) -> None:
    world = model(workflow=workflow, history_encoder=encoder).train()
    for p in world.parameters():
        torch.nn.init.normal_(p, std=0.1)
    encodings, inputs = batch(world)
    world.compute_loss(encodings, world(encodings, inputs), inputs).loss_total.backward()
    assert [name for name, p in world.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


@pytest.mark.parametrize(("workflow", "encoder"), WORKFLOWS)
def test_the_state_of_the_sampler_is_seen(workflow: str, encoder: str) -> None:
    """The network reads the present state, not the first noise: another state gives another answer."""
    world = model(workflow=workflow, history_encoder=encoder).eval()
    for p in world.parameters():
        torch.nn.init.normal_(p, std=0.1)
    _, inputs = batch(world)
    t = torch.full((2,), 0.5)
    one, two = (world.backbone(torch.randn(2, *SHAPE), t, inputs.condition) for _ in range(2))
    assert not torch.allclose(one, two, atol=1e-3)


def test_history_encoder_has_no_batch_statistics() -> None:
    world = model(workflow="latent_history").eval()
    for p in world.parameters():
        torch.nn.init.normal_(p, std=0.1)
    _, inputs = batch(world, 4)
    x, t, condition = torch.randn(4, *SHAPE), torch.rand(4), inputs.condition
    assert isinstance(condition, ActionCondition)
    whole = world.train().backbone(x, t, condition)
    alone = ActionCondition(condition.context[:1], condition.actions[:1], condition.mask[:1], 5)
    torch.testing.assert_close(world.eval().backbone(x[:1], t[:1], alone), whole[:1], atol=1e-5, rtol=1e-5)


def test_context_noise_follows_its_law_and_is_off_in_evaluation() -> None:
    world = model(context_noise=0.5, context_noise_share=0.6)
    _, inputs = batch(world, 2)
    assert isinstance(inputs.condition, ActionCondition)
    clean = inputs.condition.context
    level = torch.tensor([0.3, 0.7])
    inputs = replace(inputs, draws={**inputs.draws, "context_level": level})
    noised = world.train()._noised(inputs.condition, inputs).context
    expected = clean[0] + 0.5 * 0.3 / 0.6 * inputs.draws["context_noise"][0]
    torch.testing.assert_close(noised[0], expected)
    assert torch.equal(noised[1], clean[1])
    seen = []
    world.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[2].context))
    encodings = Stage1Encodings(torch.randn(2, *SHAPE))
    world.eval()(encodings, inputs)
    world.train()(encodings, inputs)
    assert torch.equal(seen[0], clean)
    assert not torch.equal(seen[1], clean)


def test_the_null_action_keeps_the_frames() -> None:
    _, inputs = batch(model())
    null = inputs.condition.null()
    assert torch.equal(null.context, inputs.condition.context)
    assert (null.actions == 5).all()
    assert null.actions.shape == inputs.condition.actions.shape


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prediction": "velocity"}, "residual: expected false for prediction velocity"),
        ({"context_noise": -1.0}, "context_noise"),
        ({"context_noise_share": 0.0}, "context_noise_share"),
    ],
)
def test_bad_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        model(**options)


def test_data_without_frames_are_refused() -> None:
    with pytest.raises(BadInput, match=r"context: true\), got num_actions 5, history 3, context False"):
        WorldModel(SHAPE, replace(SPEC, context=False), backbone=small)
    world = model()
    condition = ActionCondition(None, torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool), 5)
    with pytest.raises(BadInput, match="expected frames of history"):
        world.infer(LabeledImageData(condition=condition), noise=torch.zeros(1, *SHAPE))
    other = replace(condition, context=torch.zeros(1, 2, *SHAPE))
    with pytest.raises(BadInput, match=r"condition.context: expected \(B, 3, 48, 8, 8\), got \(1, 2, 48, 8, 8\)"):
        world.infer(LabeledImageData(condition=other), noise=torch.zeros(1, *SHAPE))


def two_stage(**options: object) -> TwoStage:
    world = model(**options).eval()
    for p in world.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return TwoStage(PixelStage1(4), base_connector(), world, (3, 32, 32)).eval()


def test_a_dream_equals_its_frames_sampled_one_by_one() -> None:
    """The context is encoded once and shifted; here it is assembled anew from all frames and actions at each step."""
    whole, generator = two_stage(), torch.Generator().manual_seed(0)
    frames = torch.rand(2, 3, 3, 32, 32, generator=generator)
    past, ahead = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[4, 1, 2, 0], [0, 0, 3, 1]])
    dream = Dream.begin(whole, frames, past, 5)
    latents, actions = (
        [*whole.stage1.encode(LabeledImageData(img=frames.flatten(0, 1))).zs.unflatten(0, (2, 3)).unbind(1)],
        past,
    )
    for t in range(4):
        noise = torch.stack([frame_noise(SHAPE, 7, n, t) for n in range(2)])
        frame = dream.step(ahead[:, t], noise)
        actions = torch.cat((actions, ahead[:, t : t + 1]), dim=1)
        condition = ActionCondition(
            torch.stack(latents[-3:], 1), actions[:, -3:], torch.ones(2, 3, dtype=torch.bool), 5, encoded=True
        )
        output = whole.sample(condition, noise)
        assert torch.equal(frame, whole.decode(output))
        latents.append(output.zs_pred)


def test_dreams_do_not_depend_on_their_batch() -> None:
    game = MazeChase()
    windows = maze_windows(game, 3, history=3, horizon=4, seed=0)
    whole = two_stage()
    ahead = windows.actions[:, 2:]
    together = Dreamer(whole, 5)(windows.context, windows.actions[:, :2], ahead, 0)
    apart = Dreamer(whole, 5, batch_size=1)(windows.context, windows.actions[:, :2], ahead, 0)
    assert together.shape == (3, 4, 32, 32, 3)
    assert np.abs(together.astype(int) - apart).max() <= 1


def test_bad_dreams() -> None:
    whole = two_stage()
    frames = torch.rand(1, 3, 3, 32, 32)
    with pytest.raises(BadInput, match=r"actions: expected \(1, 2\) between 3 frames, got \(1, 3\)"):
        Dream.begin(whole, frames, torch.zeros(1, 3, dtype=torch.long), 5)
    with pytest.raises(BadInput, match="action: expected 0 to 4, got 0 to 5"):
        Dream.begin(whole, frames, torch.tensor([[0, 5]]), 5)
    dream = Dream.begin(whole, frames, torch.zeros(1, 2, dtype=torch.long), 5)
    with pytest.raises(BadInput, match="action: expected 0 to 5, got 6 to 6"):
        dream.step(torch.tensor([6]), torch.randn(1, *SHAPE))


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    collect("maze-chase", 2000, 32, folder, policy="mixed")
    return folder


def test_windows_stay_inside_an_episode(recording: Path) -> None:
    data = GameFrames("train", root=str(recording), size=32, history=4, context=True, padding=False)
    data.open()
    frames = {}
    for k in range(data.episodes):
        episode, actions = data.episode(k)
        for i in range(len(episode) - 4):
            key = episode[i : i + 5].tobytes() + actions[i : i + 4].tobytes()
            frames[key] = k
    for index in range(0, len(data), 7):
        sample = data[index]
        stacked = torch.cat((sample.condition.context, sample.img[None])).permute(0, 2, 3, 1).numpy()
        assert stacked.tobytes() + sample.condition.actions.numpy().tobytes() in frames
        assert sample.condition.mask.all()
    padded = GameFrames("train", root=str(recording), size=32, history=4, context=True)
    padded.open()
    assert len(padded) == len(data) + 4 * data.episodes
    first = padded[0].condition
    assert not first.mask.any()
    assert (first.actions == 5).all()
    assert torch.equal(first.context[0], first.context[-1])


def test_old_names_and_shapes(recording: Path) -> None:
    data = GameFrames("train", root=str(recording), size=32, history=3, context=True)
    data.open()
    window, sample = data.as_window(2), data[2]
    shapes = {name: tuple(window[name].shape) for name in ("obs", "img", "y", "y_mask")}
    assert shapes == {"obs": (9, 32, 32), "img": (3, 32, 32), "y": (1, 3, 5), "y_mask": (1, 3)}
    assert window["data_info"] == {"episode": window["data_info"]["episode"], "done": False}
    assert torch.equal((window["obs"] * 255).round().byte().unflatten(0, (3, 3)), sample.condition.context)
    assert window["y_mask"].tolist() == [[0, 1, 1]]
    assert window["y"][0].sum(1).tolist() == [0, 1, 1]
    ends = [i for i in range(len(data)) if data.as_window(i)["data_info"]["done"]]
    assert len(ends) == data.episodes


def test_actions_are_numbered_by_name(recording: Path) -> None:
    options = {"root": str(recording), "size": 32, "history": 2}
    recorded = GameFrames("train", **options)
    names = ["LEFT", "RIGHT", "UP", "DOWN", "NOOP"]
    mapped = GameFrames("train", **options, action_names=names)
    recorded.open()
    mapped.open()
    for i in range(50, 60):
        theirs = [recorded.spec.names[k] for k in recorded[i].condition.actions]
        assert theirs == [names[k] for k in mapped[i].condition.actions]
    other = GameFrames("train", **options, action_names=["LEFT", "RIGHT", "UP", "DOWN", "FIRE"])
    with pytest.raises(BadInput, match="action_names: expected those of the recording"):
        other.open()
    with pytest.raises(BadInput, match="action_names: expected 5 different names"):
        GameFrames("train", **options, action_names=["LEFT"])


def test_the_feed_gives_frames_in_the_unit_range(recording: Path) -> None:
    data = GameFrames("train", root=str(recording), size=32, history=2, context=True)
    data.open()
    sample = LabeledImageDatasetWrapper(data, Identity(data.spec), {}, 0, shuffle=False)[5]
    assert sample.condition.context.dtype == torch.float32
    assert torch.equal((sample.condition.context * 255).round().byte(), data[5].condition.context)


@pytest.mark.parametrize(("size", "ghosts"), [(32, 1), (64, 3)])
def test_the_detector_is_exact_on_real_frames(size: int, ghosts: int) -> None:
    game = MazeChase(size, ghosts)
    before = game.clone_state()
    detector = MazeDetector(game)
    assert detector.error(game, 400) == 0
    assert game.clone_state() == before
    empty = detector(np.zeros((1, size, size, 3), dtype=np.uint8))
    assert not empty.player.any()
    assert empty.player_cell().tolist() == [-1]
    with pytest.raises(BadInput, match="frames: expected uint8"):
        detector(np.zeros((1, size, size, 3), dtype=np.float32))


def test_windows_are_fixed_and_replay() -> None:
    game = MazeChase()
    windows = maze_windows(game, 4, history=3, horizon=6, seed=1)
    assert windows.sha256 == maze_windows(MazeChase(seed=9), 4, history=3, horizon=6, seed=1).sha256
    assert windows.sha256 != maze_windows(game, 4, history=3, horizon=6, seed=2).sha256
    # the evaluation is fixed before any model is trained
    assert windows.sha256.startswith("8fd01d1c74ec08a8")
    for n, state in enumerate(windows.states):
        game.restore_state(state)
        assert np.array_equal(game.render(), windows.context[n, -1])
        for t, action in enumerate(windows.actions[n, 2:]):
            frame, *_ = game.step(int(action))
            assert np.array_equal(frame, windows.future[n, t])
            assert len(set(game.clone_state().ghosts)) == windows.ghosts[n, t]


def test_pixel_errors_are_those_of_skimage() -> None:
    from skimage.metrics import peak_signal_noise_ratio

    rng = np.random.default_rng(0)
    before, target, predicted = rng.integers(0, 256, (3, 2, 8, 8, 3), dtype=np.uint8)
    target[:, :4] = before[:, :4]
    errors = PixelErrors()
    errors.update(predicted[:1], target[:1], before[:1])
    errors.update(predicted[1:], target[1:], before[1:])
    assert errors.psnr == pytest.approx(peak_signal_noise_ratio(target, predicted, data_range=255), abs=1e-9)
    moving = (np.abs(target.astype(int) - before).max(-1) > 25.5) & (np.arange(8) >= 4)[None, :, None]
    expected = peak_signal_noise_ratio(target[moving], predicted[moving], data_range=255)
    assert errors.psnr_moving == pytest.approx(expected, abs=1e-9)


def test_latents_of_the_images_shape_are_encoded_once() -> None:
    """Pixels as latents: nothing but the mark tells frames from latents."""
    spec = DataSpec((3, 8, 8), num_actions=5, history=2, context=True)
    torch.manual_seed(0)
    world = WorldModel((3, 8, 8), spec, backbone=small)
    whole = TwoStage(PixelStage1(1), base_connector(), world, (3, 8, 8)).eval()
    frames, past = torch.rand(1, 2, 3, 8, 8), torch.tensor([[0]])
    seen = []
    world.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[2].context))
    Dream.begin(whole, frames, past, 5).step(torch.tensor([1]), torch.randn(1, 3, 8, 8))
    torch.testing.assert_close(seen[0], 2 * frames - 1)


def test_windows_that_no_episode_has_room_for_are_refused() -> None:
    with pytest.raises(BadInput, match="at most 20 steps"):
        maze_windows(MazeChase(max_steps=20), 2, history=4, horizon=20, seed=0)
    with pytest.raises(BadInput, match="episodes have"):
        maze_windows(MazeChase(num_ghosts=4), 2, history=4, horizon=300, seed=0)


def test_actions_are_mapped_by_name() -> None:
    game = MazeChase()
    assert model_numbers((), game.action_names) == (0, 1, 2, 3, 4)
    numbers = model_numbers(("LEFT", "RIGHT", "UP", "DOWN", "NOOP"), game.action_names)
    assert numbers == (4, 2, 1, 0, 3)
    with pytest.raises(BadInput, match="expected a model of NOOP, UP, RIGHT, LEFT, DOWN, got one of FIRE, NOOP"):
        model_numbers(("FIRE", "NOOP"), game.action_names)
    whole, windows = two_stage(), maze_windows(game, 2, history=3, horizon=3, seed=0)
    seen = []
    whole.stage2.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[2].actions))
    Dreamer(whole, 5, numbers)(windows.context, windows.actions[:, :2], windows.actions[:, 2:3], 0)
    expected = np.array(numbers)[windows.actions[:, :3]]
    assert np.array_equal(seen[0].numpy(), expected)
