"""Whole images, decoded with chosen units compiled: what they are judged by, and what was found out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rqvae.diagnostics.compare import BAD, Status, Verdict, judge
from rqvae.diagnostics.compiled import Failure, SwitchedRun
from rqvae.diagnostics.subjects import Subject
from rqvae.diagnostics.survey import Survey

log = logging.getLogger(__name__)

_LOW = (torch.bfloat16, torch.float16)
NOTHING_COMPILED = "NOTHING_COMPILED"


@dataclass(frozen=True)
class Decoded:
    """An image decoded with some units compiled.

    Args:
        image: (B, 3, H, W) in [0, 1], not clamped; None where decoding raised.
        verdict: against the eager image.
        facts: mean, std, blank and PSNR of the image.
        runs: what the compiled code of each unit did.
        error: class, path and parents of the unit that raised, kind, message, signature and trace; None without one.
        notes: NOTHING_COMPILED, or which units ran eager.
    """

    image: Tensor | None
    verdict: Verdict
    facts: dict[str, Any]
    runs: Sequence[SwitchedRun] = ()
    error: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_bad(self) -> bool:
        """Whether the compiler made another image, or none."""
        return self.verdict.status in BAD

    def counts(self) -> dict[str, int]:
        """Calls of the units, and runs of compiled graphs in them."""
        return {
            "calls": sum(run.calls for run in self.runs),
            "backend_calls": sum(run.backend_calls for run in self.runs),
        }


@contextlib.contextmanager
def widened(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within, the floating-point weights of a model are of a higher precision; afterwards the same memory as before."""
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()}
    before = [(tensor, tensor.data) for tensor in tensors.values()]
    try:
        for tensor, data in before:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


class ImageJudge:
    """Judges images of one subject by the rule for units: relative to one of higher precision, decoded when needed.

    bf16 and fp16 are judged by an image of float32 weights; fp32 by the eager one, and by one of float64 where that
    says MISMATCH. Where the model cannot decode in that precision the eager image decides, and `error` says why.

    Args:
        subject: decoder and latent.
        survey: of its eager decode.
        blank_std: see `rqvae.diagnostics.compare.judge`.
    """

    def __init__(self, subject: Subject, survey: Survey, blank_std: float) -> None:
        self._subject, self._survey, self._blank_std = subject, survey, blank_std
        self._gold: Tensor | None = None
        self._model = subject.root if subject.model is None else subject.model
        self.low = survey.image.dtype in _LOW or any(p.dtype in _LOW for p in self._model.parameters())
        self.overflows = not bool(survey.image.isfinite().all())
        self.decodes, self.error = 0, ""

    def verdict(self, image: Tensor, runs: Sequence[SwitchedRun]) -> tuple[Verdict, list[str]]:
        """Status and notes of an image that was decoded with these units compiled; OK only where all of them ran."""
        if self.overflows:
            return Verdict(Status.EAGER_NONFINITE, words="the eager image is not finite"), []
        eager = self._survey.image
        found = judge(eager, image, self._reference() if self.low else None, self._blank_std)
        if found.status is Status.MISMATCH and not self.low:
            found = judge(eager, image, self._reference(), self._blank_std)
        if found.status is not Status.OK:
            return found, []
        if not runs:
            return Verdict(Status.NOT_EXERCISED, found.figures, "nothing is compiled"), [NOTHING_COMPILED]
        silent = [run.unit.path for run in runs if not run.backend_calls]
        fallen = [path for path in silent if path not in self._survey.passing]
        if fallen or len(silent) == len(runs):
            notes = [f"NO_COMPILED_CODE_RAN {path}" for path in fallen or silent]
            return Verdict(Status.EAGER_FALLBACK, found.figures, "no compiled code ran"), notes
        return found, []

    def _reference(self) -> Tensor | None:
        if self._gold is None and not self.error:
            dtype = torch.float32 if self.low else torch.float64
            self.decodes += 1
            try:
                with widened(self._model, dtype), torch.no_grad():
                    self._gold = self._subject.decode(self._subject.latent.to(dtype))
            except Exception as error:  # noqa: BLE001  (whatever a model raises in a precision that it is not made for)
                self.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                log.warning("no image in %s, the eager one is the reference: %s", dtype, self.error)
        return self._gold

    def facts(self) -> dict[str, Any]:
        """What images are judged by, for the summary."""
        used = "eager" if self._gold is None else str(self._gold.dtype).removeprefix("torch.")
        return {"precision": used, "error": self.error or None}


_NOWHERE: dict[str, Any] = {"class": None, "path": None, "parents": []}


def error_in_words(verdict: Verdict) -> dict[str, Any] | None:
    """What is wrong with an image that was decoded, where no figure says it."""
    if verdict.status not in BAD or not verdict.words:
        return None
    return {**_NOWHERE, "kind": None, "message": verdict.words}


def failed(error: Exception, runs: Sequence[SwitchedRun], failure_of: Callable[[Exception], Failure]) -> Decoded:
    """A decode that raised: in a unit's compiled code, or behind it, in eager code that was given something else."""
    run = next((run for run in runs if run.failure is not None), None)
    failure = run.failure if run is not None and run.failure is not None else failure_of(error)
    where = {"class": run.unit.type_name, "path": run.unit.path, "parents": run.unit.parents} if run else _NOWHERE
    status = run.status if run else Status.RUNTIME_ERROR
    facts = dict.fromkeys(("mean", "std", "blank", "psnr"))
    return Decoded(None, Verdict(status, words=failure.message), facts, runs, {**where, **asdict(failure)})
