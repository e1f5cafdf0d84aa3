"""The test split through Stage1: images, grids and scores; goes on from the images that are already there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rqvae import remote
from rqvae.backends import Backend
from rqvae.errors import BadInput
from rqvae.files import replacing, write_json
from rqvae.img_datasets.interfaces import LabeledImageData
from rqvae.metrics.grids import image_grid
from rqvae.metrics.images import ImageSource
from rqvae.metrics.protocol import cautions_of_pairs, protocol
from rqvae.metrics.reconstruction import CONVENTIONS, UINT8_RULE, ReconstructionScores
from rqvae.models.interfaces import Stage1Model
from rqvae.run import AnyRun
from rqvae.trainers import checkpoint
from rqvae.trainers.evaluation_trainer import SplitWalk, as_pictures, finite_pictures, load_stage1, reconstruct
from rqvae.trainers.fetching import fetched, refresh
from rqvae.trainers.joint_start import check_shared
from rqvae.trainers.logging import add_to_wandb
from rqvae.trainers.mirror import mirror_of
from rqvae.trainers.parts import compile_planned, on_main
from rqvae.trainers.run_folder import check_can_write, make_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReconRequest:
    """What to reconstruct with, and where to.

    Args:
        folder: SAVE_DIR/RUN_NAME.
        ckpt: run or checkpoint folder; null for a model without parameters.
        resume_ckpt: the same, given where a cut-off command is repeated; another one is an error.
        wandb_id: W&B run that gets the scores, as `recon/psnr` and so on; None for none.
        grid_images: images in a grid.
        compile_plan: file that `diagnose` wrote, see `rqvae.diagnostics.plan`.
        originals: whether the images that were reconstructed are written, too, as `eval.psnr_ssims` takes them.
    """

    folder: Path
    ckpt: str | None
    resume_ckpt: str | None = None
    wandb_id: str | None = None
    grid_images: int = 16
    compile_plan: str | None = None
    originals: bool = True

    @property
    def source(self) -> str | None:
        """The checkpoint to use."""
        return self.ckpt or self.resume_ckpt


def check_request(run: AnyRun, request: ReconRequest) -> None:
    """Raise BadInput for two different checkpoints, a folder that cannot be written, or an unfit image size."""
    if request.ckpt and request.resume_ckpt and remote.absolute(request.ckpt) != remote.absolute(request.resume_ckpt):
        raise BadInput(f"CKPT {request.ckpt} and RESUME_CKPT {request.resume_ckpt} differ: expected one checkpoint")
    run.stage1.latent_shape(run.data.make("test")[0].spec.image_shape)
    check_can_write(request.folder, "SAVE_DIR")


def reconstruct_split(run: AnyRun, backend: Backend, request: ReconRequest) -> dict[str, float]:
    """Write `images/INDEX.png`, `originals/`, `grids/` and `metrics.json`; returns PSNR and SSIM of the 8-bit images.

    Image i is scored from its file, so that a run that was cut off and repeated gives the same numbers.

    Raises:
        RunFailed: reconstructions that are not finite; those of their batch are not written.
    """
    weights = load_stage1(run.stage1, request.source, "CKPT")
    stage1 = run.stage1.to(backend.device).eval()
    compile_planned(stage1, request.compile_plan, backend)
    walk = SplitWalk(run.data, "test", backend)
    on_main(backend, lambda: walk.stream and None)
    facts = {"stage1_sha256": weights, "data": walk.stream.dataset.fingerprint(), "checkpoint": request.source}
    on_main(backend, lambda: _claim(request, facts))
    check_shared(backend, request.folder)
    sums = ReconstructionScores(backend.device, backend.widest_float)
    per_step = max(1, run.data.batch_size)
    with tqdm(total=len(walk.stream), desc=request.folder.name, unit="image", disable=backend.rank > 0) as bar:
        for batch, valid in walk.batches():
            sums.update(*_through(request, stage1, batch, valid), valid)
            bar.update(min(per_step, len(walk.stream) - bar.n))
    result = ReconstructionScores.result(backend.all_reduce(sums.state()))
    scores = {name: result[name] for name in CONVENTIONS}
    on_main(backend, lambda: _finish(request, walk, stage1, scores, facts))
    return scores


def _claim(request: ReconRequest, facts: dict[str, str | None]) -> None:
    """Make the folder; refuse one that holds the images of other weights or of other data."""
    refresh(request.folder)
    note = request.folder / "stage1.json"
    held = json.loads(note.read_text()) if note.exists() else facts
    for key in ("stage1_sha256", "data"):
        if held[key] != facts[key]:
            raise BadInput(f"{request.folder}: holds reconstructions with {key} {held[key]}, expected {facts[key]}")
    for part in ("images", "grids", *(["originals"] if request.originals else [])):
        make_folder(request.folder / part, "SAVE_DIR")
    note.write_text(json.dumps(facts))


def _through(
    request: ReconRequest, stage1: Stage1Model, batch: LabeledImageData, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Reconstructions and originals (B, 3, H, W), with the files of both."""
    assert batch.sample_id is not None
    names, original = [f"{i:06d}.png" for i in batch.sample_id.tolist()], batch.require_img()
    recon = _read_or_reconstruct(stage1, batch, [request.folder / "images" / name for name in names], valid)
    if request.originals:
        _write([request.folder / "originals" / name for name in names], lambda: as_pictures(original), valid)
    return recon, original


@torch.no_grad()
def _read_or_reconstruct(stage1: Stage1Model, batch: LabeledImageData, files: list[Path], valid: Tensor) -> Tensor:
    """(B, 3, H, W): the images of an earlier call where all of the batch are there, else new ones, written."""
    original = batch.require_img()
    if all(file.exists() for file in files):
        arrays = np.stack([np.asarray(Image.open(file)) for file in files])
        return torch.from_numpy(arrays).permute(0, 3, 1, 2).to(original.device, original.dtype) / 255
    raw = stage1(LabeledImageData(img=original)).xs_recon
    recon = stage1.get_recon_imgs(raw)
    assert batch.sample_id is not None
    # those that only fill up the batch come last
    numbers = [i for i, counts in zip(batch.sample_id.tolist(), valid.tolist(), strict=True) if counts]
    _write(files, lambda: finite_pictures(recon, raw, numbers, f"{files[0].parent}: reconstructions"), valid)
    return recon


def _write(files: list[Path], pictures: Callable[[], np.ndarray], valid: Tensor) -> None:
    """The pictures (B, 3, H, W) that count, those that an earlier call wrote left as they are."""
    wanted = [counts and not file.exists() for file, counts in zip(files, valid.tolist(), strict=True)]
    if not any(wanted):
        return
    for file, picture, is_wanted in zip(files, pictures(), wanted, strict=True):
        if is_wanted:
            with replacing(file) as temporary:
                Image.fromarray(picture.transpose(1, 2, 0)).save(temporary)


def _finish(
    request: ReconRequest, walk: SplitWalk, stage1: Stage1Model, scores: dict[str, float], facts: dict[str, str | None]
) -> None:
    original = walk.first(request.grid_images).require_img()
    recon = reconstruct(stage1, original)
    error = ((recon - original).abs() * 4).clamp(max=1)
    grid = image_grid(as_pictures(torch.cat([original, recon, error])), columns=len(original))
    Image.fromarray(grid).save(request.folder / "grids" / "reconstructions.png")
    meta: dict[str, Any] = {}
    if request.source:
        meta = checkpoint.read_meta(checkpoint.find(fetched(request.source)))
    step = meta["clock"]["step"] if meta else None
    made = {"ema": meta.get("evaluate"), "precision": "float32", "uint8_rule": UINT8_RULE, "image_format": "png"}
    made["seed_rule"] = "no random numbers: the encoding's mean"
    of_originals = {**_originals(request), "n": len(walk.stream), "split": "test", "data": facts["data"]}
    skipped = getattr(walk.stream.dataset, "skipped", 0)
    convention = ", ".join(CONVENTIONS.values())
    text = {**scores, "n": len(walk.stream), "skipped": skipped, "step": step, **facts, "convention": convention}
    text["protocol"] = protocol(of_originals, len(walk.stream), {}, made)
    text["warnings"] = cautions_of_pairs(len(walk.stream))
    write_json(request.folder / "metrics.json", text)
    if mirror := mirror_of(request.folder):
        mirror.send()
    if request.wandb_id:
        add_to_wandb(request.folder, request.wandb_id, {f"recon/{name}": value for name, value in scores.items()})


def _originals(request: ReconRequest) -> dict[str, str | None]:
    """Where they are and their sha256, that of `eval.psnr_ssims`; null where they were not written."""
    if not request.originals:
        return {"path": None, "sha256": None}
    folder = request.folder / "originals"
    return {"path": str(folder), "sha256": ImageSource(folder).sha256()}
