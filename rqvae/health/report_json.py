"""The findings as JSON, for programs."""

from __future__ import annotations

from typing import Any

from rqvae.health.examine import Examination
from rqvae.health.finding import Finding


def as_json(examination: Examination) -> dict[str, Any]:
    """`findings`, `not_assessed`, `assessed` (looked at, nothing found) and `inventory`; all values are plain JSON."""
    return {
        "log": str(examination.log.path),
        "format": examination.log.format,
        "findings": [_finding(finding) for finding in examination.findings],
        "not_assessed": [{"id": c.id, "title": c.title, "reason": reason} for c, reason in examination.not_assessed],
        "assessed": [{"id": c.id, "title": c.title, "power": power} for c, power in examination.silent],
        "inventory": {item.name: {"value": item.value, "place": item.place} for item in examination.inventory},
    }


def _finding(finding: Finding) -> dict[str, Any]:
    check, found = finding.check, finding.found
    return {
        "id": check.id,
        "severity": finding.severity,
        "confidence": found.confidence,
        "title": check.title,
        "message": found.message,
        "run": finding.run,
        "steps": list(found.steps) if found.steps else None,
        "evidence": [{"file": e.file, "line": e.line, "text": e.text} for e in finding.evidence],
        "threshold": check.threshold,
        "power": finding.power,
        "alternatives": list(check.alternatives),
        "recommendation": list(check.recommendation),
        "verify": check.verify,
        "source": check.source,
    }
