"""Samples of a trained generator on all ranks: the same images for any world size, resumable, with their provenance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rqvae.backends import Backend
from rqvae.diffusion.guidance import Interval
from rqvae.diffusion.sampling import Sampler
from rqvae.errors import BadInput
from rqvae.files import read_json, replacing, write_json
from rqvae.img_datasets.interfaces import ActionCondition, ClassCondition, Condition, DataSpec
from rqvae.mask_colours import coloured
from rqvae.metrics.images import MASKS, PROVENANCE
from rqvae.metrics.reconstruction import UINT8_RULE
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import generator, normal
from rqvae.trainers import checkpoint
from rqvae.trainers.evaluation_trainer import finite_pictures
from rqvae.trainers.painted_masks import masks_in, masks_in_turn
from rqvae.trainers.parts import on_main
from rqvae.trainers.run_folder import make_folder


@dataclass(frozen=True)
class SampleRequest:
    """What to sample, and where to.

    Args:
        out: a folder of PNGs, or an ADM `.npz`: `arr_0` uint8 (N, H, W, 3) and `arr_1` labels (N,).
        num: how many images.
        labels: classes or actions to take in turn; empty takes all in turn, so that their counts differ by one at most.
        seed: image i is a function of (seed, i).
        batch_size: images of one forward; batch k is computed by rank k modulo world size.
        masks: a PNG or a folder of them, taken in turn, for a model on masks; they go to `out`/masks, coloured.
    """

    out: Path
    num: int
    labels: tuple[int, ...] = ()
    seed: int = 0
    batch_size: int = 64
    masks: Path | None = None

    def __post_init__(self) -> None:
        for name, value in (("--num", self.num), ("--batch-size", self.batch_size)):
            if value < 1:
                raise BadInput(f"{name}: expected at least 1, got {value}")

    @property
    def parts(self) -> Path:
        """Where finished batches wait."""
        return self.out.with_name(f"{self.out.name}.parts")

    @property
    def note(self) -> Path:
        """The JSON with how the images were made."""
        return self.out.with_suffix(".json") if self.out.suffix == ".npz" else self.out / PROVENANCE


def labels_of(spec: DataSpec, request: SampleRequest) -> Tensor | None:
    """(N,) int64 labels of all images, or None for data without classes and actions."""
    count = spec.num_classes or spec.num_actions
    if not count:
        if request.labels:
            raise BadInput("--class: expected none, the model has no classes")
        return None
    if wrong := [label for label in request.labels if not 0 <= label < count]:
        raise BadInput(f"--class: expected numbers in [0, {count - 1}], got {wrong[0]}")
    choices = torch.tensor(request.labels or range(count))
    return choices[torch.arange(request.num) % len(choices)]


def masks_of(spec: DataSpec, request: SampleRequest) -> list[Path]:
    """The mask files of a model on masks; none for others."""
    if bool(spec.num_mask_classes) != (request.masks is not None):
        wanted = "a PNG or a folder of masks, the model is" if spec.num_mask_classes else "none, the model is not"
        raise BadInput(f"--masks: expected {wanted} on masks, got {request.masks or 'none'}")
    return [] if request.masks is None else masks_in(request.masks)


def condition_of(spec: DataSpec, labels_b: Tensor | None) -> Condition | None:
    """The condition of a batch of labels (B,); an action is that of the last history slot, earlier ones are missing."""
    if labels_b is None:
        return None
    if spec.num_classes:
        return ClassCondition(labels_b, spec.num_classes)
    if spec.context:
        raise BadInput("sample: expected a model of single images, this one continues frames (python -m rqvae rollout)")
    slots = max(1, spec.history)
    actions_bk = torch.full((len(labels_b), slots), spec.num_actions)
    actions_bk[:, -1] = labels_b
    return ActionCondition(None, actions_bk, actions_bk != spec.num_actions, spec.num_actions)


def noise_of(shape: tuple[int, ...], seed: int, first: int, count: int) -> Tensor:
    """(count, C, h, w) noise of the images from `first` on; each depends on (seed, its number) alone."""
    return torch.stack([normal(shape, generator=generator(seed, "sample", i)) for i in range(first, first + count)])


def sampler_facts(sampler: Sampler | None) -> dict[str, Any]:
    """What a published score must say of a sampler; None for a model that has its own way to sample."""
    guidance = None if sampler is None else sampler.guidance
    interval = [guidance.start, guidance.end] if isinstance(guidance, Interval) else None
    return {
        "cfg_scale": getattr(guidance, "scale", None),
        "cfg_interval": interval,
        "sampler": None if sampler is None else getattr(sampler.solver, "__name__", repr(sampler.solver)),
        "steps": None if sampler is None else sampler.steps,
    }


def generate(
    two_stage: TwoStage,
    spec: DataSpec,
    sampler: Sampler,
    backend: Backend,
    request: SampleRequest,
    source: dict[str, Any],
) -> dict[str, Any]:
    """Write the images and, beside them, a JSON with how they were made; returns it. Every rank calls it.

    A call that was cut off and is repeated goes on with the batches that are missing; one that is done is left alone.
    Batches have one shape, so the images do not depend on the number of ranks.

    Raises:
        BadInput: `out` holds something else.
        RunFailed: images that are not finite; nothing of their batch is written.
    """
    labels, masks = labels_of(spec, request), masks_of(spec, request)
    facts = {
        **source,
        **({"masks": [file.name for file in masks]} if masks else {}),
        "num": request.num,
        "labels": "none" if labels is None else f"in turn from {list(request.labels) or 'all'}",
        "seed": request.seed,
        "batch_size": request.batch_size,
        "solver": getattr(sampler.solver, "__name__", str(sampler.solver)),
        "steps": sampler.steps,
        "shift": sampler.shift,
        "start": sampler.start,
        "guidance": repr(sampler.guidance),
        "uint8": UINT8_RULE,
    }
    facts["protocol"] = {
        "labels_policy": facts["labels"],
        **sampler_facts(sampler),
        "seed_rule": f"noise of image i is a function of ({request.seed}, i)",
        "ema": source.get("weights"),
        "precision": str(next(two_stage.stage2.parameters()).dtype).removeprefix("torch."),
        "uint8_rule": UINT8_RULE,
    }
    if done := on_main(backend, lambda: _claim(request, facts)):
        return done
    for k, first in _batches(request, backend):
        part = request.parts / f"{k:06d}.npy"
        if part.exists():
            continue
        chosen = None if labels is None else labels[torch.arange(first, first + request.batch_size) % len(labels)]
        if masks:
            condition: Condition | None = masks_in_turn(masks, spec, first, request.batch_size)
        else:
            condition = condition_of(spec, chosen)
        noise = noise_of(two_stage.latent_shape, request.seed, first, request.batch_size).to(backend.device)
        output = two_stage.sample(condition and condition.to(backend.device), noise, sampler)
        write_json(request.parts / "nfe.json", output.nfe)
        numbers = range(first, min(first + request.batch_size, request.num))
        made = finite_pictures(two_stage.decode(output), output.zs_pred, numbers, f"{request.out}: samples")
        _write(part, made)
    backend.barrier()
    return on_main(backend, lambda: _finish(request, spec, labels, facts))


def _batches(request: SampleRequest, backend: Backend) -> Iterator[tuple[int, int]]:
    """This rank's batches: their number, and the number of their first image."""
    firsts = list(enumerate(range(0, request.num, request.batch_size)))[backend.rank :: backend.world_size]
    return iter(tqdm(firsts, desc="sample", unit="batch", disable=backend.rank > 0))


def _claim(request: SampleRequest, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Make the folder of parts; refuse one of another sampling. What was written, where all is done already."""
    note = request.parts / "facts.json"
    if note.exists():
        _check_same(read_json(note, "remove it"), facts, f"{request.parts}: holds parts")
        return None
    if request.note.exists() and request.out.exists():
        done = read_json(request.note, "remove it")
        _check_same(done, facts, f"--out {request.out}: holds images")
        return done
    if request.out.is_file() or (request.out.is_dir() and any(request.out.iterdir())):
        raise BadInput(f"--out {request.out}: expected a new file or an empty folder, got one with other content")
    make_folder(request.parts, "--out")
    write_json(note, facts)
    return None


def _check_same(held: dict[str, Any], facts: dict[str, Any], where: str) -> None:
    """BadInput where what is there was made in another way; what only finished images have, as nfe, is not compared."""
    for key, value in json.loads(json.dumps(facts)).items():
        found = held.get(key)
        if isinstance(value, dict) and isinstance(found, dict):
            _check_same(found, value, where)
        elif found != value:
            raise BadInput(f"{where} made with {key} {found}, not {value}; remove it or choose another place")


def _write(part: Path, images: np.ndarray) -> None:
    with replacing(part) as temporary:
        np.save(temporary, images)


def _images(request: SampleRequest) -> Iterator[tuple[int, np.ndarray]]:
    """Number of the first image and (n, H, W, 3) of each part: 50,000 images at 256 px are 10 GB."""
    for part in sorted(request.parts.glob("[0-9]*.npy")):
        first = int(part.stem) * request.batch_size
        yield first, np.load(part)[: request.num - first].transpose(0, 2, 3, 1)


def _finish(request: SampleRequest, spec: DataSpec, labels: Tensor | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Put the parts together and remove them."""
    shape = list(next(_images(request))[1].shape[1:])
    nfe = json.loads((request.parts / "nfe.json").read_text())
    facts = {**facts, "nfe": nfe, "image_shape": shape, "protocol": {**facts["protocol"], "nfe": nfe}}
    if request.out.suffix == ".npz":
        _write_npz(request, labels, (request.num, *shape))
    else:
        request.out.mkdir(parents=True, exist_ok=True)
        for first, images in _images(request):
            for i, image in enumerate(images):
                Image.fromarray(image).save(request.out / f"{first + i:06d}.png")
        _write_masks(request, spec)
    write_json(request.note, facts)
    shutil.rmtree(request.parts)
    return facts


def _write_masks(request: SampleRequest, spec: DataSpec) -> None:
    """The coloured mask of each image, under its number."""
    if not (files := masks_of(spec, request)):
        return
    (request.out / MASKS).mkdir(exist_ok=True)
    for number in range(request.num):
        mask = masks_in_turn(files, spec, number, 1).mask.numpy()
        picture = coloured(mask, spec.num_mask_classes)[0].transpose(1, 2, 0)
        Image.fromarray(picture).save(request.out / MASKS / f"{number:06d}.png")


def _write_npz(request: SampleRequest, labels: Tensor | None, shape: tuple[int, ...]) -> None:
    """The ADM file, from a file that is mapped into memory and not held there."""
    whole = np.lib.format.open_memmap(request.parts / "all.npy", "w+", np.uint8, shape)
    for first, images in _images(request):
        whole[first : first + len(images)] = images
    arrays = {"arr_0": whole} | ({} if labels is None else {"arr_1": labels.numpy()})
    with replacing(request.out) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]


def describe_source(run: Path) -> dict[str, Any]:
    """Which weights: run, checkpoint, step, EMA and Stage1's sha256."""
    folder = checkpoint.find(run)
    meta = checkpoint.read_meta(folder)
    facts = {"checkpoint": str(folder), "step": meta["clock"]["step"], "weights": meta["evaluate"]}
    return {**facts, "stage1_sha256": meta.get("stage1_sha256")}
