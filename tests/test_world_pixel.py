"""The pixel workflow: through the frozen autoencoder in every evaluation, and the spaces of the loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rqvae.configuration import read
from rqvae.diffusion.sampling import Sampler
from rqvae.errors import BadInput
from rqvae.games.collect import collect
from rqvae.img_datasets.interfaces import ActionCondition, DataSpec, LabeledImageData
from rqvae.models.connectors.scale_shift import ScaleShift
from rqvae.models.ema import EMA
from rqvae.models.interfaces import Stage1Encodings, base_connector
from rqvae.models.stage1.kl_vae import KLVAE
from rqvae.models.stage1.pixel import PixelStage1
from rqvae.models.stage2.linear_dit import LinearDiT
from rqvae.models.stage2.world_model import WorldModel
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import fill
from rqvae.trainers.dream import Dream, frame_noise
from rqvae.trainers.dry_run import assume_statistics
from rqvae.trainers.evaluation_trainer import load_stage1
from rqvae.trainers.stage2_trainer import make_two_stage
from rqvae.trainers.step_cost import step_work
from tests.conftest import ROOT, only

SPEC = DataSpec((3, 16, 16), num_actions=5, history=2, context=True)
LATENT = (4, 4, 4)
ENCODERS = ["conv2d", "conv3d"]


def small(shape: tuple[int, ...], spec: DataSpec) -> LinearDiT:
    return LinearDiT(shape, spec, depth=1, width=32, heads=2, cross_heads=2)


def vae() -> KLVAE:
    return KLVAE(latent_channels=4, width=8, multipliers=[1, 1, 2], blocks=1, norm_groups=4)


def whole(random: bool = True, **options: object) -> TwoStage:
    """A pixel model in training mode; its weights are random, also those that begin at zero."""
    torch.manual_seed(0)
    connector = ScaleShift(mean=[0.1, 0.2, 0.3, 0.4], std=[0.5, 1.0, 2.0, 1.5])
    world = WorldModel(LATENT, SPEC, backbone=small, **{"workflow": "pixel", **options})
    if random:
        for p in world.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return TwoStage(vae(), connector, world, SPEC.image_shape).train()


def batch(model: TwoStage, n: int = 2) -> LabeledImageData:
    torch.manual_seed(1)
    actions, mask = torch.randint(5, (n, 2)), torch.ones(n, 2, dtype=torch.bool)
    numbers = [fill(model.stage2.draws(model.latent_shape), 0, i) for i in range(n)]
    draws = {name: torch.stack([row[name] for row in numbers]) for name in numbers[0]}
    condition = ActionCondition(torch.rand(n, 2, 3, 16, 16), actions, mask, 5)
    return LabeledImageData(torch.rand(n, 3, 16, 16), condition, draws=draws)


def by_hand(model: TwoStage, inputs: LabeledImageData) -> tuple[Tensor, Tensor]:
    """z0_hat and the clean latent, each written out: concatenate, convolve, encode, normalise, network."""
    image, context = 2 * inputs.img - 1, 2 * inputs.condition.context - 1
    t = inputs.draws["t"].view(-1, 1, 1, 1)
    noisy = (1 - t) * image + t * inputs.draws["noise"]
    backbone, encode = model.stage2.backbone, lambda x: model.connector(model.stage1.encode(LabeledImageData(img=x))).zs
    stacked = torch.cat((context, noisy[:, None]), 1).flatten(1, 2)
    mixed = backbone.history[4](backbone.history[3](backbone.history[2](backbone.history[1](stacked))))
    return backbone.network(encode((mixed + 1) / 2), inputs.draws["t"], inputs.condition), encode(inputs.img)


def decoded(model: TwoStage, z: Tensor) -> Tensor:
    return 2 * model.stage1.decode(model.connector.reverse(Stage1Encodings(z))).xs_recon - 1


@pytest.mark.parametrize("loss_space", ["latent", "pixel", "both"])
def test_the_loss_is_the_one_that_is_written_down(loss_space: str) -> None:
    model = whole(loss_space=loss_space, residual=False, drop_condition=0.0)
    inputs = batch(model)
    z, target = by_hand(model, inputs)
    latent, pixel = (z - target).square().mean(), (decoded(model, z) - 2 * inputs.img + 1).square().mean()
    expected = {"latent": latent, "pixel": pixel, "both": latent + pixel}[loss_space]
    losses, output = model.training_loss(inputs)
    torch.testing.assert_close(losses.loss_total, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(losses.per_sample.mean(), losses.loss_total)
    assert output.zs_degraded.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("loss_space", ["latent", "pixel"])
def test_the_gradient_goes_through_the_frozen_encoder(encoder: str, loss_space: str) -> None:
    model = whole(history_encoder=encoder, loss_space=loss_space)
    model.training_loss(batch(model))[0].loss_total.backward()
    unmoved = [n for n, p in model.stage2.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert unmoved == []
    assert all(p.grad is None for p in model.stage1.parameters())


def test_an_encoder_that_cuts_the_gradient_is_refused() -> None:
    model = whole()
    encode = model.stage1.encode
    model.stage1.encode = torch.no_grad()(encode)
    with pytest.raises(BadInput, match=r"KLVAE.encode: expected gradients to flow through to the images"):
        model.training_loss(batch(model))


def test_the_autoencoder_is_in_no_state_dict_and_no_average() -> None:
    model = whole()
    own = sum(p.numel() for p in model.stage2.backbone.history.parameters())
    own += sum(p.numel() for p in model.stage2.backbone.network.parameters())
    assert sum(p.numel() for p in model.stage2.parameters()) == own
    assert not [name for name in model.stage2.state_dict() if "codec" in name or "encoder" in name]
    ema = EMA(model.stage2, 0.9)
    assert sum(x.numel() for x in ema.state_dict().values()) <= own + 64


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_untrained_model_shows_the_last_frame_as_the_autoencoder_does(encoder: str) -> None:
    model = whole(random=False, history_encoder=encoder).eval()
    condition, noise = batch(model).condition, torch.randn(2, 3, 16, 16)
    expected = model.reconstruct(condition.context[:, -1])
    torch.testing.assert_close(model.decode(model.sample(condition, noise)), expected, atol=1e-5, rtol=1e-5)


def test_the_sampler_walks_in_pixels_and_sees_where_it_is() -> None:
    """Two Euler steps written out: x moves by its own velocity, and the network is asked at the moved x."""
    model = whole(residual=False).eval()
    prepared = model.prepare(batch(model))
    condition, x = prepared.condition, torch.randn(2, 3, 16, 16)
    got = model.sample(condition, x, Sampler(steps=2)).zs_pred
    with torch.no_grad():
        for now, then in ((1.0, 0.5), (0.5, 0.0)):
            clean = decoded(model, model.stage2.backbone.latent(x, torch.full((2,), now), condition))
            x = x + (then - now) * (x - clean) / now
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["velocity", "v"])
def test_a_velocity_is_decoded_and_compared_with_noise(prediction: str) -> None:
    """The literal target of the origin, kept for comparison: a decoder is asked for noise."""
    model = whole(prediction=prediction, residual=False, loss_space="pixel", drop_condition=0.0)
    inputs = batch(model)
    z, _ = by_hand(model, inputs)
    image, noise, t = 2 * inputs.img - 1, inputs.draws["noise"], inputs.draws["t"].view(-1, 1, 1, 1)
    target = noise - image if prediction == "velocity" else (1 - t) * noise - t * image
    losses, _ = model.training_loss(inputs)
    expected = (decoded(model, z) - target).square().mean()
    torch.testing.assert_close(losses.loss_total, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(BadInput, match=r"loss_space: expected pixel for prediction v.* in the workflow pixel"):
        whole(prediction=prediction, residual=False)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_latent_workflows_may_be_compared_in_pixels(prediction: str) -> None:
    options = {"workflow": "latent_concat", "prediction": prediction, "residual": False, "drop_condition": 0.0}
    losses = {}
    for space in ("latent", "pixel", "both"):
        model = whole(loss_space=space, **options)
        inputs = batch(model)
        found, output = model.training_loss(inputs)
        losses[space] = found.loss_total
    t, x_t = inputs.draws["t"].view(-1, 1, 1, 1), output.zs_degraded
    clean = output.zs_pred if prediction == "x0" else ((1 - t) * x_t - t * output.zs_pred) / ((1 - t) ** 2 + t**2)
    pixel = (decoded(model, clean) - 2 * inputs.img + 1).square().mean()
    torch.testing.assert_close(losses["pixel"], pixel, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(losses["both"], losses["latent"] + losses["pixel"])
    with pytest.raises(BadInput, match="img: expected images"):
        model.training_loss(replace(inputs, img=None, encodings=model.codec.stage1.encode(inputs)))


def test_a_dream_in_pixels_keeps_pixels_as_its_context() -> None:
    model, generator = whole(residual=False).eval(), torch.Generator().manual_seed(0)
    frames = torch.rand(1, 2, 3, 16, 16, generator=generator)
    dream = Dream.begin(model, frames, torch.tensor([[1]]), 5)
    torch.testing.assert_close(dream.context_bkchw, 2 * frames - 1)
    shown = dream.step(torch.tensor([2]), frame_noise(model.latent_shape, 0, 0, 0)[None])
    assert dream.context_bkchw.shape == (1, 2, 3, 16, 16)
    torch.testing.assert_close(((dream.context_bkchw[:, -1] + 1) / 2).clamp(0, 1), shown)


def test_without_an_autoencoder_it_says_so() -> None:
    world = WorldModel(LATENT, SPEC, backbone=small, workflow="pixel")
    condition = ActionCondition(torch.zeros(1, 2, 3, 16, 16), torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), 5)
    with pytest.raises(BadInput, match="expected an autoencoder"):
        world.infer(LabeledImageData(condition=condition), noise=torch.zeros(1, 3, 16, 16))


def test_pixels_as_the_autoencoder_need_no_checkpoint() -> None:
    spec = replace(SPEC, image_shape=(3, 8, 8))
    torch.manual_seed(0)
    world = WorldModel((12, 4, 4), spec, backbone=small, workflow="pixel")
    model = TwoStage(PixelStage1(2), base_connector(), world, (3, 8, 8))
    assert model.latent_shape == (3, 8, 8)
    frames = torch.rand(2, 2, 3, 8, 8)
    condition = ActionCondition(frames, torch.zeros(2, 2).long(), torch.ones(2, 2).bool(), 5)
    shown = model.decode(model.sample(condition, torch.randn(2, 3, 8, 8)))
    torch.testing.assert_close(shown, frames[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_run_names_its_autoencoder_and_refuses_another(tmp_path: Path, cli, capfd) -> None:
    """`train`, then `rollout`: the checkpoint has no weight of Stage1, meta.json has its hash."""
    collect("maze-chase", 300, 32, tmp_path / "frames")
    common = {"train": {"steps": 1}, "logging": {"wandb": "disabled"}, "pictures": {"every": None}}
    config = yaml.safe_load((ROOT / "configs/maze_chase/world_model_pixel.yaml").read_text()) | common
    config["data"] |= {"batch_size": 4, "workers": 0}
    config["data"]["dataset"]["init_args"]["root"] = str(tmp_path / "frames")
    config["stage1"]["init_args"] |= {"width": 8, "multipliers": [1, 1, 1], "norm_groups": 4}
    config["stage2"]["init_args"]["backbone"]["init_args"] |= {"width": 32, "depth": 1}
    first = {k: config[k] for k in ("data", "stage1", *common)} | {"online_eval": {"every": None}}
    for name, tree in (("vae", first), ("pixel", config)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    for project, seed in (("one", 0), ("two", 1)):
        line = ["train", tmp_path / "vae.yaml", "--save-dir", tmp_path, "--project", project, "--train.seed", seed]
        assert cli(*line) == 0
    one, two = only(tmp_path / "one"), only(tmp_path / "two")
    line = ["train", tmp_path / "pixel.yaml", "--save-dir", tmp_path, "--project", "p"]
    assert cli(*line, "--stage1_checkpoint", one) == 0
    run = only(tmp_path / "p")
    meta = json.loads(next((run / "checkpoints").glob("*/meta.json")).read_text())
    stage1 = read([tmp_path / "vae.yaml"]).instantiate().stage1
    assert meta["stage1_sha256"] == load_stage1(stage1, str(one))
    assert not [p for p in (run / "checkpoints").rglob("*stage1*") if p.suffix == ".safetensors"]
    assert cli("rollout", run, "--starts", 1, "--horizon", 3, "--seeds", "0") == 0
    capfd.readouterr()
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(one), str(two)))
    assert cli("rollout", run, "--starts", 1, "--horizon", 3, "--seeds", "0") == 2
    assert "was trained on Stage1 weights" in capfd.readouterr().err


@pytest.mark.parametrize("loss_space", ["latent", "pixel", "both"])
def test_the_cost_of_a_step_is_what_torch_counts(loss_space: str) -> None:
    """The frozen autoencoder inside costs two forwards where a gradient goes through it, and one where none does.

    A DiT, as torch's counter takes the backward of a depthwise convolution for that of a full one.
    """
    backbone = "--stage2.init_args.backbone"
    options = [backbone, "rqvae.models.stage2.dit.DiT", f"{backbone}.init_args.patch", "1"]
    options += ["--stage2.init_args.loss_space", loss_space]
    run = read([str(ROOT / "configs/maze_chase/world_model_pixel.yaml")], options).instantiate()
    estimate = sum(work.flops for work in step_work(run))
    model = make_two_stage(run).train()
    assume_statistics(model)
    draws = {name: x[None] for name, x in fill(model.stage2.draws(model.latent_shape), 0, 0).items()}
    condition = ActionCondition(torch.rand(1, 4, 3, 32, 32), torch.zeros(1, 4).long(), torch.ones(1, 4).bool(), 5)
    with FlopCounterMode(display=False) as counter:
        model.training_loss(LabeledImageData(torch.rand(1, 3, 32, 32), condition, draws=draws))[0].loss_total.backward()
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.08)
