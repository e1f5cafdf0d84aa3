"""One diagnosis of one subject: surveys, shadow decodes, the searches, and decodes with chosen units compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rqvae.backends.compilers import own_compilations
from rqvae.diagnostics.blank import STD_THRESHOLD, is_blank
from rqvae.diagnostics.breaks import Cut, CutSearch, candidates
from rqvae.diagnostics.compare import Status
from rqvae.diagnostics.compiled import CompiledUnit, failure_of, switched
from rqvae.diagnostics.compilers import Compiler
from rqvae.diagnostics.images import Decoded, ImageJudge, error_in_words, failed
from rqvae.diagnostics.ledger import Ledger
from rqvae.diagnostics.rows import Row, assign_overflow_roles, assign_roles, bad, blank_row, json_number, row_of
from rqvae.diagnostics.search import all_smallest_failing
from rqvae.diagnostics.shadow import Call, ShadowDecode
from rqvae.diagnostics.subjects import Subject
from rqvae.diagnostics.survey import Survey, survey
from rqvae.diagnostics.units import ROOT, Unit, covering, walk

Search = Literal["auto", "shadow", "top_down", "naive"]


class Listener(Protocol):
    """Told of what happens, as it happens."""

    def begin(self, path: str) -> None:
        """A unit is about to be compiled."""
        ...

    def row(self, row: Row) -> None:
        """A unit's row is known."""
        ...


class Diagnosis:
    """Compiles and compares; knows nothing of files. Use it as a context: what was compiled before is forgotten.

    Args:
        subject: decoder and latent.
        compiler: of the units.
        blank_std: see `rqvae.diagnostics.blank`.
        versions: compiled versions of one code object, None for torch's own limit, which ends in silent eager.
    """

    def __init__(
        self, subject: Subject, compiler: Compiler, blank_std: float = STD_THRESHOLD, versions: int | None = 4096
    ) -> None:
        self.subject, self.compiler, self.blank_std = subject, compiler, blank_std
        self.ledger, self.decodes = Ledger(), 0
        self.units: dict[str, Unit] = {unit.path: unit for unit in walk(subject.root)}
        self._indices = {path: index for index, path in enumerate(self.units)}
        self._device = subject.latent.device
        self._compiled: dict[str, CompiledUnit] = {}
        self._versions, self._training = versions, [module.training for module in subject.root.modules()]
        self.survey = Survey(torch.empty(0))
        self.images = ImageJudge(subject, self.survey, blank_std)

    def __enter__(self) -> Diagnosis:
        self._context = own_compilations(self._versions)
        self._context.__enter__()
        self.subject.root.eval()
        self.survey = survey(self._decode, list(self.units.values()))
        self.images = ImageJudge(self.subject, self.survey, self.blank_std)
        return self

    def __exit__(self, *error: object) -> None:
        for module, training in zip(self.subject.root.modules(), self._training, strict=True):
            module.training = training
        self._compiled.clear()
        self._context.__exit__(None, None, None)

    @property
    def overflows(self) -> bool:
        """Whether the eager image is not finite, so that no image says anything about the compiler."""
        return self.images.overflows

    def _decode(self) -> Tensor:
        self.decodes += 1
        return self.subject.decode(self.subject.latent)

    def compiled(self, path: str) -> CompiledUnit:
        """A unit's compiled call, made once. Must not be asked for while hooks are registered."""
        if path not in self._compiled:
            self._compiled[path] = CompiledUnit(self.units[path], self.compiler, self.ledger, self._device)
        return self._compiled[path]

    def single(self, paths: Sequence[str], done: Mapping[str, Row], search: Search, listener: Listener) -> list[Row]:
        """A row for each path, roles included.

        Args:
            paths: the units asked for.
            done: rows of an earlier call, which are taken over.
            search: shadow tests every unit; top_down those inside what is bad; auto stops after a healthy whole;
                naive decodes once a unit with only that unit compiled, which judges by the image alone.
            listener: told of each new row.
        """
        rows = {path: row for path, row in done.items() if path in paths}
        called = [path for path in paths if path in self.survey.calls and path not in self.survey.nonfinite]
        ways = {"naive": self._naive, "shadow": self._shadow, "top_down": self._top_down, "auto": self._auto}
        ways[search](called, rows, listener)
        for path in paths:
            if path not in rows:
                rows[path] = self._untested(path, search)
                listener.row(rows[path])
        ordered = [rows[path] for path in paths]
        assign_roles(ordered, {path: self.units[path] for path in self.units if path in rows or path in called})
        assign_overflow_roles(ordered, self.survey.first_nonfinite)
        return ordered

    def _untested(self, path: str, search: Search) -> Row:
        unit = self.units[path]
        if path in self.survey.nonfinite:
            return blank_row(self._indices[path], unit, Status.EAGER_NONFINITE)
        if path in self.survey.calls:
            return blank_row(self._indices[path], unit, Status.NOT_EXERCISED, [f"SKIPPED_BY_{search.upper()}"])
        only_holds = unit.container or (not unit.leaf and type(unit.module) is torch.nn.Sequential)
        return blank_row(self._indices[path], unit, Status.CONTAINER if only_holds else Status.NOT_EXERCISED)

    def _shadow(self, paths: Sequence[str], rows: dict[str, Row], listener: Listener) -> None:
        def on_unit(path: str, calls: list[Call]) -> None:
            rows[path] = row_of(self._indices[path], self.units[path], calls, self.survey)
            listener.row(rows[path])

        left = {path: self.compiled(path) for path in paths if path not in rows}
        if left:
            shadow = ShadowDecode(left, self.survey, on_unit, listener.begin, self.blank_std)
            self.decodes += 1
            shadow.run(self.subject.decoding())

    def _auto(self, paths: Sequence[str], rows: dict[str, Row], listener: Listener) -> None:
        whole: dict[str, Row] = {path: row for path, row in rows.items() if path == ROOT}
        self._shadow([ROOT], whole, listener)
        rows.update({path: row for path, row in whole.items() if path in paths})
        if bad(whole[ROOT]):
            self._shadow(paths, rows, listener)

    def _top_down(self, paths: Sequence[str], rows: dict[str, Row], listener: Listener) -> None:
        level = [path for path in paths if not any(other in paths for other in self.units[path].parents)]
        while level:
            self._shadow(level, rows, listener)
            failing = [path for path in level if bad(rows[path])]
            level = [
                path for path in paths if path not in rows and self._nearest(path, rows.keys() | set(paths)) in failing
            ]

    def _nearest(self, path: str, among: Iterable[str]) -> str | None:
        """The closest unit around a path that is among those given and can be called."""
        return next(
            (outer for outer in reversed(self.units[path].parents) if outer in among and outer in self.survey.calls),
            None,
        )

    def _naive(self, paths: Sequence[str], rows: dict[str, Row], listener: Listener) -> None:
        for path in (path for path in paths if path not in rows):
            torch._dynamo.reset()
            listener.begin(path)
            compiled = CompiledUnit(self.units[path], self.compiler, self.ledger, self._device)
            decoded = self.decode_switched([compiled])
            rows[path] = blank_row(self._indices[path], self.units[path], decoded.verdict.status, decoded.notes)
            rows[path].update(**decoded.counts(), image=decoded.facts, error=decoded.error)
            rows[path]["timing"]["fresh_graphs"] = sum(run.fresh_graphs for run in decoded.runs)
            listener.row(rows[path])

    def decode_with(self, paths: Iterable[str]) -> Decoded:
        """The image with exactly these units compiled; nothing is compiled again that was compiled before."""
        return self.decode_switched([self.compiled(path) for path in paths])

    def decode_switched(self, compiled: Sequence[CompiledUnit]) -> Decoded:
        """The image with these units' compiled calls in place of their own."""
        with switched(compiled) as runs:
            try:
                with torch.no_grad():
                    image = self._decode()
            except Exception as error:  # noqa: BLE001  (whatever compiled code raises is its verdict)
                return failed(error, runs, lambda raised: failure_of(raised, self.subject.latent))
        verdict, notes = self.images.verdict(image, runs)
        return Decoded(image, verdict, self.image_facts(image), runs, error_in_words(verdict), notes)

    def costs(self) -> dict[str, Any]:
        """Decodes and compiled graphs so far, and what images were judged by."""
        return {
            "decodes": self.decodes + self.images.decodes,
            "compiled_graphs": len(self.ledger.graphs),
            "image_reference": self.images.facts(),
        }

    def image_facts(self, image: Tensor) -> dict[str, Any]:
        """Mean, std, blank and PSNR (dB, peak 1, against the eager image) of an image clamped to [0, 1]."""
        shown, reference = image.float().clamp(0, 1), self.survey.image.float().clamp(0, 1)
        same_shape = shown.shape == reference.shape
        error = float((shown - reference).square().mean()) if same_shape else float("nan")
        return {
            "mean": json_number(float(shown.mean())),
            "std": json_number(float(shown.std(correction=0))),
            "blank": is_blank(shown, self.blank_std),
            "psnr": float(-10 * torch.tensor(error).log10()) if error > 0 else None,
        }

    def interactions(self, rows: Sequence[Row], before: Callable[[], None] = lambda: None) -> list[list[str]]:
        """Sets of leaf units that are right alone and wrong together, of those whose rows are OK.

        None is looked for where the eager image is not finite: every image would differ from it. `before` is called in
        front of each decode.
        """
        if self.overflows:
            return []
        right = {row["path"] for row in rows if row["status"] == Status.OK.value}
        leaves = [path for path in self.survey.order if path in right and self.units[path].leaf]
        compiled = {path: self.compiled(path) for path in leaves}

        def fails(paths: Sequence[str]) -> bool:
            before()
            return self.decode_switched([compiled[path] for path in paths]).is_bad

        return all_smallest_failing(leaves, fails)

    def exclusions(self, excluded: Sequence[str]) -> list[tuple[str, list[str], list[str]]]:
        """(name, paths that stay eager, units to compile) of `combined`, one `excluded.PATH` each, and `interaction`.

        combined: all but the excluded is compiled. excluded.PATH: PATH is compiled too, the others still are not: what
        it does by itself. interaction: nothing is excluded.
        """
        units = list(self.units.values())
        rest = covering(units, excluded)
        sets = [("combined", list(excluded), rest)]
        for path in excluded:
            # the path as a unit of its own beside the rest, so that only it differs from `combined`
            others = [other for other in excluded if other != path]
            sets.append((f"excluded.{path}", others, [*rest, *self._own_units(path)]))
        sets.append(("interaction", [], covering(units, [])))
        return [
            (name, eager, [unit.path for unit in chosen if unit.path in self.survey.calls])
            for name, eager, chosen in sets
        ]

    def _own_units(self, path: str) -> list[Unit]:
        """A unit, or a container's members."""
        if not self.units[path].container:
            return [self.units[path]]
        return [unit for unit in self.units.values() if path in self.units[unit.path].parents[-1:]]

    def find_breaks(self, rows: Sequence[Row]) -> tuple[list[Cut], list[Cut]]:
        """Cuts that heal, one a unit, and all that were tried, of units that are bad though nothing inside them is."""
        every = list(self.units.values())
        wanted = [row["path"] for row in rows if bad(row) and row["role"] == "interaction"]
        tries = {path: (self.units[path], candidates(self.units[path], self.survey, every)) for path in wanted}
        search = CutSearch(self.compiler, self.ledger, self._device, self.blank_std)
        self.decodes += bool(tries)
        return (search.run(self.subject.decoding(), tries) if tries else []), search.tried
