"""The compile diagnostic as an evaluation of a Stage1 model, or of any decoder with a latent."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from rqvae.backends import Backend
from rqvae.diagnostics.blank import STD_THRESHOLD
from rqvae.diagnostics.breaks import Cut
from rqvae.diagnostics.compare import Status
from rqvae.diagnostics.compiled import CompiledUnit
from rqvae.diagnostics.compilers import Compiler
from rqvae.diagnostics.journal import Journal
from rqvae.diagnostics.plan import CompilePlan, find_root
from rqvae.diagnostics.rows import TIMING, Row, blank_row
from rqvae.diagnostics.session import Diagnosis, Search
from rqvae.diagnostics.subjects import LatentSource, Request, Subject
from rqvae.diagnostics.summary import bad_paths, summarise
from rqvae.diagnostics.units import Filter, Unit, covering, parse_paths, select, walk
from rqvae.errors import BadInput
from rqvae.models.interfaces import LabeledImageData, Stage1Encodings
from rqvae.run import AnyRun
from rqvae.trainers.diagnostic_except import Exclusions, beside
from rqvae.trainers.diagnostic_files import DiagnosticFiles, Mirrors
from rqvae.trainers.diagnostic_listener import DIED, DiagnosticListener
from rqvae.trainers.evaluation_trainer import SplitWalk, load_stage1
from rqvae.weight_files import write_tensors

log = logging.getLogger(__name__)

Mode = Literal["single", "compile_except", "find_breaks"]
_INTERACTIONS, _BREAKS, _PLAN = "<interactions>", "<breaks>", "<plan>"
"""What a journal calls the searches that follow the units."""


@dataclass(frozen=True)
class DiagnosticSettings:
    """What to test and what to write.

    Args:
        output: folder of everything that is written.
        which: all, leaf or non-leaf submodules.
        mode: single tests each submodule; compile_except all but some at once; find_breaks is single, and cuts the
            graphs of what is bad only as a whole.
        exclude_path: of compile_except: paths or a file of them; None reads bad_paths.txt in `output`.
        test_paths: only these, paths or a file of them; makes mode single and filter all.
        search: how single goes about it, see `rqvae.diagnostics.session.Diagnosis.single`.
        save_images: images of rows that are OK too.
        blank_std: standard deviation below which an image is blank.
        resume: an unfinished journal must be there. Without it one that is there is gone on with.
        tensorboard: write events.
        wandb: (project, run name), or None.
        model: name of the subject, which a kept latent must be of.
        compiler: as `--backend` takes it, for the compile plan.
    """

    output: Path
    which: Filter = "all"
    mode: Mode = "single"
    exclude_path: str | None = None
    test_paths: str | None = None
    search: Search = "shadow"
    save_images: bool = False
    blank_std: float = STD_THRESHOLD
    resume: bool = False
    tensorboard: bool = False
    wandb: tuple[str, str] | None = None
    model: str = ""
    compiler: str = "inductor"

    def __post_init__(self) -> None:
        if self.exclude_path is not None and self.mode != "compile_except":
            raise BadInput(f"--exclude_path: expected with --mode compile_except only, got --mode {self.mode}")


class Stage1Source:
    """A Stage1 run with its test split: the latents are those of the split's first images.

    Args:
        run: the run's config, instantiated.
        ckpt: run or checkpoint folder with its weights.
        backend: of the device.
    """

    def __init__(self, run: AnyRun, ckpt: str | None, backend: Backend) -> None:
        self._run, self._ckpt, self._backend = run, ckpt, backend

    def subject(self, request: Request, latent: Tensor | None = None) -> Subject:
        """The model's decoder, on the request's device."""
        stage1 = self._run.stage1
        weights = load_stage1(stage1, self._ckpt, "--model_name")
        stage1 = stage1.eval().requires_grad_(False).to(request.device, request.dtype)
        path, root = find_root(stage1, request.root)
        if latent is None:
            walked = SplitWalk(self._run.data, "test", self._backend).first(request.batch_size)
            images = walked.require_img().to(request.device, next(stage1.parameters()).dtype)
            with torch.no_grad():
                latent = stage1.encode(LabeledImageData(img=images)).zs

        def decode(z: Tensor) -> Tensor:
            return stage1.decode(Stage1Encodings(zs=z)).xs_recon

        words = f"{type(stage1).__name__} of {self._ckpt or 'its own weights'}, latents of the test split"
        return Subject(root, path, latent, decode, words, {"stage1_sha256": weights}, stage1)


class VaeDiagnostic:
    """Runs a diagnosis and writes its folder.

    Args:
        source: of the subject.
        request: how the latent is made.
        compiler: of the units.
        settings: what to test and what to write.
        progress: told of (path, units that have ended, units in all).
    """

    def __init__(
        self,
        source: LatentSource,
        request: Request,
        compiler: Compiler,
        settings: DiagnosticSettings,
        progress: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        if settings.mode == "find_breaks" and not compiler.has_graphs:
            raise BadInput(
                f"--mode find_breaks: expected a compiler of FX graphs, which can be cut, got {compiler.name}"
            )
        self._source, self._request, self._compiler, self._settings = source, request, compiler, settings
        self.progress = progress
        self.files = DiagnosticFiles(settings.output)
        self.mode: Mode = "single" if settings.test_paths else settings.mode

    def _subject(self) -> Subject:
        """The subject, with the latent of an earlier call of the same request: the denoiser runs once."""
        kept, note = self.files.folder / "latent.safetensors", self.files.folder / "latent.json"
        request = {"model": self._settings.model, "request": str(self._request)}
        known = note.exists() and kept.exists() and json.loads(note.read_text()).get("request") == request
        facts = json.loads(note.read_text())["facts"] if known else {}
        latent = load_file(kept)["latent"].to(self._request.device) if known else None
        subject = self._source.subject(self._request, latent)
        subject.facts |= facts
        if not known:
            write_tensors({"latent": subject.latent.detach().cpu().contiguous()}, kept)
            note.write_text(json.dumps({"request": request, "facts": subject.facts}))
        return subject

    def list_submodules(self) -> tuple[list[Unit], Path, str]:
        """Write the list of submodules, test nothing; returns them, the list's file, and what it is of."""
        nothing = torch.empty(0)  # in place of a latent, for which a denoiser would run
        subject = self._source.subject(self._request, nothing)
        units = walk(subject.root)
        return units, self.files.write_submodules(units, subject.words), subject.words

    def execute(self) -> dict[str, Any]:
        """Run and write; returns metrics.json's content."""
        settings, subject = self._settings, self._subject()
        units = walk(subject.root)
        self.files.write_submodules(units, subject.words)
        paths, excluded = self._paths(units, self.mode)
        config = self._config(subject, self.mode, excluded)
        earlier = self.files.read_metrics() if self.mode == "compile_except" else None
        header = {key: value for key, value in config.items() if key != "threads"}
        journal = Journal(self.files.folder / "journal.jsonl", header, settings.resume)
        try:
            with Diagnosis(subject, self._compiler, settings.blank_std) as diagnosis:
                config["reference"] = {
                    "file": self.files.picture("reference", diagnosis.survey.image),
                    **diagnosis.image_facts(diagnosis.survey.image),
                }
                mirrors = Mirrors(self.files.folder, settings.tensorboard, settings.wandb, config, len(journal.rows))
                listener = DiagnosticListener(
                    journal, mirrors, config["reference"], settings.save_images, self.progress, len(paths)
                )
                if self.mode == "compile_except":
                    sets = Exclusions(self.files, journal, listener, settings.save_images)
                    rows, summary = sets.run(diagnosis, excluded)
                else:
                    rows, summary = self._single(diagnosis, paths, config, journal, listener)
                summary |= diagnosis.costs() | {"logging_errors": mirrors.errors}
            whole = {"results": rows, "summary": summary, "config": config}
            if self.mode == "compile_except":
                whole = beside(earlier, whole, excluded)
            self.files.write_metrics(whole)
            journal.finish()
            mirrors.close(summary)
        finally:
            journal.close()
        return whole

    def _paths(self, units: Sequence[Unit], mode: Mode) -> tuple[list[str], list[str]]:
        """What is tested by itself, and what compile_except leaves eager."""
        settings = self._settings
        if mode == "compile_except":
            if settings.exclude_path is not None:
                return [], parse_paths(settings.exclude_path, units, "--exclude_path")
            if not self.files.bad_paths.exists():
                where = self.files.bad_paths
                raise BadInput(f"--exclude_path: expected paths, or {where} of an earlier --mode single, found neither")
            lines = self.files.bad_paths.read_text().splitlines()
            named = any(line.split("#")[0].strip() for line in lines)  # a healthy decoder's file names none
            return [], parse_paths(str(self.files.bad_paths), units, "--exclude_path") if named else []
        if settings.test_paths is not None:
            return parse_paths(settings.test_paths, units, "--test_paths"), []
        return [unit.path for unit in select(units, settings.which)], []

    def _config(self, subject: Subject, mode: Mode, excluded: Sequence[str]) -> dict[str, Any]:
        settings, request = self._settings, self._request
        return {
            **subject.describe(),
            "compiler": self._compiler.name,
            "device": str(request.device),
            "mode": mode,
            "filter": "all" if settings.test_paths else settings.which,
            "test_paths": settings.test_paths,
            "excluded": list(excluded),
            "search": settings.search,
            "blank_std": settings.blank_std,
            "seed": request.seed,
            "batch_size": request.batch_size,
            "prompt": request.prompt,
            "steps": request.steps,
            "save_images": settings.save_images,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "threads": torch.get_num_threads(),
        }

    def _single(
        self,
        diagnosis: Diagnosis,
        paths: Sequence[str],
        config: dict[str, Any],
        journal: Journal,
        listener: DiagnosticListener,
    ) -> tuple[list[Row], dict[str, Any]]:
        if journal.goes_on and journal.rows:
            log.info("%s: going on, %d of %d units are known", journal.path, len(journal.rows), len(paths))
        order = list(diagnosis.units)
        for path, status in list(journal.lost.items()):
            if path in diagnosis.units:
                listener.row(blank_row(order.index(path), diagnosis.units[path], Status(status)))
        search = self._settings.search
        rows = diagnosis.single(paths, dict(journal.rows), search, listener)
        for row in rows:
            listener.picture(diagnosis, row, self.files)
        without = {stage.strip("<>"): status for stage, status in journal.lost.items() if stage.startswith("<")}
        without.pop("root", None)
        if diagnosis.overflows:
            without["interactions"] = f"{Status.EAGER_NONFINITE.value}, the eager image is not finite"
        sets: list[list[str]] = []
        if search != "naive" and "interactions" not in without:
            sets = diagnosis.interactions(rows, lambda: journal.begin(_INTERACTIONS))
        cuts: tuple[list[Cut], list[Cut]] = ([], [])
        if self.mode == "find_breaks" and "breaks" not in without:
            journal.begin(_BREAKS)
            cuts = diagnosis.find_breaks(rows)
        summary = summarise(rows, [{"paths": s, "status": "together"} for s in sets], [vars(c) for c in cuts[0]])
        summary |= {"tried_graph_breaks": [vars(c) for c in cuts[1]], "not_searched": without}
        journal.begin(_PLAN)
        summary["plan"] = self._plan(diagnosis, rows, sets, cuts[0], config, without.get("plan"))
        self.files.write_bad_paths([*bad_paths(rows), *(paths_[0] for paths_ in sets)], config["subject"])
        return rows, summary

    def _plan(
        self,
        diagnosis: Diagnosis,
        rows: Sequence[Row],
        sets: Sequence[Sequence[str]],
        cuts: Sequence[Cut],
        config: dict[str, Any],
        died: str | None,
    ) -> dict[str, Any]:
        """Write compile_plan.yaml, decode with it unless that ended a process before, and say what came of it."""
        breaks = {cut.path: [cut.before] for cut in cuts}
        eager = [path for path in bad_paths(rows) if path not in breaks] + [found[0] for found in sets]
        units = list(diagnosis.units.values())
        whole = [unit for unit in covering(units, [*eager, *breaks]) if unit.path in diagnosis.survey.calls]
        compiled = [*(unit.path for unit in whole), *breaks]
        plan = CompilePlan(self._request.root, self._settings.compiler, compiled, breaks, eager, config["subject"])
        file = self.files.folder / "compile_plan.yaml"
        plan.write(file)
        made = [diagnosis.compiled(path) for path in compiled if path not in breaks]
        made += [
            CompiledUnit(diagnosis.units[path], self._compiler, diagnosis.ledger, self._request.device, before)
            for path, before in breaks.items()
        ]
        said = {"file": file.name, "compile": len(compiled), "breaks": breaks, "eager": eager, "status": died}
        if died is None and any(row["status"] in DIED for row in rows):
            said["status"] = "not tried"  # what crashes a process is not tried again in this one
        elif died is None and diagnosis.overflows:
            said["status"] = Status.EAGER_NONFINITE.value
        elif died is None:
            decoded = diagnosis.decode_switched(made)
            said |= {"status": decoded.verdict.status.value, "notes": decoded.notes, **decoded.counts()}
        return said


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    """metrics.json without what a clock, or the sharing of graphs between calls, decides."""
    rows = []
    for row in metrics["results"]:
        kept = {key: value for key, value in row.items() if key != "timing"}
        rows.append({**kept, "notes": [note for note in row["notes"] if note != "SLOWER"]})
    summary = {k: v for k, v in metrics["summary"].items() if k not in ("decodes", "compiled_graphs", *TIMING)}
    return {"results": rows, "summary": summary, "config": metrics["config"]}
