"""What a dataset gives to the rest of the framework: `LabeledImageData`, its conditions, and a `DataSpec`.

Shapes: B batch, H W image height and width, K history frames, C h w latent channels, height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import Self

from rqvae.contracts import check_shape, check_type
from rqvae.img_datasets.stacking import Named, stacked
from rqvae.img_datasets.tensor_fields import TensorFields, register_pytree
from rqvae.randomness import Draw, fill, generator

Split = Literal["train", "val", "test"]
ImageShape = tuple[int, int, int]
LatentShape = tuple[int, ...]


class Condition(TensorFields):
    """What a generator is conditioned on. Every tensor field has the batch as its first axis."""

    def null(self) -> Self:
        """The unconditional condition, with the same shapes."""
        raise NotImplementedError

    def dropped(self, drop_b: Tensor) -> Self:
        """This condition where `drop_b` (B,) is False, the null condition where it is True."""
        null = self.null()
        pairs = {
            f.name: (getattr(self, f.name), getattr(null, f.name))
            for f in fields(self)  # type: ignore[arg-type]
            if isinstance(getattr(self, f.name), Tensor)
        }
        mixed = {k: torch.where(drop_b.view(-1, *[1] * (x.ndim - 1)), n, x) for k, (x, n) in pairs.items()}
        return replace(self, **mixed)  # type: ignore[type-var]

    def __len__(self) -> int:
        return next(len(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor))  # type: ignore[arg-type]


@register_pytree
@dataclass
class ClassCondition(Condition):
    """Class labels.

    Args:
        label: (B,) int64 in [0, num_classes]; `num_classes` itself is the null class.
        num_classes: how many real classes there are.
    """

    label: Tensor
    num_classes: int

    def null(self) -> ClassCondition:
        return replace(self, label=torch.full_like(self.label, self.num_classes))


@register_pytree
@dataclass
class ActionCondition(Condition):
    """The actions that lead to a frame, and the frames before it.

    Args:
        context: (B, K, 3, H, W) history frames in [0, 1], or (B, K, C, h, w) once encoded; None where there are only
            actions.
        actions: (B, K) int64 in [0, num_actions]; `num_actions` is the null action, which is never NOOP.
        mask: (B, K) bool; False where the history is missing.
        num_actions: how many real actions there are.
        encoded: whether `context` holds Stage2's latents, which may have the shape of frames.
        cached: whether it holds Stage1's, as a cache gives them, which the connector has not seen.
    """

    context: Tensor | None
    actions: Tensor
    mask: Tensor
    num_actions: int
    encoded: bool = False
    cached: bool = False

    def null(self) -> ActionCondition:
        return replace(self, actions=torch.full_like(self.actions, self.num_actions))


@register_pytree
@dataclass
class MaskCondition(Condition):
    """A segmentation mask.

    Args:
        mask: (B, H, W) int64 class ids in [0, num_classes]; `num_classes` marks a pixel without a label.
        num_classes: how many real classes there are.
    """

    mask: Tensor
    num_classes: int

    def null(self) -> MaskCondition:
        return replace(self, mask=torch.full_like(self.mask, self.num_classes))


@register_pytree
@dataclass
class Stage1Encodings(TensorFields):
    """A latent.

    Args:
        zs: (B, C, h, w), or (B, L, C) for models with a sequence of tokens.
        additional_attr: for example `mu` and `logvar` of a VAE.
    """

    zs: Tensor
    additional_attr: dict[str, Any] | None = None


@register_pytree
@dataclass
class LabeledImageData(TensorFields):
    """One sample (no batch axis), and after collating one batch.

    Args:
        img: (B, 3, H, W) float in [0, 1]; a dataset may give uint8, which the feed turns into float. Stage1 models
            normalise inside.
        condition: `ClassCondition`, `ActionCondition`, `MaskCondition`, or None.
        img_path: where the image, or each image of the batch, comes from.
        additional_attr: anything else.
        sample_id: (B,) int64, position in the stream of samples: what randomness is keyed by.
        encodings: cached latents; `TwoStage.prepare` then skips the encoder.
        draws: the numbers the modules asked for (`noise`, `t`, `posterior`, `drop`), each with B first.
    """

    img: Tensor | None = None
    condition: Condition | None = None
    img_path: str | list[str] | None = None
    additional_attr: dict[str, Any] | None = None
    sample_id: Tensor | None = None
    encodings: Stage1Encodings | None = None
    draws: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        for value in (self.img, self.sample_id, self.condition, self.encodings and self.encodings.zs):
            if value is not None:
                return len(value)  # type: ignore[arg-type]
        raise ValueError("LabeledImageData: no field to take the batch size from")

    def require_img(self) -> Tensor:
        """`img`, or a ValueError that says that it is missing."""
        if self.img is None:
            raise ValueError("LabeledImageData.img: expected (B, 3, H, W), got None")
        return self.img


@dataclass(frozen=True)
class DataSpec:
    """What the models must know of the data, from the dataset's constructor arguments alone.

    Args:
        image_shape: (3, H, W) after the transform.
        num_classes: classes of `ClassCondition`, 0 without.
        num_actions: actions of `ActionCondition`, 0 without.
        history: K, history slots of `ActionCondition`.
        context: whether `ActionCondition.context` holds the K frames.
        rollout_steps: n consecutive frames that are targets, the last one of which is `img`: `ActionCondition` then has
            K + n - 1 slots.
        num_mask_classes: classes of `MaskCondition`, 0 without.
        mask_colours: classes of the masks that the images themselves are, in the colours of `rqvae.mask_colours`; 0 for
            other images.
        names: names of the classes or actions, where the dataset knows them.
        drops_condition: whether the dataset itself gives some training samples the null condition (`dropped`).
    """

    image_shape: ImageShape
    num_classes: int = 0
    num_actions: int = 0
    history: int = 0
    context: bool = False
    rollout_steps: int = 1
    num_mask_classes: int = 0
    mask_colours: int = 0
    names: tuple[str, ...] = ()
    drops_condition: bool = False


class LabeledImageDataset(Dataset[LabeledImageData]):
    """Base of the datasets.

    The constructor takes `split` first and may not touch the disk: `open` does. `__getitem__` returns a sample as it
    is stored (uint8 (3, H, W) or float in [0, 1]), without augmentation: transforms are the feed's.
    A method `collate_fn(samples)` is used in place of the default one when it exists.

    `vae` names a latent cache where the dataset has a key for it, as `data.latents` does for every dataset.
    """

    split: Split
    vae: str | None = None

    @property
    def spec(self) -> DataSpec:
        """Shapes and classes; must not touch the disk."""
        raise NotImplementedError

    def open(self) -> None:
        """Look at the disk: build the index, raise `BadInput` if something is missing. Comes before any sample."""

    def fingerprint(self) -> str:
        """A text that changes when the data change; the cached statistics of a run are keyed by it."""
        return f"{type(self).__qualname__}:{self.split}:{len(self)}"

    def order(self, seed: int, epoch: int) -> Tensor:
        """(N,) int64, the order of a shuffled epoch: any permutation is alike; one read from far wants neighbours."""
        return torch.randperm(len(self), generator=generator(seed, "order", epoch))

    def dropped(self, seed: int, epoch: int) -> Tensor | None:  # noqa: ARG002
        """(N,) bool, which samples of a shuffled epoch come with the null condition; None leaves it to the model."""
        return None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> LabeledImageData:
        raise NotImplementedError

    def without_image(self, index: int) -> LabeledImageData:
        """The sample with `img` None: all that training on cached latents takes from the dataset.

        A dataset whose images are costly to read overrides it.
        """
        return replace(self[index], img=None)

    def encoded_images(self) -> LabeledImageDataset:
        """The images that Stage1 encodes for a latent cache, each once: the dataset itself, one image a sample.

        A dataset whose samples share images (frames of a recording) gives another one; `open` comes before.
        """
        return self

    def image_indices(self, index: int) -> tuple[int, list[int]]:
        """Where in `encoded_images()` the sample's image is, and the frames of its context, the earliest one first."""
        return index, []


class Transform:
    """From a stored sample to what a model sees. `rng` is the sample's own: an augmentation never depends on workers.

    A transform is made with the dataset's `DataSpec` as its first argument.

    One that gives each sample one of a few results (both flips, say) names them in `variants`, and says with `choose`
    and `variant` which and what they are: its latents can be cached. A random crop has too many results, and none.
    """

    def __call__(self, sample: LabeledImageData, rng: torch.Generator) -> LabeledImageData:
        """The sample, transformed; may keep uint8."""
        raise NotImplementedError

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of all the results that a sample can have; empty where they cannot be listed."""
        return ()

    def choose(self, rng: torch.Generator) -> Tensor:  # noqa: ARG002
        """Which variant `__call__` gives with this generator: int64, no axes, never read on the host."""
        if len(self.variants) != 1:
            raise NotImplementedError(f"{type(self).__name__}.choose: expected where there is not just one variant")
        return torch.zeros((), dtype=torch.int64)

    def variant(self, sample: LabeledImageData, choice: Tensor) -> LabeledImageData:  # noqa: ARG002
        """The sample as variant `choice`, so that `self(sample, rng)` is `self.variant(sample, self.choose(rng))`.

        Args:
            sample: as it is stored; `img` is None where only the rest is wanted.
            choice: int64, no axes, in [0, len(variants)).
        """
        if len(self.variants) != 1:
            raise NotImplementedError(f"{type(self).__name__}.variant: expected where there is not just one variant")
        return self(sample, torch.Generator())

    def fingerprint(self) -> str:
        """A text that changes when the results change: the class and its public attributes but `spec`."""
        own = {k: v for k, v in sorted(vars(self).items()) if not k.startswith("_") and k != "spec"}
        arguments = ", ".join(f"{name}={value!r}" for name, value in own.items())
        return f"{type(self).__module__}.{type(self).__qualname__}({arguments})"


class LatentSource(Protocol):
    """Where cached latents of a split come from."""

    def read(self, index: int, choice: Tensor) -> Stage1Encodings:
        """What Stage1 gives for variant `choice` of image `index` of `dataset.encoded_images()`, without batch axis."""
        ...


Collate = Callable[[Sequence[LabeledImageData]], LabeledImageData]


@dataclass
class LabeledImageDatasetWrapper(Dataset[LabeledImageData]):
    """A split seen as an endless stream: position -> the sample with its transform applied and its draws filled.

    The position in the stream, not (epoch, index), is the sample's identity. Epoch e's order is the dataset's `order`,
    a permutation seeded by (seed, e); a split that is not shuffled repeats in file order.

    Args:
        dataset: the split.
        transform: applied to each sample with the sample's own generator.
        draws: numbers the modules need per sample.
        seed: the run's seed.
        shuffle: a new order each epoch.
        latents: cached latents of the split, given in place of its images.
    """

    dataset: LabeledImageDataset
    transform: Transform
    draws: dict[str, Draw]
    seed: int
    shuffle: bool
    latents: LatentSource | None = None
    _order: tuple[int, Tensor, Tensor | None] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.dataset)

    def index(self, position: int) -> int:
        """The sample's index in the dataset."""
        return self._visit(position)[0]

    def _visit(self, position: int) -> tuple[int, bool]:
        """The sample's index in the dataset, and whether it comes with the null condition."""
        epoch, k = divmod(position, len(self.dataset))
        if not self.shuffle:
            return k, False
        if self._order is None or self._order[0] != epoch:
            dropped = self.dataset.dropped(self.seed, epoch)
            self._order = (epoch, self.dataset.order(self.seed, epoch), dropped)
        _, order, dropped = self._order
        return int(order[k]), dropped is not None and bool(dropped[k])

    def __getitem__(self, position: int) -> LabeledImageData:
        (index, drop), rng = self._visit(position), generator(self.seed, "augment", position)
        if self.latents is None:
            stored = self.dataset[index]
            check_type(stored, LabeledImageData, f"data.dataset: {type(self.dataset).__name__}[index]")
            sample = self.transform(stored, rng)
        else:
            choice = self.transform.choose(rng)
            sample = self.transform.variant(self.dataset.without_image(index), choice)
            sample = self._with_latents(sample, self.latents, index, choice)
        self._check(sample)
        sample = replace(sample, img=_unit_range(sample.img))
        if isinstance(sample.condition, ActionCondition):
            context = _unit_range(sample.condition.context)
            sample = replace(sample, condition=replace(sample.condition, context=context))
        if drop and sample.condition is not None:
            sample = replace(sample, condition=sample.condition.null())
        return replace(sample, sample_id=torch.tensor(position), draws=fill(self.draws, self.seed, position) or None)

    def _with_latents(
        self, sample: LabeledImageData, latents: LatentSource, index: int, choice: Tensor
    ) -> LabeledImageData:
        """The sample with the cached latents of its image, and of its context where the dataset says which they are."""
        own, before = self.dataset.image_indices(index)
        sample = replace(sample, encodings=latents.read(own, choice))
        if not before or not isinstance(sample.condition, ActionCondition):
            return sample
        context = torch.stack([latents.read(k, choice).zs for k in before])
        return replace(sample, condition=replace(sample.condition, context=context, cached=True))

    def _check(self, sample: LabeledImageData) -> None:
        """That the transform gives what the dataset's `DataSpec` says, which all models were built for."""
        key = f"data.{self.dataset.split}_transform: {type(self.transform).__name__}"
        check_type(sample, LabeledImageData, key)
        if sample.img is not None:
            check_shape(sample.img, self.dataset.spec.image_shape, f"{key}: img")

    @property
    def collate_fn(self) -> Collate:
        """The dataset's own `collate_fn` where it has one, else `default_collate_fn`."""
        return getattr(self.dataset, "collate_fn", self.default_collate_fn)

    @staticmethod
    def default_collate_fn(samples: Sequence[LabeledImageData]) -> LabeledImageData:
        """Stack samples into a batch: tensors on a new first axis, paths and other attributes into lists.

        Raises:
            BadInput: samples whose tensors differ in shape, or of which only some have a field.
        """
        return stacked([Named("sample", s) for s in samples])


def _unit_range(pixels: Tensor | None) -> Tensor | None:
    """uint8 as float in [0, 1]; what is float, or not there, as it is."""
    return pixels.float() / 255 if pixels is not None and pixels.dtype == torch.uint8 else pixels
