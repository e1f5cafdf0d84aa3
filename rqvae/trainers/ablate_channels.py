"""What each dead channel of a run is worth: PSNR of the network with the channel replaced by its mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rqvae.backends import Backend
from rqvae.callbacks.channels.ablation import psnr_of, replaced
from rqvae.callbacks.channels.classifier import DEAD, LATENT
from rqvae.callbacks.channels.tracker import ChannelTracker
from rqvae.callbacks.channels.wiring import Wire
from rqvae.errors import BadInput
from rqvae.files import read_json, write_json
from rqvae.img_datasets.interfaces import LabeledImageData, Split
from rqvae.models.interfaces import Stage1Model
from rqvae.run import AnyRun, Stage1Run
from rqvae.trainers import checkpoint
from rqvae.trainers.evaluation_trainer import SplitWalk, load_evaluated

FILE = Path("channels") / "ablation.json"


@dataclass(frozen=True)
class AblationRequest:
    """What to measure.

    Args:
        folder: of a tracked run with a checkpoint.
        images: of the split.
        split: of the run's data.
        limit: most channels; those of the lowest score.
    """

    folder: Path
    images: int = 16
    split: Split = "val"
    limit: int = 64


def ablate(run: AnyRun, backend: Backend, request: AblationRequest) -> dict[str, Any]:
    """Write RUN/channels/ablation.json for the dead channels whose region goes on at the run's end.

    The weights are those that were tracked, not their average, at the last checkpoint.

    Raises:
        BadInput: a run of Stage2, one without RUN/channels, or without a checkpoint.
    """
    if not isinstance(run, Stage1Run):
        raise BadInput(f"{request.folder}: expected a Stage1 run, got one of Stage2")
    rows = [
        row
        for row in read_json(request.folder / "channels" / "regions.json")["regions"]
        if row["death"] is None and row["state"] in DEAD
    ]
    chosen = sorted(rows, key=lambda row: math.inf if row["score"] is None else row["score"])[: request.limit]
    layers = [row["name"] for row in read_json(request.folder / "channels" / "layers.json")["layers"]]
    at = load_evaluated(run.stage1, "stage1", request.folder, "model")
    stage1 = run.stage1.to(backend.device)
    images = SplitWalk(run.data, request.split, backend).first(request.images).require_img()
    whole, effects = effects_of(stage1, layers, chosen, images)
    found = {
        "step": checkpoint.read_meta(at)["clock"]["step"],
        "images": len(images),
        "split": request.split,
        "limit": request.limit,
        "psnr": whole,
        "rows": [
            {**{k: row[k] for k in ("layer", "channel", "state")}, "psnr_change": effect}
            for row, effect in zip(chosen, effects, strict=True)
        ],
    }
    write_json(request.folder / FILE, found)
    return found


def effects_of(
    stage1: Stage1Model, layers: Sequence[str], rows: Sequence[Mapping[str, Any]], images: Tensor
) -> tuple[float, list[float | None]]:
    """PSNR of the reconstructions, and its change for each of `rows` (layer, channel); None where nothing is replaced.

    Args:
        stage1: on the images' device.
        layers: that were tracked.
        rows: with `layer` and `channel`.
        images: (B, 3, H, W) in [0, 1].
    """
    batch = LabeledImageData(img=images)
    latent = _LatentMean(stage1)
    tracker = ChannelTracker(stage1.eval(), layers, latent=None, probing=True)
    with latent:
        tracker.probe(lambda: stage1(batch))
    tracker.step()
    snapshot, wires = tracker.snapshot(), dict(tracker.wires or {})
    tracker.close()
    assert snapshot is not None
    wires[LATENT] = Wire(target=latent.module)
    means = {layer.name: snapshot.of(layer.name)["mean"] for layer in tracker.layers}
    if latent.mean_c is not None:
        means[LATENT] = latent.mean_c
    whole = _psnr(stage1, batch)
    effects: list[float | None] = []
    for row in rows:
        wire = wires[row["layer"]]
        if wire.target is None:
            effects.append(None)
            continue
        with replaced(wire, row["channel"], float(means[row["layer"]][row["channel"]])):
            effects.append(_psnr(stage1, batch) - whole)
    return whole, effects


class _LatentMean:
    """Mean of each latent channel as the layer behind the posterior takes it in, where there is such a layer."""

    def __init__(self, stage1: nn.Module) -> None:
        named = [module for name, module in stage1.named_modules() if name.rpartition(".")[2] == "post_quant_conv"]
        self.module = named[0] if named else None
        self.mean_c: Tensor | None = None

    def _see(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:  # noqa: ARG002
        self.mean_c = arguments[0].detach().double().transpose(0, 1).flatten(1).mean(1)

    def __enter__(self) -> None:
        self._handle = None if self.module is None else self.module.register_forward_pre_hook(self._see)

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()


@torch.no_grad()
def _psnr(stage1: Stage1Model, batch: LabeledImageData) -> float:
    return psnr_of(stage1.get_recon_imgs(stage1(batch).xs_recon), batch.require_img())
