"""--mode compile_except: images with all but some submodules compiled, kept beside an earlier diagnosis."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from rqvae.diagnostics.compare import Status
from rqvae.diagnostics.journal import Journal
from rqvae.diagnostics.rows import Row, bad, blank_row
from rqvae.diagnostics.session import Diagnosis
from rqvae.diagnostics.summary import summarise
from rqvae.diagnostics.units import ROOT
from rqvae.trainers.diagnostic_files import DiagnosticFiles
from rqvae.trainers.diagnostic_listener import DIED, DiagnosticListener

_SAME = ("subject", "root", "dtype", "latent", "compiler", "device", "seed", "blank_std")
"""Values of a config that two diagnoses of one thing share."""


def key_of(excluded: Sequence[str]) -> str:
    """The key of a set of exclusions in `summary.compile_except`."""
    return ",".join(excluded)


class Exclusions:
    """Decodes with all but a set of submodules compiled, with each of them compiled too, and with everything compiled.

    Args:
        files: where pictures go.
        journal: rows of an earlier, interrupted call.
        listener: told of each row.
        every_image: pictures of rows that are OK too.
    """

    def __init__(
        self, files: DiagnosticFiles, journal: Journal, listener: DiagnosticListener, every_image: bool
    ) -> None:
        self._files, self._journal, self._listener, self._every_image = files, journal, listener, every_image

    def run(self, diagnosis: Diagnosis, excluded: Sequence[str]) -> tuple[list[Row], dict[str, Any]]:
        """Rows combined, excluded.PATH and interaction, and their summary."""
        # two sets have rows of one name: the set's hash keeps their pictures apart
        group = f"except_{hashlib.sha256(key_of(excluded).encode()).hexdigest()[:8]}_"
        rows: list[Row] = []
        for index, (name, eager, compiled) in enumerate(diagnosis.exclusions(excluded)):
            row = self._journal.rows.get(name)
            if row is None:
                row = blank_row(index, diagnosis.units[ROOT], Status(self._journal.lost.get(name, Status.OK)))
                row |= {"path": name, "excluded": eager, "compiled": compiled}
                if row["status"] not in DIED:
                    self._listener.begin(name)
                    self._decode(diagnosis, row, group)
                self._listener.row(row)
            rows.append(row)
        alone = [row for row in rows if row["path"].startswith("excluded.")]
        for row in (row for row in rows if bad(row)):
            together = row["path"] == "interaction" and len(alone) > 1 and not any(map(bad, alone))
            row["role"] = "interaction" if together else "culprit" if row in alone else "inherited"
        return rows, summarise(rows)

    def _decode(self, diagnosis: Diagnosis, row: Row, group: str) -> None:
        decoded = diagnosis.decode_with(row["compiled"])
        row |= {"status": decoded.verdict.status.value, "notes": decoded.notes, "error": decoded.error}
        row |= {"image": {**decoded.facts, "source": "decoded"}, **decoded.counts()}
        if decoded.image is not None and (decoded.is_bad or self._every_image):
            row["image"] |= self._files.unit_pictures(row, decoded.image, diagnosis.survey.image, group)


def beside(earlier: Mapping[str, Any] | None, whole: dict[str, Any], excluded: Sequence[str]) -> dict[str, Any]:
    """metrics.json with these rows of compile_except at `summary.compile_except`, under the key of the exclusions.

    What an earlier diagnosis of the same subject with the same compiler found stays as it is: its submodules' rows, its
    summary, its config, and the sets that were excluded before.

    Args:
        earlier: metrics.json that was there, or None.
        whole: results, summary and config of this call.
        excluded: its set.
    """
    entry = {"excluded": list(excluded), "results": whole["results"], "summary": dict(whole["summary"])}
    same = earlier is not None and all(earlier["config"].get(k) == whole["config"].get(k) for k in _SAME)
    kept = earlier if same and earlier is not None else None
    sets = dict(kept["summary"].get("compile_except", {})) if kept else {}
    sets.pop(key_of(excluded), None)  # so that the latest comes last
    sets[key_of(excluded)] = entry
    base = kept if kept and kept["config"]["mode"] != "compile_except" else whole
    return {**base, "summary": {**base["summary"], "compile_except": sets}}
