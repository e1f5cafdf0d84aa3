"""Stage1 models of diffusers against diffusers itself, and their latent scale against its pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from rqvae.configuration import Configuration, read
from rqvae.errors import BadInput
from rqvae.models.connectors import ScaleShift
from rqvae.models.interfaces import LabeledImageData, Stage1Model, Stage2Model
from rqvae.models.stage1 import diffusers_source
from rqvae.models.stage1.diffusers_vae import (
    AutoencoderDCStage1,
    AutoencoderKLStage1,
    AutoencoderTinyStage1,
    DiffusersStage1,
)
from rqvae.models.two_stage import TwoStage
from rqvae.trainers.assembly import check
from rqvae.trainers.stage2_trainer import make_two_stage

KL: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 3,
}
DC: dict[str, Any] = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16),
    "decoder_block_out_channels": (8, 16),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "scaling_factor": 0.41407,
}
TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
}
KINDS: dict[str, tuple[Any, type[DiffusersStage1], dict[str, Any], int]] = {
    "kl": (AutoencoderKL, AutoencoderKLStage1, KL, 2),
    "dc": (AutoencoderDC, AutoencoderDCStage1, DC, 2),
    "tiny": (AutoencoderTiny, AutoencoderTinyStage1, TINY, 4),
}


def saved(folder: Path, kind: Any, config: dict[str, Any]) -> Any:
    """A random model of diffusers, written to the folder; its weights are away from their initial 0 and 1."""
    torch.manual_seed(0)
    model = kind(**config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder, safe_serialization=True)
    return model.eval()


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def images(dtype: torch.dtype = torch.float32, size: tuple[int, int] = (16, 24)) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def batch_of(model: Stage1Model) -> LabeledImageData:
    rng = torch.Generator().manual_seed(2)
    draws = {name: draw.law((2, *draw.shape), generator=rng) for name, draw in model.draws((3, 16, 24)).items()}
    return LabeledImageData(img=images(), draws=draws)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- the wrappers against direct calls ----


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_encode_and_decode_are_those_of_diffusers_in_our_units(name: str, tmp_path: Path) -> None:
    kind, wrapper, config, factor = KINDS[name]
    reference = saved(tmp_path, kind, config)
    model = wrapper(source=str(tmp_path))  # type: ignore[call-arg]
    assert model.pretrained
    encoded = reference.encode(2 * images() - 1)
    expected_zs = {"kl": "latent_dist", "dc": "latent", "tiny": "latents"}[name]
    expected = getattr(encoded, expected_zs)
    expected = expected.mode() if name == "kl" else expected
    encodings = model.encode(LabeledImageData(img=images()))
    close(encodings.zs, expected)
    assert tuple(expected.shape[1:]) == model.latent_shape((3, 16, 24))
    assert model.factor == factor
    close(2 * model.decode(encodings).xs_recon - 1, reference.decode(expected).sample)
    assert torch.equal(model(LabeledImageData(img=images())).xs_recon, model.decode(encodings).xs_recon)


@torch.no_grad()
def test_the_draw_samples_the_posterior_and_the_kl_is_that_of_torch(tmp_path: Path) -> None:
    posterior = saved(tmp_path, AutoencoderKL, KL).encode(2 * images() - 1).latent_dist
    model = AutoencoderKLStage1(source=str(tmp_path), kl_weight=0.5, recon="l2")
    batch = batch_of(model)
    assert batch.draws is not None
    close(model.encode(batch).zs, posterior.mean + posterior.std * batch.draws["posterior"])
    output = model(batch)
    losses = model.compute_loss(output, batch)
    kl = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    close(losses.loss_latent, 0.5 * kl, 1e-4)
    close(losses.loss_recon, nn.functional.mse_loss(output.xs_recon, images()))
    still = AutoencoderKLStage1(source=str(tmp_path), sample_posterior=False)
    assert still.draws((3, 16, 24)) == {}
    close(still.encode(batch).zs, posterior.mean)


@pytest.mark.parametrize("name", KINDS)
def test_a_training_step_moves_every_weight(name: str, tmp_path: Path) -> None:
    kind, wrapper, config, _ = KINDS[name]
    saved(tmp_path, kind, config)
    model = wrapper(source=str(tmp_path), kl_weight=1e-3) if name == "kl" else wrapper(source=str(tmp_path))  # type: ignore[call-arg]
    batch, before = batch_of(model), {k: v.clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    losses = model.compute_loss(model(batch), batch)
    losses.loss_total.backward()
    optimizer.step()
    assert [k for k, v in model.named_parameters() if torch.equal(v, before[k])] == []
    after = model.compute_loss(model(batch), batch)
    assert after.loss_total < losses.loss_total


@pytest.mark.parametrize("name", KINDS)
def test_the_last_layer_makes_the_pixels(name: str, tmp_path: Path) -> None:
    """Zeroing its weight makes an image that is constant but for the bias."""
    kind, wrapper, config, _ = KINDS[name]
    saved(tmp_path, kind, config)
    model = wrapper(source=str(tmp_path))  # type: ignore[call-arg]
    assert model.get_last_layer().shape[0] == 3
    with torch.no_grad():
        model.get_last_layer().zero_()
        xs_recon = model(LabeledImageData(img=images())).xs_recon
    close(xs_recon, xs_recon[:, :, :1, :1].expand_as(xs_recon))


@pytest.mark.parametrize("name", KINDS)
def test_sides_that_do_not_divide_are_refused(name: str, tmp_path: Path) -> None:
    kind, wrapper, config, factor = KINDS[name]
    saved(tmp_path, kind, config)
    model = wrapper(source=str(tmp_path))  # type: ignore[call-arg]
    with pytest.raises(
        BadInput, match=f"image size 16x15 is not divisible by the factor {factor} of {wrapper.__name__}"
    ):
        model.encode(LabeledImageData(img=images(size=(16, 15))))


def test_the_factor_of_a_deep_compression_model_that_starts_with_a_downsampling(tmp_path: Path) -> None:
    config = {**DC, "encoder_layers_per_block": (0, 1), "decoder_layers_per_block": (0, 1)}
    reference = saved(tmp_path, AutoencoderDC, config)
    model = AutoencoderDCStage1(source=str(tmp_path))
    assert tuple(reference.encode(images()).latent.shape[1:]) == model.latent_shape((3, 16, 24)) == (8, 8, 12)
    assert model(LabeledImageData(img=images())).xs_recon.shape == images().shape


# ---- the latent's scale ----


class Recorder(Stage2Model):
    """A generator that is not asked for anything."""


# What the pipelines of Stable Diffusion 1, 3 and XL write between encoder and denoiser.
SCALES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "default": ({}, lambda z: z * 0.18215),
    "sd3": ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, lambda z: (z - 0.0609) * 1.5305),
    "sdxl": (
        {"scaling_factor": 0.5, "latents_mean": [-1.6, 1.9, 2.5], "latents_std": [8.4, 5.9, 1.1]},
        lambda z: (
            (z - torch.tensor([-1.6, 1.9, 2.5]).view(1, 3, 1, 1)) * 0.5 / torch.tensor([8.4, 5.9, 1.1]).view(1, 3, 1, 1)
        ),
    ),
    "unknown": ({"scaling_factor": None}, lambda z: z),
}


def scaled(model: Stage1Model) -> tuple[Tensor, Tensor, ScaleShift]:
    """Stage1's latent and Stage2's, through the call that training makes."""
    connector = ScaleShift()
    spec = SimpleNamespace(image_shape=(3, 16, 24))
    run: Any = SimpleNamespace(
        stage1=model,
        connector=connector,
        stage2=lambda shape, spec: Recorder(),
        data=SimpleNamespace(make=lambda split: [SimpleNamespace(spec=spec)]),
        train=SimpleNamespace(seed=0),
    )
    make_two_stage(run)
    two_stage = make_two_stage(run)  # a run that builds its model twice has still one source of scale
    assert isinstance(two_stage, TwoStage)
    assert not any(p.requires_grad for p in two_stage.stage1.parameters())
    zs = model.encode(LabeledImageData(img=images())).zs
    if connector.needs_statistics():
        return zs, zs, connector
    prepared = two_stage.prepare(LabeledImageData(img=images())).encodings
    assert prepared is not None
    close(connector.reverse(prepared).zs, zs)
    return zs, prepared.zs, connector


@pytest.mark.parametrize("name", SCALES)
def test_scale_shift_does_what_the_pipelines_write_by_hand(name: str, tmp_path: Path) -> None:
    changes, expected = SCALES[name]
    saved(tmp_path, AutoencoderKL, {**KL, **changes})
    zs, normalised, connector = scaled(AutoencoderKLStage1(source=str(tmp_path)))
    close(normalised, expected(zs))
    assert connector.needs_statistics() == (name == "unknown")


def test_scale_shift_of_the_other_kinds(tmp_path: Path) -> None:
    saved(tmp_path / "dc", AutoencoderDC, DC)
    zs, normalised, _ = scaled(AutoencoderDCStage1(source=str(tmp_path), subfolder="dc"))
    close(normalised, zs * 0.41407)
    saved(tmp_path / "tiny", AutoencoderTiny, TINY)
    zs, normalised, _ = scaled(AutoencoderTinyStage1(source=str(tmp_path), subfolder="tiny"))
    close(normalised, zs)


def stage2_run(folder: Path, connector: dict[str, Any], **init_args: object) -> Configuration:
    """The debug configuration of a generator, on a small AutoencoderKL."""
    saved(folder / "kl", AutoencoderKL, KL)
    name = f"{AutoencoderKLStage1.__module__}.AutoencoderKLStage1"
    changes = {
        "stage1": {"class_path": name, "init_args": {"source": str(folder / "kl"), **init_args}},
        "connector": {"class_path": "rqvae.models.connectors.scale_shift.ScaleShift", "init_args": connector},
    }
    (folder / "changes.yaml").write_text(json.dumps(changes))
    return read(["configs/debug/stage2.yaml", str(folder / "changes.yaml")])


def test_a_config_is_checked_without_a_run_with_weights_and_scale(tmp_path: Path) -> None:
    """The trainer builds everything on meta tensors before it starts."""
    configuration = stage2_run(tmp_path, {})
    run: Any = configuration.instantiate("meta")
    assert all(p.is_meta for p in run.stage1.parameters())
    for _ in range(2):
        check(run, 1)
    assert not any(p.is_meta for p in configuration.instantiate().stage1.parameters())
    given: Any = stage2_run(tmp_path, {"mean": [0, 0, 0], "std": [1, 1, 1]}).instantiate("meta")
    with pytest.raises(BadInput, match=r"^connector.mean, connector.std: expected null"):
        check(given, 1)
    with pytest.raises(BadInput, match=r"changes.yaml: .*expected finite numbers > 0 .* channels \[2\]"):
        stage2_run(tmp_path, {"mean": [0, 0, 0], "std": [1, 1, 0]}).instantiate("meta")
    with pytest.raises(BadInput, match=r"changes.yaml: stage1.revision: expected null for the local folder"):
        stage2_run(tmp_path, {}, revision="main").instantiate("meta")


def test_a_second_source_of_scale_is_refused() -> None:
    mean_c, std_c = torch.zeros(2, dtype=torch.float64), torch.full((2,), 5.0, dtype=torch.float64)
    given = ScaleShift(mean=[0, 0], std=[5, 5])
    with pytest.raises(BadInput, match=r"^connector.mean, connector.std: expected null, as Stage1's own config gives"):
        given.use_latent_scale(mean_c, std_c)
    connector = ScaleShift()
    connector.use_latent_scale(mean_c, std_c)
    connector.load_state_dict(connector.state_dict())
    with pytest.raises(BadInput, match="got statistics although Stage1's own config gives them"):
        connector.set_statistics(mean_c, std_c)
    estimated = ScaleShift()
    estimated.set_statistics(mean_c, std_c + 1)
    with pytest.raises(BadInput, match=r"connector.std: .* in an estimate or a checkpoint and .* Stage1's own config"):
        estimated.use_latent_scale(mean_c, std_c)
    with pytest.raises(BadInput, match=r"in Stage1's own config and .* in the checkpoint"):
        connector.load_state_dict(estimated.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": 0}, "scaling_factor: expected a finite number > 0, got 0"),
        ({"scaling_factor": None, "shift_factor": 1.0}, "scaling_factor: expected a finite number > 0, got None"),
        ({"latents_mean": [1, 2, 3]}, "expected latents_mean and latents_std together or neither"),
        ({"latents_mean": [1, 2], "latents_std": [1, 2]}, r"latents_mean: expected 3 numbers, got shape \(2,\)"),
        ({"latents_mean": [1] * 3, "latents_std": [1] * 3, "shift_factor": 0.1}, "expected one shift of the latent"),
        ({"_class_name": "AutoencoderDC"}, "expected _class_name AutoencoderKL, got 'AutoencoderDC'"),
        ({"norm_num_groups": 3}, "expected an AutoencoderKL that diffusers can load, got: "),
        ({"layers_per_block": 2}, r"got \d+ missing keys, first decoder.up_blocks.0.resnets.2.conv1.bias"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, AutoencoderKL, KL)
    edit_config(tmp_path, **changes)
    with pytest.raises(BadInput, match=message) as caught:
        AutoencoderKLStage1(source=str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- where the weights come from ----


def test_weights_are_safetensors_and_complete(tmp_path: Path) -> None:
    saved(tmp_path, AutoencoderKL, KL)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(BadInput, match="expected an AutoencoderKL that diffusers can load"):
        AutoencoderKLStage1(source=str(tmp_path))
    save_file({**tensors, "extra": torch.zeros(1)}, weights)
    with pytest.raises(BadInput, match="got 1 unexpected keys, first extra"):
        AutoencoderKLStage1(source=str(tmp_path))
    weights.unlink()
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(
        BadInput, match=r"expected diffusion_pytorch_model.safetensors \(pickled weights are not read\)"
    ):
        AutoencoderKLStage1(source=str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config.json: expected a JSON object, got Expecting"):
        AutoencoderKLStage1(source=str(tmp_path))
    with pytest.raises(BadInput, match=r"vae/config.json: expected the configuration of a diffusers autoencoder"):
        AutoencoderKLStage1(source=str(tmp_path), subfolder="vae")
    with pytest.raises(BadInput, match=r"stage1.source: expected a folder or a hub id .* which does not exist"):
        AutoencoderKLStage1(source=str(tmp_path / "absent"))
    with pytest.raises(BadInput, match=r"stage1.revision: expected null for the local folder"):
        AutoencoderKLStage1(source=str(tmp_path), revision="main")


def test_sharded_weights_and_a_cached_hub_repository_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = saved(tmp_path / "one", AutoencoderKL, KL)
    snapshot = tmp_path / "hub/models--someone--vae/snapshots" / ("0" * 40)
    reference.save_pretrained(snapshot / "vae", max_shard_size="20KB", safe_serialization=True)
    assert len(list((snapshot / "vae").glob("*-of-*.safetensors"))) > 1
    refs = tmp_path / "hub/models--someone--vae/refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = AutoencoderKLStage1(source="someone/vae", subfolder="vae")
    expected = reference.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.vae.state_dict().items())


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(BadInput, match=r"expected stabilityai/sd-vae-ft-mse from the Hugging Face hub") as caught:
        AutoencoderKLStage1(source="stabilityai/sd-vae-ft-mse")
    message = str(caught.value)
    assert "a folder with config.json and diffusion_pytorch_model.safetensors" in message
    assert "\n" not in message
    assert "hf_secret" not in message
    with pytest.raises(BadInput, match=r"expected a folder or a hub id owner/name, got 'a/b/c'"):
        AutoencoderKLStage1(source="a/b/c")


@pytest.mark.parametrize(("kind", "status"), [(RepositoryNotFoundError, 401), (GatedRepoError, 403)])
def test_a_repository_that_may_not_be_read_names_the_token_variable(
    kind: Any, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **options: object) -> str:
        error = kind.__new__(kind)
        error.response = SimpleNamespace(status_code=status)
        raise error

    monkeypatch.setattr(diffusers_source, "snapshot_download", refused)
    with pytest.raises(BadInput, match=r"got someone/vae \(not found, private or gated\): .* set HF_TOKEN, or give"):
        AutoencoderKLStage1(source="someone/vae")


def test_the_constructor_is_the_schema(tmp_path: Path) -> None:
    saved(tmp_path, AutoencoderTiny, TINY)
    parser = ArgumentParser()
    parser.add_argument("--stage1", type=Stage1Model)
    name = f"{AutoencoderTinyStage1.__module__}.AutoencoderTinyStage1"
    config = parser.parse_object({"stage1": {"class_path": name, "init_args": {"source": str(tmp_path)}}})
    assert isinstance(parser.instantiate(config).stage1, AutoencoderTinyStage1)
