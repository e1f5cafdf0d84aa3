"""Images, masks and classes, as far as a log shows them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rqvae.health.finding import Evidence, Found, NotAssessed, at, check, stated
from rqvae.health.settings import as_list
from rqvae.health.subject import Subject

RATIO = 10.0
_MOST_CLASSES = 10_000


def _counts(subject: Subject) -> tuple[Evidence, list[float]] | None:
    """Images per class as the log states them."""
    for setting in subject.stated:
        named = any(word in setting.key.lower() for word in ("train set summary", "class counts", "class distribution"))
        values = as_list(setting.value) if named else None
        if values and len(values) > 1:
            return stated(setting), values
    return None


@check(
    "DATA.IMBALANCE_IMAGE",
    "classes of very different size",
    "minor",
    needs=(),
    threshold="the largest class has more than 10 times the images of the smallest",
    alternatives=("a sampler that draws classes evenly: see DATA.IMBALANCE_EFFECTIVE",),
    recommendation=("draw classes evenly, or weight the loss",),
    verify="the shares of 1000 draws",
)
def images(subject: Subject) -> Iterator[Found]:
    """Stated counts per class."""
    counted = _counts(subject)
    if counted is None:
        raise NotAssessed("log the number of images of each class")
    ratio = max(counted[1]) / max(min(counted[1]), 1)
    if ratio > RATIO:
        yield Found(
            f"the largest class has {ratio:.1f} times the images of the smallest", (counted[0],), power="stated"
        )


@check(
    "DATA.IMBALANCE_PIXEL",
    "classes of very different area",
    "minor",
    needs=("pixels",),
    threshold="over the masks in the log (5 or more) the largest class has more than 10 times the pixels of "
    "the smallest",
    alternatives=("few masks: the ratio of the whole data differs",),
    recommendation=("weight the loss by class, or draw tiles of rare classes more often",),
    verify="the loss of the rarest class falls like the others",
)
def pixels(subject: Subject) -> Iterator[Found]:
    """Sums of the printed counts."""
    series = {n: s for n, s in subject.segment.series.items() if n.startswith("pixels/")}
    masks = len(np.unique(np.concatenate([s.steps for s in series.values()])))
    if masks < 5 or len(series) < 2:
        raise NotAssessed(f"log the pixels of each class of 5 masks or more, there are {masks}")
    sums = {name: float(s.values.sum()) for name, s in series.items()}
    high, low = max(sums, key=lambda n: sums[n]), min(sums, key=lambda n: sums[n])
    ratio = sums[high] / max(sums[low], 1)
    if ratio > RATIO:
        text = (
            f"over {masks} masks {high.partition('/')[2]} has {ratio:.1f} times the pixels of {low.partition('/')[2]}"
        )
        yield Found(text, (at(series[low], 0),), confidence=0.7, power=f"{masks} masks")


@check(
    "DATA.IMBALANCE_EFFECTIVE",
    "some classes are hardly drawn",
    "minor",
    needs=("draws",),
    threshold="over 100 draws or more the most frequent class is drawn more than 10 times as often as the rarest",
    recommendation=("see the sampler's probabilities",),
    verify="the shares of 1000 draws",
)
def effective(subject: Subject) -> Iterator[Found]:
    """Counts of draws."""
    draws = subject.segment.series["draw/class"]
    if len(draws) < 100:
        raise NotAssessed(f"log 100 draws or more, there are {len(draws)}")
    known = draws.values[(draws.values >= 0) & (draws.values < _MOST_CLASSES)].astype(int)
    classes = max(1, int(subject.number("classes") or known.max(initial=0) + 1))
    counts = np.bincount(known, minlength=classes)[:classes]
    if counts.max() > RATIO * max(counts.min(), 1):
        yield Found(f"draws by class: {counts.tolist()}", (at(draws, 0),), power=f"{len(draws)} draws")


@check(
    "DATA.BLANK_IMAGE",
    "images without content",
    "minor",
    needs=("images",),
    threshold="more than 1 % of the loaded images have a standard deviation below 3 of 255",
    alternatives=("empty tiles, which whole-slide images have many of",),
    recommendation=("leave out tiles whose standard deviation is below a threshold",),
    verify="no such image among 1000 draws",
)
def blank(subject: Subject) -> Iterator[Found]:
    """Standard deviations of loaded images."""
    series = subject.segment.series["image/std"]
    empty = np.flatnonzero(series.values < 3)
    if len(empty) > 0.01 * len(series):
        text = f"{len(empty)} of {len(series)} images have a standard deviation below 3 (of 255)"
        yield Found(text, (at(series, int(empty[0])),), power=f"{len(series)} images", confidence=0.8)


@check(
    "DATA.MASK_VALUES",
    "mask values that are no class",
    "critical",
    needs=("pixels",),
    threshold="a mask has a value outside 0 to classes - 1",
    recommendation=("map the values, or use another number of classes", "resize masks with nearest neighbours only"),
    verify="all values are classes",
)
def mask_values(subject: Subject) -> Iterator[Found]:
    """Printed mask values against the number of classes."""
    classes = subject.number("classes")
    if classes is None:
        raise NotAssessed("log the number of classes")
    for name, series in subject.segment.series.items():
        if name.startswith("pixels/class_") and int(name.rpartition("_")[2]) >= classes:
            yield Found(
                f"masks have the value {name.rpartition('_')[2]}, there are {classes:g} classes",
                (at(series, 0),),
                confidence=0.97,
                power=f"{len(series)} masks have it",
            )


@check(
    "DATA.RANGE",
    "inputs outside their range",
    "minor",
    needs=("input_range",),
    threshold="a batch of images is not within [-1.05, 1.05]",
    recommendation=("divide by 255",),
    verify="all batches are within [0, 1] or [-1, 1]",
    source="SageMaker Debugger, CheckInputImages",
)
def value_range(subject: Subject) -> Iterator[Found]:
    """Range of the inputs."""
    low, high = subject.segment.series["input/low"], subject.segment.series["input/high"]
    if low.values.min() < -1.05 or high.values.max() > 1.05:
        yield Found(
            f"inputs reach [{low.values.min():g}, {high.values.max():g}]",
            (at(high, int(np.argmax(high.values))),),
            power=f"{len(low)} batches",
        )


@check(
    "DATA.DUPLICATE",
    "images that are drawn again and again",
    "minor",
    needs=("draws",),
    threshold="100 draws or more of lists of 1000 or more select the same index in more than 20 % of the cases",
    recommendation=("check the seed of the loader's workers: equal seeds draw equal samples",),
    verify="repeats are as rare as chance has them",
    source="NumPy seeds in PyTorch workers: github.com/pytorch/pytorch/issues/5059",
)
def duplicate(subject: Subject) -> Iterator[Found]:
    """Repeated sample indices."""
    index, size = (subject.segment.series.get(f"draw/{name}") for name in ("index", "size"))
    if index is None or size is None or len(index) < 100 or size.values.min() < 1000:
        raise NotAssessed("log the index of 100 draws or more")
    repeated = 1 - len(np.unique(index.values)) / len(index)
    if repeated > 0.2:
        yield Found(
            f"{100 * repeated:.0f} % of {len(index)} draws are repeats", (at(index, 0),), power=f"{len(index)} draws"
        )
