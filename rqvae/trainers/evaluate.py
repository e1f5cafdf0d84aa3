"""A trained autoencoder on a split: errors, KL, scores and samples beside the model's folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rqvae.backends import Backend
from rqvae.errors import BadInput
from rqvae.files import replacing, write_json, write_whole
from rqvae.img_datasets.interfaces import LabeledImageData, Split
from rqvae.metrics.grids import image_grid
from rqvae.metrics.protocol import cautions_of_pairs, protocol
from rqvae.metrics.reconstruction import CONVENTIONS, UINT8_RULE, ReconstructionScores, to_uint8
from rqvae.models.interfaces import Stage1Model
from rqvae.models.stage1.posterior import diagonal_kl
from rqvae.run import AnyRun
from rqvae.trainers.evaluation_trainer import SplitWalk, as_pictures, load_stage1
from rqvae.trainers.run_folder import make_folder

VAE = "vae"


@dataclass(frozen=True)
class EvaluateRequest:
    """What to evaluate.

    Args:
        checkpoint: `final_model` folder with vae/ in diffusers' format, such a folder itself, or a run or checkpoint.
        split: of the config's dataset.
        samples: images whose reconstructions are written.
        batch_size: images of a batch.
        max_images: images of the split, 0 for all.
    """

    checkpoint: Path
    split: Split = "test"
    samples: int = 10
    batch_size: int = 8
    max_images: int = 0

    def __post_init__(self) -> None:
        if self.samples < 0 or self.batch_size < 1 or self.max_images < 0:
            raise BadInput(
                "--num-samples-to-save, --batch-size, --max-images: expected at least 0, 1, 0, got "
                f"{self.samples}, {self.batch_size}, {self.max_images}"
            )
        if not self.checkpoint.is_dir():
            raise BadInput(f"--checkpoint-path {self.checkpoint}: expected a folder, there is none")

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.checkpoint / f"eval_results_{self.split}"

    @property
    def diffusers_folder(self) -> Path | None:
        """The model in diffusers' format; None for a run or a checkpoint."""
        places = [path for path in (self.checkpoint / VAE, self.checkpoint) if (path / "config.json").exists()]
        return places[0] if places else None


def evaluate(run: AnyRun, backend: Backend, request: EvaluateRequest) -> dict[str, float]:
    """Write eval_metrics.json, eval_metrics.txt and samples/; one process.

    Returns:
        `mse`, mean squared error of images in [0, 1], not clamped or rounded; `kl`, nats an image, of a model with a
        posterior; `psnr` and `ssim` of 8-bit images; `n` images.
    """
    stage1, where = _model(run, request)
    stage1 = stage1.to(backend.device).eval()
    walk = SplitWalk(replace(run.data, batch_size=request.batch_size), request.split, backend)
    stage1.latent_shape(walk.stream.dataset.spec.image_shape)
    make_folder(request.folder / "samples", "--checkpoint-path")
    scores = ReconstructionScores(backend.device, backend.widest_float)
    sums = torch.zeros(2, dtype=backend.widest_float, device=backend.device)
    has_kl, saved, digest = False, 0, hashlib.sha256()
    for batch, valid_b in walk.batches(request.max_images):
        images, raw, kl_b = _reconstruct(stage1, batch)
        scores.update(stage1.get_recon_imgs(raw), images, valid_b)
        digest.update(to_uint8(images)[valid_b].cpu().numpy().tobytes())
        mse_b = (raw - images).to(sums.dtype).square().flatten(1).mean(1)
        has_kl = kl_b is not None
        rows = torch.stack([mse_b, torch.zeros_like(mse_b) if kl_b is None else kl_b.to(sums.dtype)])
        sums += torch.where(valid_b, rows, torch.zeros_like(rows)).sum(1)
        if saved < request.samples:
            saved = _save(request, stage1.get_recon_imgs(raw), images, int(valid_b.sum()), saved)
    found = ReconstructionScores.result(scores.state())
    mse, kl = (sums / found["n"]).tolist()
    result = {"mse": mse, **({"kl": kl} if has_kl else {}), **found}
    facts = {"model": where, "data": walk.stream.dataset.fingerprint()}
    _write(request, result, facts, _protocol(facts["data"], request.split, digest.hexdigest(), int(found["n"])))
    return result


def _protocol(data: str, split: Split, sha256: str, n: int) -> dict[str, Any]:
    """What the scores are of; `sha256` of the originals' 8-bit levels (N, 3, H, W), which have no file of their own."""
    originals = {"path": None, "sha256": sha256, "n": n, "split": split, "data": data}
    made = {"precision": "float32", "uint8_rule": UINT8_RULE, "image_format": "none: scored in memory"}
    made["seed_rule"] = "no random numbers: the encoding's mean"
    return protocol(originals, n, {}, made)


def _model(run: AnyRun, request: EvaluateRequest) -> tuple[Stage1Model, str]:
    if (folder := request.diffusers_folder) is None:
        return run.stage1, load_stage1(run.stage1, str(request.checkpoint), "--checkpoint-path")
    from rqvae.models.stage1.diffusers_vae import AutoencoderKLStage1  # diffusers takes seconds to import

    return AutoencoderKLStage1(source=str(folder)), str(folder)


@torch.no_grad()
def _reconstruct(stage1: Stage1Model, batch: LabeledImageData) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images, reconstructions (B, 3, H, W) from the posterior's mean, and the KL (B,) where there is a posterior."""
    images = batch.require_img()
    output = stage1(LabeledImageData(img=images))
    moments = output.additional_attr or {}
    if "logvar" not in moments:
        return images, output.xs_recon, None
    pairs = zip(moments["mu"], moments["logvar"], strict=True)
    return images, output.xs_recon, torch.stack([diagonal_kl(mu[None], logvar[None]) for mu, logvar in pairs])


def _save(request: EvaluateRequest, recon: Tensor, images: Tensor, valid: int, saved: int) -> int:
    """Write original beside reconstruction of the batch's first images; how many are there now."""
    count = min(valid, request.samples - saved)
    for i in range(count):
        pair = image_grid(as_pictures(torch.stack([images[i], recon[i]])), columns=2)
        with replacing(request.folder / "samples" / f"sample_{saved + i:04d}.png") as temporary:
            Image.fromarray(pair).save(temporary)
    return saved + count


def _write(request: EvaluateRequest, result: dict[str, float], facts: dict[str, str], fields: dict[str, Any]) -> None:
    units = {"mse": "image units [0, 1], mean over pixels and images", "kl": "nats, sum over an image's latent"}
    conventions = {**CONVENTIONS, **{name: text for name, text in units.items() if name in result}}
    content: dict[str, Any] = {**result, "split": request.split, **facts, "convention": conventions}
    content |= {"protocol": fields, "warnings": cautions_of_pairs(fields["n"])}
    write_json(request.folder / "eval_metrics.json", content)
    lines = [f"{name}: {value:.6g}" for name, value in result.items()]
    write_whole(request.folder / "eval_metrics.txt", "\n".join(lines) + "\n")
