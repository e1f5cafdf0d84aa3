"""Two outputs of one unit: figures of their difference, and the rule that calls it bad.

The rule judges against a reference of higher precision, as `torch._dynamo.utils.same` does in spirit: a compiled output
may be k times as far from it as the eager one, plus 1e-4. A flat tolerance flags healthy bf16 code.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rqvae.diagnostics.blank import STD_THRESHOLD

_CHUNK = 1 << 15
"""Elements compared at once in float64: the comparison of a large activation takes 5 MB, not ten times its size."""
_LOW = (torch.bfloat16, torch.float16)
FLOOR = 1e-4
"""Relative error that is never bad. Healthy inductor code in fp32 stays below 1e-5."""


class Status(str, enum.Enum):
    """What was found out about a unit."""

    OK = "OK"
    MISMATCH = "MISMATCH"
    BLANK = "BLANK"
    NONFINITE = "NONFINITE"
    SHAPE = "SHAPE"
    DTYPE = "DTYPE"
    COMPILE_ERROR = "COMPILE_ERROR"
    RUNTIME_ERROR = "RUNTIME_ERROR"
    TIMEOUT = "TIMEOUT"
    CRASHED = "CRASHED"
    EAGER_FALLBACK = "EAGER_FALLBACK"
    EAGER_NONFINITE = "EAGER_NONFINITE"
    NOT_EXERCISED = "NOT_EXERCISED"
    CONTAINER = "CONTAINER"


BAD = frozenset(
    {
        Status.MISMATCH,
        Status.BLANK,
        Status.NONFINITE,
        Status.SHAPE,
        Status.DTYPE,
        Status.COMPILE_ERROR,
        Status.RUNTIME_ERROR,
        Status.TIMEOUT,
        Status.CRASHED,
    }
)
"""The compiler is to blame."""

_WORST_FIRST = (Status.SHAPE, Status.DTYPE, Status.NONFINITE, Status.BLANK, Status.MISMATCH)


@dataclass(frozen=True)
class Difference:
    """Figures of a compiled tensor against the eager one.

    Args:
        max_abs: largest absolute difference.
        mean_abs: mean absolute difference.
        relative_l2: norm of the difference over that of the eager output.
        psnr: 10 log10(peak^2 / mean squared difference) in dB, peak the largest |eager|; None where they are equal.
        cosine: of the angle between them.
        sqnr: 20 log10(norm of eager / norm of the difference) in dB; None where they are equal.
        nan_count: of the compiled output.
        inf_count: of the compiled output.
        peak: largest |eager| value.
        headroom_bits: log2(largest number of the type / peak).
        mean: of the compiled output.
        std: of the compiled output.
        error_compiled: relative error against the reference of higher precision.
        error_eager: the same of the eager output.
        tolerance: error_compiled above this is bad.
    """

    max_abs: float
    mean_abs: float
    relative_l2: float
    psnr: float | None
    cosine: float
    sqnr: float | None
    nan_count: int
    inf_count: int
    peak: float
    headroom_bits: float | None
    mean: float
    std: float
    error_compiled: float
    error_eager: float
    tolerance: float


@dataclass(frozen=True)
class Verdict:
    """A status with its figures (those of the worst tensor), and in words what differs where no figure says it."""

    status: Status
    figures: Difference | None = None
    words: str = ""


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def judge(eager: Any, compiled: Any, gold: Any = None, blank_std: float = STD_THRESHOLD) -> Verdict:
    """Compare what a unit returned eager and compiled.

    Args:
        eager: the eager output: a tensor, or a tree with tensors.
        compiled: the compiled one.
        gold: the same from a copy of higher precision; None takes the eager output, which is right for fp32.
        blank_std: a compiled tensor whose standard deviation is below this is BLANK where the eager one's is not.
    """
    ours, theirs = tensors_of(eager), tensors_of(compiled)
    if len(ours) != len(theirs):
        return Verdict(Status.SHAPE, words=f"expected {len(ours)} tensors, got {len(theirs)}")
    golds = ours if gold is None else tensors_of(gold)
    verdicts = [_judge_one(*three, blank_std) for three in zip(ours, theirs, golds, strict=True)]
    for status in _WORST_FIRST:
        for verdict in verdicts:
            if verdict.status is status:
                return verdict
    return verdicts[0] if verdicts else Verdict(Status.OK)


def _judge_one(eager: Tensor, compiled: Tensor, gold: Tensor, blank_std: float) -> Verdict:
    if eager.shape != compiled.shape:
        return Verdict(Status.SHAPE, words=f"expected shape {tuple(eager.shape)}, got {tuple(compiled.shape)}")
    if eager.dtype != compiled.dtype:
        return Verdict(Status.DTYPE, words=f"expected {eager.dtype}, got {compiled.dtype}")
    if not eager.is_floating_point():
        same = torch.equal(eager, compiled)
        return Verdict(Status.OK if same else Status.MISMATCH, words="" if same else "integers differ")
    figures, eager_std = difference(eager, compiled, gold)
    if figures.nan_count or figures.inf_count:
        return Verdict(Status.NONFINITE, figures, f"{figures.nan_count} NaN, {figures.inf_count} Inf")
    if figures.std < blank_std <= eager_std:
        return Verdict(Status.BLANK, figures, f"std {figures.std:.3g}, eager {eager_std:.3g}")
    bad = not figures.error_compiled <= figures.tolerance
    return Verdict(Status.MISMATCH if bad else Status.OK, figures)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    flat = [t.detach().reshape(-1) for t in tensors]
    for start in range(0, max(1, flat[0].numel()), _CHUNK):
        yield [f[start : start + _CHUNK].double() for f in flat]


def difference(eager: Tensor, compiled: Tensor, gold: Tensor) -> tuple[Difference, float]:
    """The figures, and the standard deviation of the eager tensor; sums in float64 over the values of one shape."""
    sums = torch.zeros(12, dtype=torch.float64)
    largest = torch.zeros(2, dtype=torch.float64)
    for e, c, g in _chunks((eager, compiled, gold)):
        off = c - e
        parts = (off.abs(), off.square(), e.square(), c.square(), e * c, (c - g).square(), (e - g).square(), g.square())
        counts = (c.isnan(), c.isinf(), c, e)
        sums += torch.stack([p.sum(dtype=torch.float64) for p in (*parts, *counts)]).cpu()
        if e.numel():
            largest = torch.maximum(largest, torch.stack([off.abs().max(), e.abs().max()]).cpu())
    n = max(1, eager.numel())
    absolute, off2, e2, c2, dot, c_gold, e_gold, gold2, nans, infs, c_sum, e_sum = sums.tolist()
    peak = float(largest[1])
    factor = 3.0 if eager.dtype in _LOW else 2.0
    error_eager = _ratio(e_gold, gold2)
    limit = torch.finfo(eager.dtype).max
    figures = Difference(
        max_abs=float(largest[0]),
        mean_abs=absolute / n,
        relative_l2=_ratio(off2, e2),
        psnr=_decibel(peak * peak, off2 / n),
        cosine=1.0 if e2 == c2 == 0 else dot / math.sqrt(e2 * c2) if e2 * c2 > 0 else 0.0,
        sqnr=_decibel(e2, off2),
        nan_count=int(nans),
        inf_count=int(infs),
        peak=peak,
        headroom_bits=math.log2(limit / peak) if 0 < peak < math.inf else None,
        mean=c_sum / n,
        std=math.sqrt(max(0.0, c2 / n - (c_sum / n) ** 2)) if math.isfinite(c2) else math.nan,
        error_compiled=_ratio(c_gold, gold2),
        error_eager=error_eager,
        tolerance=factor * error_eager + FLOOR,
    )
    return figures, math.sqrt(max(0.0, e2 / n - (e_sum / n) ** 2)) if math.isfinite(e2) else math.nan


def _ratio(above: float, below: float) -> float:
    """sqrt(above / below); 0 for 0 / 0 and infinite for anything else over 0."""
    if above == 0:
        return 0.0
    return math.sqrt(above / below) if below > 0 else math.inf


def _decibel(above: float, below: float) -> float | None:
    if not (above > 0 and below > 0 and math.isfinite(below)):
        return None
    return 10 * math.log10(above / below)
