"""What the rows say together. Every row is counted once, so that the counts sum to their total."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rqvae.diagnostics.compare import BAD, Status
from rqvae.diagnostics.rows import Row, bad

UNTESTED = frozenset({Status.CONTAINER, Status.NOT_EXERCISED, Status.EAGER_FALLBACK, Status.EAGER_NONFINITE})
"""No verdict on the compiler: nothing was called, nothing compiled ran, or eager itself is not finite."""


def summarise(
    rows: Sequence[Row], interactions: Sequence[Mapping[str, Any]] = (), breaks: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The summary of metrics.json.

    total = compiled + failed + blank + untested; `failed` is every bad status but BLANK; rate = compiled / (compiled +
    failed + blank).

    Args:
        rows: of metrics.json.
        interactions: sets of units that only fail together.
        breaks: cuts that heal.
    """
    counts = Counter(row["status"] for row in rows)
    compiled, blank = counts[Status.OK.value], counts[Status.BLANK.value]
    failed = sum(counts[status.value] for status in BAD) - blank
    tested = compiled + failed + blank
    images = [row["image"] for row in rows if row.get("image")]
    return {
        "total": len(rows),
        "compiled": compiled,
        "failed": failed,
        "blank": blank,
        "untested": len(rows) - tested,
        "statuses": dict(sorted(counts.items())),
        "success_rate": compiled / tested if tested else None,
        "average_mean": _mean([image["mean"] for image in images]),
        "average_std": _mean([image["std"] for image in images]),
        "error_types": dict(
            Counter(str((row["error"] or {}).get("kind") or row["status"]) for row in rows if bad(row))
        ),
        "patterns": dict(Counter(row["type"] for row in rows if bad(row) and row["role"] != "inherited")),
        "culprits": [row["path"] for row in rows if row["role"] == "culprit"],
        "inherited": [row["path"] for row in rows if row["role"] == "inherited"],
        "interactions": [
            {"paths": [row["path"]], "status": row["status"]} for row in rows if row["role"] == "interaction"
        ]
        + [dict(found) for found in interactions],
        "suggested_graph_breaks": [dict(cut) for cut in breaks],
    }


def _mean(values: Sequence[Any]) -> float | None:
    numbers = [value for value in values if isinstance(value, float | int)]
    return statistics.fmean(numbers) if numbers else None


def bad_paths(rows: Sequence[Row]) -> list[str]:
    """What to leave eager: the culprits and what is bad only as a whole; what is bad around them is left out."""
    return [row["path"] for row in rows if row["role"] in ("culprit", "interaction") and bad(row)]
