"""`KLVAE` exported to diffusers and back, against diffusers' own loading and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from rqvae.errors import BadInput
from rqvae.models.interfaces import LabeledImageData
from rqvae.models.stage1.diffusers_vae import AutoencoderKLStage1
from rqvae.models.stage1.kl_vae import KLVAE
from rqvae.models.stage1.kl_vae_export import from_diffusers, to_diffusers
from tests.test_diffusers_vae import KL, close, images, saved, scaled


def small_vae(**changes: Any) -> KLVAE:
    torch.manual_seed(3)
    sizes = {"width": 8, "multipliers": [1, 2, 3], "blocks": 2, "norm_groups": 4, "latent_channels": 3}
    vae = KLVAE(**{**sizes, **changes})
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return vae.eval()


@pytest.mark.parametrize(
    "changes", [{}, {"attention": False}, {"multipliers": [3, 2], "blocks": 1}, {"multipliers": [1]}]
)
@torch.no_grad()
def test_an_exported_vae_is_the_same_function_in_diffusers_and_back(changes: dict[str, Any], tmp_path: Path) -> None:
    vae = small_vae(**changes)
    to_diffusers(vae, tmp_path / "out")
    names = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    theirs: Any = AutoencoderKL.from_pretrained(tmp_path / "out", use_safetensors=True)  # type: ignore[attr-defined]
    ours = vae.encode(LabeledImageData(img=images()))
    posterior = theirs.encode(2 * images() - 1).latent_dist
    assert ours.additional_attr is not None
    close(ours.additional_attr["mu"], posterior.mean)
    close(ours.additional_attr["logvar"], posterior.logvar)
    close(2 * vae.decode(ours).xs_recon - 1, theirs.decode(ours.zs).sample)
    back = from_diffusers(tmp_path / "out")
    state = back.state_dict()
    assert state.keys() == vae.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in vae.state_dict().items())
    assert torch.equal(back.decode(ours).xs_recon, vae.decode(ours).xs_recon)
    wrapped = AutoencoderKLStage1(source=str(tmp_path / "out"))
    close(wrapped(LabeledImageData(img=images())).xs_recon, vae(LabeledImageData(img=images())).xs_recon)
    assert wrapped.latent_statistics() is None


def test_statistics_travel_with_the_export(tmp_path: Path) -> None:
    mean_c, std_c = torch.tensor([0.1, -2.0, 3.0]), torch.tensor([0.5, 1.0, 7.0])
    to_diffusers(small_vae(), tmp_path, mean_c=mean_c, std_c=std_c)
    zs, normalised, _ = scaled(AutoencoderKLStage1(source=str(tmp_path)))
    close(normalised, (zs - mean_c.view(-1, 1, 1)) / std_c.view(-1, 1, 1))


class Other(KLVAE):
    """Layers of its own."""


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="expected a KLVAE, the only model with a form in diffusers, got Other"):
        to_diffusers(Other(width=8, norm_groups=4), tmp_path / "new")
    with pytest.raises(BadInput, match=r"export: std_c: expected a tensor of shape \(3,\), got None"):
        to_diffusers(small_vae(), tmp_path / "new", mean_c=torch.zeros(3))
    (tmp_path / "note").write_text("")
    with pytest.raises(BadInput, match="expected a new or empty folder to export to"):
        to_diffusers(small_vae(), tmp_path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_quant_conv": False}, "use_quant_conv: expected True, the layers of KLVAE, got False"),
        ({"act_fn": "relu"}, "act_fn: expected silu, the layers of KLVAE, got relu"),
        ({"in_channels": 1}, "in_channels: expected 3, the layers of KLVAE, got 1"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "down_block_types: expected"),
    ],
)
def test_layers_that_klvae_does_not_have_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, AutoencoderKL, {**KL, **changes})
    with pytest.raises(BadInput, match=message):
        from_diffusers(tmp_path)


def test_files_from_before_the_attention_was_renamed_load(tmp_path: Path) -> None:
    """The published sd-vae-ft-mse has query, key, value and proj_attn."""
    reference = saved(tmp_path, AutoencoderKL, KL).state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, value in reference.items():
        for new_name, old_name in old.items():
            key = key.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
        tensors[key] = value
    assert sum(".query." in key for key in tensors) == 4
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    loaded = AutoencoderKLStage1(source=str(tmp_path)).vae.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in reference.items())
