"""Samples of a trained generator on all ranks: the same images for any world size, resumable, with their provenance."""

from __future__ import annotations

import json
import os
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
from rqvae.diffusion.sampling import Sampler
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import ActionCondition, ClassCondition, Condition, DataSpec
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import generator, normal
from rqvae.trainers import checkpoint
from rqvae.trainers.evaluation_trainer import as_pictures
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
    """

    out: Path
    num: int
    labels: tuple[int, ...] = ()
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name, value in (("--num", self.num), ("--batch-size", self.batch_size)):
            if value < 1:
                raise BadInput(f"{name}: expected at least 1, got {value}")

    @property
    def parts(self) -> Path:
        """Where finished batches wait."""
        return self.out.with_name(f"{self.out.name}.parts")


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


def generate(
    two_stage: TwoStage,
    spec: DataSpec,
    sampler: Sampler,
    backend: Backend,
    request: SampleRequest,
    source: dict[str, Any],
) -> dict[str, Any]:
    """Write the images and, beside them, a JSON with how they were made; returns it. Every rank calls it.

    A call that was cut off and is repeated goes on with the batches that are missing. Batches have one shape, so the
    images do not depend on the number of ranks.
    """
    labels = labels_of(spec, request)
    facts = {
        **source,
        "num": request.num,
        "labels": "none" if labels is None else f"in turn from {list(request.labels) or 'all'}",
        "seed": request.seed,
        "batch_size": request.batch_size,
        "solver": getattr(sampler.solver, "__name__", str(sampler.solver)),
        "steps": sampler.steps,
        "shift": sampler.shift,
        "guidance": repr(sampler.guidance),
        "uint8": "clamped to [0, 1], times 255, rounded to nearest",
    }
    on_main(backend, lambda: _claim(request, facts))
    nfe = 0
    for k, first in _batches(request, backend):
        part = request.parts / f"{k:06d}.npy"
        if part.exists():
            continue
        chosen = None if labels is None else labels[torch.arange(first, first + request.batch_size) % len(labels)]
        condition = condition_of(spec, chosen)
        noise = noise_of(two_stage.latent_shape, request.seed, first, request.batch_size).to(backend.device)
        output = two_stage.sample(condition and condition.to(backend.device), noise, sampler)
        nfe = (output.additional_attr or {}).get("nfe", 0)
        _write(part, as_pictures(two_stage.decode(output)))
    nfe = round(float(backend.all_reduce(torch.tensor(float(nfe), device=backend.device), "max")))
    backend.barrier()
    return on_main(backend, lambda: _finish(request, labels, {**facts, "nfe": nfe or "as in an earlier call"}))


def _batches(request: SampleRequest, backend: Backend) -> Iterator[tuple[int, int]]:
    """This rank's batches: their number, and the number of their first image."""
    firsts = list(enumerate(range(0, request.num, request.batch_size)))[backend.rank :: backend.world_size]
    return iter(tqdm(firsts, desc="sample", unit="batch", disable=backend.rank > 0))


def _claim(request: SampleRequest, facts: dict[str, Any]) -> None:
    """Make the folder of parts; refuse one of another sampling."""
    note = request.parts / "facts.json"
    if note.exists() and (held := json.loads(note.read_text())) != json.loads(json.dumps(facts)):
        key = next(k for k in facts if held.get(k) != facts[k])
        raise BadInput(f"{request.parts}: holds parts made with {key} {held.get(key)}, not {facts[key]}; remove it")
    make_folder(request.parts, "--out")
    note.write_text(json.dumps(facts))


def _write(part: Path, images: np.ndarray) -> None:
    temporary = part.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, images)
    os.replace(temporary, part)


def _finish(request: SampleRequest, labels: Tensor | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Put the parts together and remove them."""
    images = np.concatenate([np.load(part) for part in sorted(request.parts.glob("*.npy"))])[: request.num]
    images_nhwc = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    facts = {**facts, "image_shape": list(images_nhwc.shape[1:])}
    if request.out.suffix == ".npz":
        arrays = {"arr_0": images_nhwc} | ({} if labels is None else {"arr_1": labels.numpy()})
        temporary = request.out.with_name(f".{request.out.name}.tmp.npz")
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, request.out)
        note = request.out.with_suffix(".json")
    else:
        request.out.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images_nhwc):
            Image.fromarray(image).save(request.out / f"{i:06d}.png")
        note = request.out / "provenance.json"
    note.write_text(json.dumps(facts, indent=1))
    shutil.rmtree(request.parts)
    return facts


def describe_source(run: Path) -> dict[str, Any]:
    """Which weights: run, checkpoint, step, EMA and Stage1's sha256."""
    folder = checkpoint.find(run)
    meta = checkpoint.read_meta(folder)
    facts = {"checkpoint": str(folder), "step": meta["clock"]["step"], "weights": meta["evaluate"]}
    return {**facts, "stage1_sha256": meta.get("stage1_sha256")}
