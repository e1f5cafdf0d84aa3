"""Runs the checks on a log: findings, what could not be assessed and why, and the inventory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rqvae.health.checks import all_checks
from rqvae.health.finding import SEVERITIES, Check, Evidence, Finding, NotAssessed
from rqvae.health.inventory import Item, inventory
from rqvae.health.log import RunLog, Segment
from rqvae.health.needs import unmet
from rqvae.health.settings import Setting
from rqvae.health.source import Source
from rqvae.health.subject import Subject
from rqvae.health.text import wanted_lines

_TEXT_FORMATS_WITHOUT = {"tensorboard"}


@dataclass(frozen=True)
class Examination:
    """What is known about a log.

    Args:
        log: the log.
        subjects: its runs.
        findings: most severe first.
        not_assessed: check and what to log.
        silent: checks that looked and found nothing, with what they could have seen.
        inventory: facts of the run, with lines.
    """

    log: RunLog
    subjects: tuple[Subject, ...]
    findings: tuple[Finding, ...]
    not_assessed: tuple[tuple[Check, str], ...]
    silent: tuple[tuple[Check, str], ...]
    inventory: tuple[Item, ...]

    def reaches(self, severity: str) -> bool:
        """Whether a finding is at least that severe."""
        least = SEVERITIES.index(severity)
        return any(SEVERITIES.index(finding.severity) >= least for finding in self.findings)


def examine(
    log: RunLog, config: tuple[Setting, ...] = (), source: Source | None = None, baseline: RunLog | None = None
) -> Examination:
    """Run every check on every run of a log. Pure: the same log gives the same findings."""
    other = Subject(baseline, _longest(baseline)) if baseline is not None else None
    subjects = tuple(Subject(log, segment, config, source, other) for segment in log.segments)
    findings: list[Finding] = []
    missing: list[tuple[Check, str]] = []
    silent: list[tuple[Check, str]] = []
    for check in all_checks():
        outcome = [_judge(check, subject) for subject in subjects]
        found = _merge([finding for result in outcome if isinstance(result, list) for finding in result])
        findings += found
        reasons = [result for result in outcome if isinstance(result, str)]
        if not found and len(reasons) == len(outcome):
            missing.append((check, reasons[0]))
        elif not found:
            silent.append((check, subjects[0].power()))
    findings.sort(key=lambda f: (-SEVERITIES.index(f.severity), -f.found.confidence, f.check.id))
    facts = inventory(subjects[0])
    return Examination(log, subjects, tuple(_with_lines(findings, log)), tuple(missing), tuple(silent), facts)


def _longest(log: RunLog) -> Segment:
    return max(log.segments, key=lambda s: sum(len(series) for series in s.series.values()))


def _judge(check: Check, subject: Subject) -> list[Finding] | str:
    """Findings of one check on one run, or what to log."""
    if (words := unmet(subject, check.needs)) is not None:
        return words
    try:
        found = list(check.judge(subject))
    except NotAssessed as reason:
        return str(reason)
    trust = subject.log.trust
    return [
        Finding(
            check,
            replace(one, confidence=round(one.confidence * trust, 3)),
            one.severity or check.severity,
            one.power or subject.power(),
            subject.segment.label if len(subject.log.segments) > 1 else "",
            one.evidence,
        )
        for one in found
    ]


def _merge(found: list[Finding]) -> list[Finding]:
    """One finding an id: the most severe, with how many more there are."""
    if len(found) < 2:
        return found
    worst = max(found, key=lambda f: (SEVERITIES.index(f.severity), f.found.confidence))
    others = [f for f in found if f is not worst]
    words = "; ".join(f.found.message for f in others[:3]) + (
        f"; and {len(others) - 3} more" if len(others) > 3 else ""
    )
    places = tuple(e for f in others for e in f.evidence)[:6]
    return [
        replace(
            worst,
            found=replace(worst.found, message=f"{worst.found.message}; also: {words}"),
            evidence=worst.evidence + places,
        )
    ]


def _with_lines(findings: list[Finding], log: RunLog) -> list[Finding]:
    """Findings whose evidence has the file's own text where a line was named without."""
    if log.format in _TEXT_FORMATS_WITHOUT:
        return findings
    wanted = {e.line for f in findings for e in f.evidence if e.line is not None and e.file is None}
    texts = wanted_lines(log.path, wanted)
    return [replace(f, evidence=tuple(_quoted(e, texts, log.path) for e in f.evidence)) for f in findings]


def _quoted(evidence: Evidence, texts: dict[int, str], path: Path) -> Evidence:
    if evidence.file is not None or evidence.line is None:
        return evidence
    text = texts.get(evidence.line, "")
    if len(text) >= 200 or not text:
        return replace(evidence, file=path.name)
    return replace(evidence, file=path.name, text=f"{evidence.text} | {text}" if evidence.text else text)
