"""The rows of the runs that a run was started from, so that its curves begin where the training began."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rqvae.reports.metrics_file import read_metrics


def earlier_rows(environment: dict[str, Any], first_step: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows before a run's own first one, from the run that its `resumed_from` names, and from that one's and so on.

    Of a run that went on elsewhere only the rows up to the checkpoint belong to the run that was started from it.

    Args:
        environment: of the run, as environment.json has it.
        first_step: of its own rows.

    Returns:
        The rows, oldest first, and the names of the runs that they are of, oldest first; a folder that is no longer
        there, or has no rows, ends the search.

    Raises:
        BadInput: metrics of an earlier run that cannot be read.
    """
    rows: list[dict[str, Any]] = []
    names: list[str] = []
    seen: set[Path] = set()
    while source := environment.get("resumed_from"):
        folder, last_step = _run_of(Path(source), first_step - 1)
        metrics, note = folder / "metrics.jsonl", folder / "environment.json"
        if folder in seen or not metrics.is_file() or not note.is_file() or not metrics.stat().st_size:
            break
        seen.add(folder)
        own = [row for row in read_metrics(metrics, folder.name).rows if row["step"] <= last_step]
        rows, names = own + rows, [folder.name, *names]
        first_step = own[0]["step"] if own else last_step + 1
        environment = json.loads(note.read_text(encoding="utf-8"))
    return rows, names


def _run_of(source: Path, last_step: int) -> tuple[Path, int]:
    """The run folder of a checkpoint or run folder, and the last step that was taken over from it."""
    step = re.fullmatch(r"step_(\d+)", source.name)
    if step and source.parent.name == "checkpoints":
        return source.parent.parent, int(step[1])
    return source, last_step
