"""The findings as Markdown, for people and for pull requests."""

from __future__ import annotations

from rqvae.health.examine import Examination
from rqvae.health.finding import SEVERITIES, Evidence, Finding
from rqvae.health.inventory import told


def verdict(examination: Examination) -> str:
    """The report in one sentence."""
    counts = {s: sum(f.severity == s for f in examination.findings) for s in SEVERITIES[::-1]}
    named = ", ".join(f"{count} {severity}" for severity, count in counts.items() if count and severity != "info")
    if counts["critical"]:
        return f"Stop: {named}."
    if named:
        return f"Look at it: {named}."
    return f"Nothing to act on; {len(examination.silent)} checks looked and found nothing."


def first_steps(examination: Examination) -> list[str]:
    """What to do first: one line for each finding that matters, at most five."""
    acting = [f for f in examination.findings if f.severity != "info" and f.check.recommendation][:5]
    return [f"{f.check.recommendation[0]} ({f.check.id})" for f in acting]


def place(evidence: Evidence) -> str:
    """FILE:LINE, "" where there is no line."""
    return f"{evidence.file}:{evidence.line}" if evidence.file and evidence.line is not None else evidence.file or ""


def as_markdown(examination: Examination) -> str:
    """The whole report."""
    lines = [f"# Training health: {examination.log.path.name}", "", f"**{verdict(examination)}**", ""]
    if steps := first_steps(examination):
        lines += ["## What to do first", "", *(f"{i}. {step}" for i, step in enumerate(steps, 1)), ""]
    lines += ["## Inventory", "", "| what | value | where |", "|---|---|---|"]
    lines += [f"| {i.name} | {_cell(i.value)} | {i.place} |" for i in told(examination.inventory)]
    lines += ["", "## Findings", ""]
    for finding in examination.findings:
        lines += _finding(finding)
    if not examination.findings:
        lines += ["None.", ""]
    lines += ["## Not assessed", "", "| check | why |", "|---|---|"]
    lines += [f"| {check.id} | {_cell(reason)} |" for check, reason in examination.not_assessed]
    lines += ["", "## Looked at, nothing found", "", "| check | fires when |", "|---|---|"]
    lines += [f"| {check.id} | {_cell(check.threshold)} |" for check, _ in examination.silent]
    lines += ["", f"What these points could show: {examination.subjects[0].power()}.", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _finding(finding: Finding) -> list[str]:
    check, found = finding.check, finding.found
    run = f" (run {finding.run})" if finding.run else ""
    lines = [f"### {finding.severity}: {check.title}{run} `{check.id}`", "", f"{found.message}.", ""]
    lines += [f"- `{place(e)}` {e.text}" if place(e) else f"- {e.text}" for e in finding.evidence]
    lines += [f"- how sure: {100 * found.confidence:.0f} %; {finding.power}", f"- fires when {check.threshold}"]
    for words, items in (("could also be", check.alternatives), ("do", check.recommendation)):
        lines += [f"- {words}: {item}" for item in items]
    lines += [f"- check that it helped: {check.verify}", ""] if check.verify else [""]
    return lines
