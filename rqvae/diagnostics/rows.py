"""From calls to rows of metrics.json: status, notes, figures; and roles, which need the rows of a unit's children."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rqvae.diagnostics.compare import BAD, Difference, Status
from rqvae.diagnostics.compiled import is_slower
from rqvae.diagnostics.shadow import Call
from rqvae.diagnostics.survey import Survey
from rqvae.diagnostics.units import Unit, is_inside

Row = dict[str, Any]

WORST_FIRST = (
    Status.CRASHED,
    Status.TIMEOUT,
    Status.COMPILE_ERROR,
    Status.RUNTIME_ERROR,
    Status.SHAPE,
    Status.DTYPE,
    Status.NONFINITE,
    Status.BLANK,
    Status.MISMATCH,
    Status.EAGER_FALLBACK,
    Status.OK,
)
HEADROOM_BITS = 2.0
"""OVERFLOW_RISK: less than a factor of 4 to the type's largest number."""
FIGURES = tuple(Difference.__dataclass_fields__)
TIMING = ("compile_seconds", "run_seconds", "eager_seconds", "speed_up", "fresh_graphs", "peak_memory_bytes")
"""What differs from run to run; `fresh_graphs` too, as a resumed run compiles again what a lost process had shared."""


def blank_row(index: int, unit: Unit, status: Status, notes: Iterable[str] = ()) -> Row:
    """A row without figures."""
    return {
        "index": index,
        "path": unit.path,
        "type": unit.type_name,
        "leaf": unit.leaf,
        "status": status.value,
        "role": None,
        "notes": list(notes),
        "calls": 0,
        "backend_calls": 0,
        "graphs": 0,
        **dict.fromkeys(FIGURES),
        "signatures": [],
        "graph_breaks": [],
        "error": None,
        "image": None,
        "timing": dict.fromkeys(TIMING),
    }


def bad(row: Row) -> bool:
    """Whether the compiler is to blame."""
    return Status(row["status"]) in BAD


def row_of(index: int, unit: Unit, calls: Sequence[Call], survey: Survey) -> Row:
    """The row of a unit whose calls were compiled: the worst call gives status and figures."""
    worst = max(calls, key=lambda call: (-WORST_FIRST.index(call.verdict.status), _excess(call)))
    row = blank_row(index, unit, worst.verdict.status)
    executed = [graph for call in calls for graph in call.execution.watch.executed]
    row.update(
        calls=len(calls),
        backend_calls=len(executed),
        graphs=max(len(call.execution.watch.executed) for call in calls),
        signatures=list(dict.fromkeys(survey.signatures[unit.path])),
        graph_breaks=_breaks(executed),
        error=_error(unit, worst),
        timing=_timing(calls),
    )
    if worst.verdict.figures is not None:
        row.update({name: json_number(value) for name, value in asdict(worst.verdict.figures).items()})
    row["notes"] = _notes(row, calls)
    return row


def _excess(call: Call) -> float:
    figures = call.verdict.figures
    excess = figures.error_compiled - figures.tolerance if figures else math.inf
    return excess if math.isfinite(excess) else math.inf


def json_number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity; as words they stay apart from what was not measured."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _breaks(executed: Iterable[Any]) -> list[dict[str, Any]]:
    found = {g.break_reason: {"reason": g.break_reason, "lines": list(g.lines)} for g in executed if g.break_reason}
    return list(found.values())


def _error(unit: Unit, call: Call) -> dict[str, Any] | None:
    if call.execution.failure is not None:
        failure = asdict(call.execution.failure)
        return {"class": unit.type_name, "parents": unit.parents, **failure}
    if call.verdict.words:
        return {"class": unit.type_name, "parents": unit.parents, "kind": None, "message": call.verdict.words}
    return None


def _timing(calls: Sequence[Call]) -> dict[str, Any]:
    runs = [call.execution.run_seconds for call in calls]
    run = None if any(seconds is None for seconds in runs) else sum(s for s in runs if s is not None)
    eager = sum(call.eager_seconds for call in calls)
    peaks = [call.execution.peak_bytes for call in calls if call.execution.peak_bytes is not None]
    return {
        "compile_seconds": sum(call.execution.compile_seconds for call in calls),
        "run_seconds": run,
        "eager_seconds": eager,
        "speed_up": eager / run if run else None,
        "fresh_graphs": sum(len(call.execution.watch.compiled) for call in calls),
        "peak_memory_bytes": max(peaks, default=None),
    }


def _notes(row: Row, calls: Sequence[Call]) -> list[str]:
    notes = []
    timing = row["timing"]
    if is_slower(timing["run_seconds"], timing["eager_seconds"]):
        notes.append("SLOWER")
    seen_again = len(calls) > len(row["signatures"]) and any(c.execution.watch.compiled for c in calls[1:])
    if len(row["signatures"]) > 1 or seen_again:
        notes.append("RECOMPILES")
    if row["graph_breaks"]:
        notes.append("GRAPH_BREAKS")
    if isinstance(row["headroom_bits"], float) and row["headroom_bits"] < HEADROOM_BITS:
        notes.append("OVERFLOW_RISK")
    if row["status"] == Status.EAGER_FALLBACK.value and not any(c.execution.watch.compiled for c in calls):
        notes.append("NO_COMPILED_CODE_RAN")
    return notes


def assign_roles(rows: Sequence[Row], units: Mapping[str, Unit]) -> None:
    """Give every bad row its role, in place.

    inherited: something bad is inside it. interaction: everything inside it was tested and is not bad, so that only the
    combination is. culprit: nothing inside it is bad (a leaf, or a module whose inside was not tested as a whole).
    """
    for row in (row for row in rows if bad(row)):
        inside = [other for other in rows if other is not row and is_inside(other["path"], row["path"])]
        members = [unit for path, unit in units.items() if path != row["path"] and is_inside(path, row["path"])]
        tested = {other["path"] for other in inside if other["calls"] or other["status"] == Status.CONTAINER.value}
        if any(bad(other) for other in inside):
            row["role"] = "inherited"
        elif members and all(unit.path in tested for unit in members):
            row["role"] = "interaction"
        else:
            row["role"] = "culprit"


def assign_overflow_roles(rows: Sequence[Row], first: str | None) -> None:
    """The first module whose eager output is not finite is the culprit, the others inherit it."""
    for row in rows:
        if row["status"] == Status.EAGER_NONFINITE.value:
            row["role"] = "culprit" if row["path"] == first else "inherited"
