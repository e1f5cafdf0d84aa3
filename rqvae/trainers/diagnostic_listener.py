"""What is done with a row of a diagnosis as it comes: journal, mirrors, progress, and its picture afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rqvae.diagnostics.compare import Status
from rqvae.diagnostics.images import Decoded
from rqvae.diagnostics.journal import Journal
from rqvae.diagnostics.rows import Row
from rqvae.diagnostics.session import Diagnosis
from rqvae.trainers.diagnostic_files import DiagnosticFiles, Mirrors

DIED = (Status.CRASHED.value, Status.TIMEOUT.value)
_WHY_NO_PICTURE = {
    Status.CRASHED: "its code ends the process",
    Status.TIMEOUT: "its code does not end",
    Status.NOT_EXERCISED: "it was not tested",
    Status.CONTAINER: "it only holds modules",
}


class DiagnosticListener:
    """Journal, mirrors and progress of one diagnosis.

    Args:
        journal: of the rows.
        mirrors: told of the rows.
        reference: facts of the eager image.
        every_image: whether rows that are OK get an image of their own.
        progress: told of (path, units that have ended, units in all).
        total: units in all.
    """

    def __init__(
        self,
        journal: Journal,
        mirrors: Mirrors,
        reference: dict[str, Any],
        every_image: bool,
        progress: Callable[[str, int, int], None],
        total: int,
    ) -> None:
        self._journal, self._mirrors, self._every_image = journal, mirrors, every_image
        self._reference = {name: reference[name] for name in ("mean", "std", "blank", "file")}
        self._progress, self._total = progress, total

    def decodes(self, row: Row) -> bool:
        """Whether a row gets an image of its own: always where it is not OK, unless its code ends the process."""
        if row["status"] == Status.OK.value:
            return self._every_image and bool(row["calls"])
        return row["status"] not in _WHY_NO_PICTURE

    def begin(self, path: str) -> None:
        """A unit is about to be compiled, or decoded with."""
        self._progress(path, len(self._journal.rows), self._total)
        self._journal.begin(path)

    def row(self, row: Row) -> None:
        """A unit has ended."""
        if row["image"] is None and row["status"] == Status.OK.value and not self.decodes(row):
            # its output agreed, so its image would be the reference up to that
            reference = {name: self._reference[name] for name in ("mean", "std", "blank")}
            row["image"] = {**reference, "psnr": None, "source": "reference"}
        self._journal.row(row)
        self._mirrors.row(row)

    def picture(self, diagnosis: Diagnosis, row: Row, files: DiagnosticFiles) -> None:
        """The image with exactly this unit compiled, where it is wanted and not there from an earlier call; or why
        there is none."""
        image = row.get("image") or {}
        if "file" in image or "source" in image:
            return
        if not self.decodes(row):
            if row["status"] != Status.OK.value:
                empty = dict.fromkeys(("mean", "std", "blank", "psnr"))
                row["image"] = {**empty, **image, "no_picture": _WHY_NO_PICTURE[Status(row["status"])]}
            return
        self.begin(row["path"])
        decoded: Decoded = diagnosis.decode_with([row["path"]])
        row["image"] = dict(decoded.facts)
        if decoded.image is not None:
            row["image"] |= files.unit_pictures(row, decoded.image, diagnosis.survey.image)
        elif decoded.error is not None:
            row["image"]["no_picture"] = f"the decode raised {decoded.error['kind']}"
        status = decoded.verdict.status.value
        row["image"] |= {"source": "decoded", "status": status, "reference": self._reference["file"]}
        self._journal.row(row)
        self._mirrors.picture(row)
