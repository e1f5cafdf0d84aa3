"""The test split through Stage1: images, grids and scores; goes on from the images that are already there."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rqvae.backends import Backend
from rqvae.errors import BadInput
from rqvae.metrics.grids import image_grid
from rqvae.models.interfaces import Stage1Model
from rqvae.run import AnyRun
from rqvae.trainers import checkpoint
from rqvae.trainers.evaluation_trainer import SplitWalk, as_pictures, load_stage1, mean_scores, reconstruct, score_sums
from rqvae.trainers.parts import on_main

log = logging.getLogger(__name__)
METRICS = ("psnr", "ssim")


@dataclass(frozen=True)
class ReconRequest:
    """What to reconstruct with, and where to.

    Args:
        folder: SAVE_DIR/RUN_NAME.
        ckpt: run or checkpoint folder; null for a model without parameters.
        resume_ckpt: the same, given where a cut-off command is repeated; another one is an error.
        grid_images: images in a grid.
    """

    folder: Path
    ckpt: str | None
    resume_ckpt: str | None = None
    grid_images: int = 16

    @property
    def source(self) -> str | None:
        """The checkpoint to use."""
        return self.ckpt or self.resume_ckpt


def check_request(run: AnyRun, request: ReconRequest) -> None:
    """Raise BadInput for two different checkpoints, a folder that cannot be written, or an unfit image size."""
    if request.ckpt and request.resume_ckpt and Path(request.ckpt).resolve() != Path(request.resume_ckpt).resolve():
        raise BadInput(f"CKPT {request.ckpt} and RESUME_CKPT {request.resume_ckpt} differ: expected one checkpoint")
    run.stage1.latent_shape(run.data.make("test")[0].spec.image_shape)
    nearest = request.folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not os.access(nearest, os.W_OK):
        raise BadInput(f"SAVE_DIR {request.folder.parent}: expected a folder that can be written, {nearest} is not")


def reconstruct_split(run: AnyRun, backend: Backend, request: ReconRequest) -> dict[str, float]:
    """Write `images/INDEX.png`, `grids/` and `metrics.json`; returns PSNR and SSIM of the 8-bit images.

    Image i is scored from its file, so that a run that was cut off and repeated gives the same numbers.
    """
    weights = load_stage1(run.stage1, request.source, "CKPT")
    on_main(backend, lambda: _claim(request, weights))
    stage1 = run.stage1.to(backend.device).eval()
    walk = SplitWalk(run.data, "test", backend)
    images = request.folder / "images"
    sums = torch.zeros(len(METRICS) + 1, dtype=torch.float64)
    per_step = max(1, run.data.batch_size)
    bar = tqdm(total=len(walk.stream), desc=request.folder.name, unit="image", disable=backend.rank > 0)
    for batch, valid in walk.batches():
        assert batch.sample_id is not None
        ids = batch.sample_id.tolist()
        original = batch.require_img()
        recon = _read_or_reconstruct(stage1, original, [images / f"{i:06d}.png" for i in ids], valid)
        sums += score_sums(recon, original, valid, METRICS).cpu()
        bar.update(min(per_step, len(walk.stream) - bar.n))
    bar.close()
    scores = mean_scores(backend.all_reduce(sums.to(backend.device)), METRICS, "")
    on_main(backend, lambda: _finish(request, walk, stage1, scores, weights))
    return scores


def _claim(request: ReconRequest, weights: str) -> None:
    """Make the folder; refuse one that holds the images of other weights."""
    (request.folder / "images").mkdir(parents=True, exist_ok=True)
    (request.folder / "grids").mkdir(exist_ok=True)
    note = request.folder / "stage1.json"
    if note.exists() and (held := json.loads(note.read_text())["stage1_sha256"]) != weights:
        raise BadInput(f"{request.folder}: holds reconstructions of other weights ({held[:12]}, not {weights[:12]})")
    note.write_text(json.dumps({"stage1_sha256": weights, "checkpoint": request.source}))


def _read_or_reconstruct(stage1: Stage1Model, original: Tensor, files: list[Path], valid: Tensor) -> Tensor:
    """(B, 3, H, W): the images of an earlier call where all of the batch are there, else new ones, written."""
    if all(file.exists() for file in files):
        arrays = np.stack([np.asarray(Image.open(file)) for file in files])
        return torch.from_numpy(arrays).permute(0, 3, 1, 2).to(original.device, original.dtype) / 255
    recon = reconstruct(stage1, original)
    for file, picture, counts in zip(files, as_pictures(recon), valid.tolist(), strict=True):
        if counts:
            temporary = file.with_suffix(".tmp")
            Image.fromarray(picture.transpose(1, 2, 0)).save(temporary, format="png")
            os.replace(temporary, file)
    return recon


def _finish(
    request: ReconRequest, walk: SplitWalk, stage1: Stage1Model, scores: dict[str, float], weights: str
) -> None:
    original = walk.first(request.grid_images).require_img()
    recon = reconstruct(stage1, original)
    error = ((recon - original).abs() * 4).clamp(max=1)
    grid = image_grid(as_pictures(torch.cat([original, recon, error])), columns=len(original))
    Image.fromarray(grid).save(request.folder / "grids" / "reconstructions.png")
    step = None
    if request.source:
        step = checkpoint.read_meta(checkpoint.find(Path(request.source)))["clock"]["step"]
    facts = {"n": len(walk.stream), "step": step, "checkpoint": request.source, "stage1_sha256": weights}
    text = json.dumps({**scores, **facts, "convention": "psnr_rgb_u8, ssim_wang_rgb_u8"}, indent=1)
    (request.folder / "metrics.json").write_text(text)
