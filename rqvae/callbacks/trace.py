"""What goes through a run of a generator, in numbers: the config key `debug`. For runs of a few steps.

Reads values from the device in every step, which a run that is to be fast must not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rqvae.callbacks.interfaces import Observer, RunView
from rqvae.img_datasets.interfaces import LabeledImageData, LabeledImageDatasetWrapper, MaskCondition
from rqvae.img_datasets.pathology import MaskDataset
from rqvae.models.interfaces import Stage2ModelOutput
from rqvae.models.layers.embeddings import TimestepEmbedding
from rqvae.models.layers.mask_embedding import (
    LegacyMaskEmbedding,
    MaskDistributionEmbedding,
    MaskLayout,
    class_distribution,
)

log = logging.getLogger(__name__)

FILE = "debug.jsonl"
EMBEDDINGS = (TimestepEmbedding, MaskDistributionEmbedding, LegacyMaskEmbedding, MaskLayout)


def facts_of(x: Tensor) -> dict[str, Any]:
    """Shape, type, device, range, mean and std of a tensor; of integers also which values there are and how often."""
    facts: dict[str, Any] = {
        "shape": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": str(x.device),
        "range": [x.min().item(), x.max().item()],
        "mean": x.double().mean().item(),
        "std": x.double().std(correction=0).item(),
    }
    if not x.is_floating_point():
        values, counts = x.unique(return_counts=True)
        facts |= {"unique": values.tolist(), "counts": counts.tolist()}
    return facts


class Trace(Observer):
    """Writes RUN/debug.jsonl and the console: of each step one line a stage, on rank 0.

    The stages of a step are `loaded` (one a sample: as it is in its file, which is read once more, image (H, W, 3) and
    mask, and the draw that chose it: slot 0 is the unconditional one), `image` (one a sample as the generator gets it,
    with its mask), `embedding` (one a module that embeds time or condition), `diffusion` (latent, times, prediction,
    target) and `loss`. Forward passes of sampling are left out.

    Args:
        stage2: the bare generator.
        stream: training's, opened.
    """

    def __init__(self, stage2: nn.Module, stream: LabeledImageDatasetWrapper) -> None:
        self.stage2, self.stream = stage2, stream
        self._hooks: list[RemovableHandle] = []
        self._file: Path | None = None
        self._step = 0

    def on_fit_start(self, run: RunView) -> None:
        if not run.is_main:
            return
        self._file, self._step = run.folder / FILE, run.clock.step
        self._hooks.append(self.stage2.register_forward_hook(self._after_stage2))
        for name, module in self.stage2.named_modules():
            if isinstance(module, EMBEDDINGS):
                self._hooks.append(module.register_forward_hook(self._after_embedding(name)))

    def before_step(self, run: RunView, micros: list[LabeledImageData]) -> None:
        if self._file is None:
            return
        self._step = run.clock.step + 1
        for micro in micros:
            for position in [] if micro.sample_id is None else micro.sample_id.tolist():
                self._emit("loaded", self._file_facts(position))
            for i in range(len(micro)):
                self._emit("image", _sample_facts(micro, i))

    def after_step(self, run: RunView, losses: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        if self._file is not None:
            self._emit("loss", {name: value.item() for name, value in losses.items()})

    def on_fit_end(self, run: RunView) -> None:  # noqa: ARG002
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._file = [], None

    def _file_facts(self, position: int) -> dict[str, Any]:
        """What the dataset has at this position of the stream, before transforms."""
        epoch, k = divmod(position, len(self.stream))
        index, dataset = self.stream.index(position), self.stream.dataset
        stored = dataset[index]
        facts: dict[str, Any] = {"sample_id": position, "index": index, "path": stored.img_path}
        if isinstance(dataset, MaskDataset) and (slots := dataset.slots(self.stream.seed, epoch)) is not None:
            facts["slot"] = int(slots[k])
        if stored.img is not None:
            facts["img"] = facts_of(stored.img.movedim(0, -1))
        if isinstance(stored.condition, MaskCondition):
            facts["mask"] = facts_of(stored.condition.mask.to(torch.uint8))
        return facts

    def _after_embedding(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not self.stage2.training:
                return
            facts: dict[str, Any] = {"name": name, "class": type(module).__name__, "output": facts_of(output.detach())}
            if isinstance(module, MaskDistributionEmbedding | LegacyMaskEmbedding):
                shares = class_distribution(inputs[0].mask, module.num_classes, torch.float64)
                table = list(module.table.weight.shape)
                facts |= {"class_distribution": shares.tolist(), "table": table}
            self._emit("embedding", facts)

        return hook

    def _after_stage2(self, module: nn.Module, inputs: tuple[Any, ...], output: Stage2ModelOutput) -> None:
        if not module.training:
            return
        attributes = output.additional_attr or {}
        facts: dict[str, Any] = {"latent": facts_of(inputs[0].zs), "prediction": facts_of(output.zs_pred.detach())}
        if "t" in attributes:
            facts["timesteps"] = attributes["t"].tolist()
        if "target" in attributes:
            facts["target"] = facts_of(attributes["target"])
        self._emit("diffusion", facts)

    def _emit(self, stage: str, facts: Mapping[str, Any]) -> None:
        """The one place that writes."""
        assert self._file is not None
        line = json.dumps({"step": self._step, "stage": stage, **facts})
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        log.info("debug %s", line)


def _sample_facts(batch: LabeledImageData, i: int) -> dict[str, Any]:
    """One sample of a batch: where it comes from, its image, its mask."""
    facts: dict[str, Any] = {}
    if batch.sample_id is not None:
        facts["sample_id"] = int(batch.sample_id[i])
    if isinstance(batch.img_path, list):
        facts["path"] = batch.img_path[i]
    if batch.img is not None:
        facts["img"] = facts_of(batch.img[i])
    if isinstance(batch.condition, MaskCondition):
        facts["mask"] = facts_of(batch.condition.mask[i])
        facts["has_mask"] = bool((batch.condition.mask[i] != batch.condition.num_classes).any())
    return facts
