"""Does a generator put each class where its mask says? A judge that has seen real training images alone decides."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  (the name everyone knows)
from torch import Tensor, nn

from rqvae.backends import Backend
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import LabeledImageData, MaskCondition, Split
from rqvae.metrics.segmentation import confusion_matrix, mean_iou
from rqvae.randomness import seeded
from rqvae.run import Stage2Run
from rqvae.trainers.evaluation_trainer import SplitWalk
from rqvae.trainers.generate import noise_of
from rqvae.trainers.stage2_trainer import load_two_stage

log = logging.getLogger(__name__)

DILATIONS = (1, 2, 4, 8, 2, 1)
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class LayoutRequest:
    """What to judge.

    Args:
        run: folder of the generator.
        images: how many masks of the split.
        split: whose masks are sampled from, and whose images give the bound.
        judge_steps: batches that the judge is trained on.
        judge_width: channels of the judge.
        batch_size: of the judge's training and of sampling.
        seed: of the judge and of the samples' noise.
    """

    run: Path
    images: int = 256
    split: Split = "test"
    judge_steps: int = 400
    judge_width: int = 32
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "judge_steps", "judge_width", "batch_size"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}")


class Judge(nn.Module):
    """A small segmenter: 3x3 convolutions of growing and shrinking reach, (B, 3, H, W) in [0, 1] -> (B, K, H, W).

    Args:
        num_classes: K.
        width: channels.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for dilation in DILATIONS:
            layers += [nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation, padding_mode="reflect")]
            layers += [nn.GroupNorm(1, width), nn.SiLU()]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, num_classes, 1))

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        return self.layers(2 * images_bchw - 1)


def layout_control(run: Stage2Run, backend: Backend, request: LayoutRequest) -> dict[str, float]:
    """Train the judge on the real train split, then let it judge real images and samples.

    Returns:
        `real`: mean IoU on real images of the split, the bound; `samples`: of samples against the masks they were made
        from; `shuffled`: of the same samples against the mask of another image; `share`: samples / real;
        `proportions`: mean over images of the L1 distance between the class shares of mask and sample; `n` masks.

    Raises:
        BadInput: data without masks.
    """
    data = replace(run.data, batch_size=request.batch_size)
    classes = data.make("train")[0].spec.num_mask_classes
    if not classes:
        raise BadInput(f"{request.run}: expected a generator on masks, its data have none")
    two_stage = load_two_stage(run, request.run).to(backend.device)
    judge = train_judge(SplitWalk(data, "train", backend), classes, request)
    totals = {name: torch.zeros(classes, classes, dtype=torch.int64) for name in ("real", "samples", "shuffled")}
    distance, first = 0.0, 0
    for real, valid in SplitWalk(data, request.split, backend).batches(request.images):
        assert isinstance(real.condition, MaskCondition), "checked above"
        mask, count = real.condition.mask, int(valid.sum())
        noise = noise_of(two_stage.latent_shape, request.seed, first, len(mask)).to(backend.device)
        with torch.no_grad():
            samples = two_stage.decode(two_stage.sample(real.condition, noise)).clamp(0, 1)
            found, found_real = judge(samples)[:count].argmax(1), judge(real.require_img())[:count].argmax(1)
        mask = mask[:count]
        totals["real"] += confusion_matrix(found_real, mask, classes).cpu()
        totals["samples"] += confusion_matrix(found, mask, classes).cpu()
        totals["shuffled"] += confusion_matrix(found, mask.roll(1, 0), classes).cpu()
        distance += float((_shares(found, classes) - _shares(mask, classes)).abs().sum())
        first += count
    scores = {name: mean_iou(matrix) for name, matrix in totals.items()}
    return {**scores, "share": scores["samples"] / scores["real"], "proportions": distance / first, "n": first}


def train_judge(walk: SplitWalk, classes: int, request: LayoutRequest) -> Judge:
    """A judge of the labelled real images of a split, in file order."""
    with seeded(request.seed, "judge"):
        judge = Judge(classes, request.judge_width).to(walk.backend.device).train()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, request.judge_steps)
        for batch in _endless(walk, request.judge_steps):
            assert isinstance(batch.condition, MaskCondition), "the data have masks"
            mask = batch.condition.mask
            # a pixel without a label has the number K
            loss = F.cross_entropy(judge(batch.require_img()), mask, ignore_index=classes, reduction="sum")
            optimizer.zero_grad()
            (loss / (mask < classes).sum().clamp(min=1)).backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


def _endless(walk: SplitWalk, steps: int) -> Iterator[LabeledImageData]:
    """`steps` batches, the split again and again."""
    done = 0
    while True:
        for batch, _ in walk.batches():
            if done == steps:
                return
            yield batch
            done += 1


def _shares(mask_bhw: Tensor, classes: int) -> Tensor:
    """(B, K): the share of each class."""
    return F.one_hot(mask_bhw.clamp(max=classes), classes + 1)[..., :classes].double().mean((1, 2))
