"""The findings as one HTML file without scripts: it can be mailed, and shows the same without a network."""

from __future__ import annotations

from html import escape

import numpy as np

from rqvae.health.curves import Mark, Moment, curve
from rqvae.health.examine import Examination
from rqvae.health.finding import Evidence, Finding
from rqvae.health.inventory import told
from rqvae.health.log import Series
from rqvae.health.report_markdown import first_steps, place, verdict
from rqvae.health.schedules import schedule_of
from rqvae.health.subject import Subject

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--dim:#5c6675;--line:#d9dee6;--paper:#fff;--wash:#f5f7fa;
--critical:#b3261e;--major:#b45309;--minor:#8a6d00;--info:#48658f}
@media(prefers-color-scheme:dark){:root{
--ink:#e6e9ef;--dim:#9aa4b2;--line:#363d49;--paper:#14171c;--wash:#1d2127;
--critical:#ff8a80;--major:#ffb267;--minor:#e5cc5c;--info:#9db8e6}
}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1080px;margin:0 auto;
padding:28px 20px 60px}
h1{font-size:24px;margin:0 0 4px}
h2{font-size:18px;margin:34px 0 10px;border-bottom:1px solid var(--line);padding-bottom:4px}
.sub{color:var(--dim);margin:0 0 14px;overflow-wrap:anywhere}
.verdict{font-size:17px;font-weight:600;padding:10px 14px;border-left:5px solid;background:var(--wash)}
.critical{border-color:var(--critical)}
.major{border-color:var(--major)}
.minor{border-color:var(--minor)}
.info,.none{border-color:var(--info)}
article{border:1px solid var(--line);border-left:5px solid;border-radius:4px;padding:12px 16px;margin:12px 0}
article.critical{border-left-color:var(--critical)}
article.major{border-left-color:var(--major)}
article.minor{border-left-color:var(--minor)}
article.info{border-left-color:var(--info)}
article h3{margin:0;font-size:16px}
.badge{font-size:12px;font-weight:700;text-transform:uppercase;letter-spacing:.04em;margin-right:8px}
.badge.critical{color:var(--critical)}
.badge.major{color:var(--major)}
.badge.minor{color:var(--minor)}
.badge.info{color:var(--info)}
code{font:13px ui-monospace,monospace;color:var(--dim)}
pre{font:12.5px/1.45 ui-monospace,monospace;background:var(--wash);padding:8px 10px;margin:8px 0;
white-space:pre-wrap;overflow-wrap:anywhere}
pre b{color:var(--dim);font-weight:400}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{text-align:left;vertical-align:top;padding:4px 10px 4px 0;border-bottom:1px solid var(--line);
overflow-wrap:anywhere}
td:first-child{white-space:nowrap}
td:nth-child(3){min-width:13em;color:var(--dim)}
dl{margin:8px 0 0;display:grid;grid-template-columns:max-content 1fr;gap:2px 12px;font-size:14px}
dt{color:var(--dim)}
dd{margin:0}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:14px}
figure{margin:0}
figcaption{font-size:13px;color:var(--dim)}
svg{width:100%;height:auto;background:var(--wash);border-radius:4px}
.t{font:11px system-ui,sans-serif;fill:var(--dim)}
.t.b{fill:var(--ink)}
.g{stroke:var(--line);stroke-width:.6}
.l{fill:none;stroke-width:1}
.m{fill-opacity:.13;stroke-opacity:.6;stroke-width:.6}
.m.critical{fill:var(--critical);stroke:var(--critical)}
.m.major{fill:var(--major);stroke:var(--major)}
.m.minor,.m.info{fill:var(--minor);stroke:var(--minor)}
.e{fill:none;stroke:var(--dim);stroke-width:1}
.e.restart{stroke:var(--ink);stroke-dasharray:4 3}
.e.checkpoint{fill:var(--dim);stroke:none}
details summary{cursor:pointer;color:var(--dim);margin:6px 0}
"""
_MOST_PICTURES = 12
_EVENTS = {"restart": "restart", "checkpoint": "checkpoint", "sampling": "evaluation"}
_HELD_OUT = ("eval_loss", "ema_eval", "score_low", "score_high", "held_out", "mask_shuffled")


def as_html(examination: Examination) -> str:
    """The whole page."""
    log = examination.log
    worst = examination.findings[0].severity if examination.findings else "none"
    steps = "".join(f"<li>{escape(step)}</li>" for step in first_steps(examination))
    parts = [
        f"<h1>Training health: {escape(log.path.name)}</h1>",
        f'<p class="sub">{escape(log.format)}, {log.lines} lines, {len(log.segments)} run(s)</p>',
        f'<p class="verdict {worst}">{escape(verdict(examination))}</p>',
        f"<h2>What to do first</h2><ol>{steps}</ol>" if steps else "",
        "<h2>Inventory</h2>",
        _table([(i.name, i.value, i.place) for i in told(examination.inventory)]),
        "<h2>Curves</h2>",
        f'<div class="plots">{_pictures(examination)}</div>',
        "<h2>Findings</h2>",
        "".join(_finding(finding) for finding in examination.findings) or "<p>None.</p>",
        "<h2>Not assessed</h2>",
        _table([(check.id, reason) for check, reason in examination.not_assessed]),
        f"<h2>Looked at, nothing found</h2><details><summary>{len(examination.silent)} checks</summary>",
        _table([(check.id, f"fires when {check.threshold}") for check, _ in examination.silent]),
        f"</details><p>What these points could show: {escape(examination.subjects[0].power())}.</p>",
    ]
    viewport = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"{viewport}<title>Health: {escape(log.path.name)}</title>"
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{body}</table>" if rows else "<p>Nothing.</p>"


def _evidence(evidence: Evidence) -> str:
    where = place(evidence)
    return f"<b>{escape(where)}</b> {escape(evidence.text)}" if where else escape(evidence.text)


def _finding(finding: Finding) -> str:
    check, found = finding.check, finding.found
    rows = [("how sure", f"{100 * found.confidence:.0f} %; {finding.power}"), ("fires when", check.threshold)]
    rows += [("could also be", text) for text in check.alternatives]
    rows += [("do", text) for text in check.recommendation]
    rows += [(name, text) for name, text in (("check that it helped", check.verify), ("source", check.source)) if text]
    listed = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in rows)
    evidence = "\n".join(_evidence(e) for e in finding.evidence)
    run = f" <code>{escape(finding.run)}</code>" if finding.run else ""
    return (
        f'<article class="{finding.severity}" id="{check.id}">'
        f'<h3><span class="badge {finding.severity}">{finding.severity}</span>'
        f"{escape(check.title)} <code>{check.id}</code>{run}</h3><p>{escape(found.message)}.</p>"
        f"{f'<pre>{evidence}</pre>' if evidence else ''}<dl>{listed}</dl></article>"
    )


def _marks(examination: Examination, subject: Subject) -> list[Mark]:
    label = subject.segment.label if len(examination.subjects) > 1 else ""
    return [
        Mark(f.found.steps[0], f.found.steps[1], f.check.id, f.severity)
        for f in examination.findings
        if f.found.steps is not None and f.run == label and f.severity != "info"
    ]


def _moments(subject: Subject) -> list[Moment]:
    """Restarts, checkpoints and evaluations of one run; where a file holds several, by the lines they stand in."""
    log, series = subject.log, list(subject.segment.series.values())
    lines = [s.lines for s in series if len(s)]
    first, last = min((int(n[0]) for n in lines), default=0), max((int(n[-1]) for n in lines), default=0)
    found = [
        Moment(_EVENTS[event.kind], event.step)
        for event in log.events
        if event.kind in _EVENTS and event.step is not None and (len(log.segments) == 1 or first <= event.line <= last)
    ]
    held_out = [s for role in _HELD_OUT for s in subject.all(role)]
    return found + [Moment("evaluation", float(step)) for s in held_out for step in s.steps]


def _pictures(examination: Examination) -> str:
    pictures: list[str] = []
    for subject in examination.subjects:
        pictures += _of_run(examination, subject)
    return "".join(pictures[: 2 * _MOST_PICTURES]) or "<p>No points.</p>"


def _of_run(examination: Examination, subject: Subject) -> list[str]:
    unit, marks, moments = subject.log.unit, _marks(examination, subject), _moments(subject)
    label = f"{subject.segment.label}: " if len(examination.subjects) > 1 else ""
    losses = [s for s in (subject.train_loss, *subject.all("eval_loss")) if s is not None and len(s)]
    pictures = []
    if losses:
        names = ", ".join(s.name for s in losses)
        pictures += [
            curve(f"{label}{names}", losses, unit, marks, moments=moments),
            curve(f"{label}{names}, logarithmic", losses, unit, marks, True, moments),
        ]
    if bins := subject.all("t_bin"):
        pictures.append(curve(f"{label}loss by timestep, logarithmic", bins, unit, logarithmic=True))
    for role in ("grad_norm", "gan_g", "gan_d", "throughput", "score_low", "score_high"):
        pictures += [curve(f"{label}{s.name}", [s], unit) for s in subject.all(role)[:2]]
    pictures.append(_rates(subject, label))
    return [picture for picture in pictures if picture][:_MOST_PICTURES]


def _rates(subject: Subject, label: str) -> str:
    """The learning rate as it was logged, and as config and source give it."""
    shown = subject.all("lr")[:2]
    schedule = schedule_of(subject)
    if schedule is not None:
        steps = np.linspace(0, schedule.steps - 1, int(min(schedule.steps, 400)))
        shown.append(
            Series(f"reconstructed ({schedule.name})", steps, schedule.at(steps), np.zeros(len(steps), dtype=np.int64))
        )
    return curve(f"{label}learning rate", shown, subject.log.unit) if shown else ""
