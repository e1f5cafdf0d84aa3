"""Say what an experienced colleague would say about a training run, from its log alone; any usual format."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rqvae.commands.options import Parser, folder_at
from rqvae.errors import BadInput

if TYPE_CHECKING:
    from rqvae.health.examine import Examination

SEVERITIES = ("info", "minor", "major", "critical")


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae health", description=f"{__doc__} `health replay RUN_DIR`: what was found live, again.")
    own.add_argument("log", metavar="LOG|RUN_DIR", help="a log of any known format, or the folder of a run or its URL")
    own.add_argument("--config", type=Path, help="the run's YAML or JSON; RUN_DIR/config.yaml by default")
    own.add_argument("--source", type=Path, metavar="DIR", help="the program's source, for checks of log against code")
    own.add_argument("--baseline", type=Path, metavar="OTHER", help="log or folder of a run to compare with")
    own.add_argument("--html", type=Path, metavar="OUT", help="write one page with annotated curves")
    own.add_argument("--json", type=Path, metavar="OUT", help="write findings, what was not assessed, and inventory")
    own.add_argument("--md", type=Path, metavar="OUT", help="write the report as Markdown")
    own.add_argument("--format", metavar="F", help="do not guess: a format's name, or the class path of a reader")
    own.add_argument("--fail-on", choices=SEVERITIES, default="critical", help="exit 1 from this severity on")
    return own


def look_parser() -> Parser:
    """The options of `health look`, which the observer calls."""
    own = Parser("rqvae health look", description="Examine a run of ours as far as it has come, as one line of JSON.")
    own.add_argument("run", type=Path, metavar="RUN_DIR", help="the run's folder; it may still be training")
    return own


def replay_parser() -> Parser:
    """The options of `health replay`."""
    text = "Repeat the looks that a run with the observer rqvae.callbacks.health.Health took while it trained."
    own = Parser("rqvae health replay", description=text + " Exit code 1 where one finds something else now.")
    own.add_argument("run", type=Path, metavar="RUN_DIR", help="the run's folder")
    return own


def run(arguments: Sequence[str]) -> int:
    """Read, examine, write; 1 if a finding reaches --fail-on."""
    if arguments[:1] == ["look"]:
        return _look(look_parser().parse_args(list(arguments[1:])).run)
    if arguments[:1] == ["replay"]:
        return _replay(replay_parser().parse_args(list(arguments[1:])).run)
    options = parser().parse_args(list(arguments))
    outputs = {kind: getattr(options, kind) for kind in ("html", "json", "md") if getattr(options, kind)}
    for kind, path in outputs.items():
        _check_out(kind, path)

    from rqvae.health.examine import examine
    from rqvae.health.readers import read_log
    from rqvae.health.settings import read_settings
    from rqvae.health.source import read_source

    log = read_log(folder_at(options.log), options.format)
    config = options.config
    if config is None and log.format == "rqvae" and (log.path.parent / "config.yaml").is_file():
        config = log.path.parent / "config.yaml"
    examination = examine(
        log,
        read_settings(config) if config else (),
        read_source(options.source) if options.source else None,
        read_log(options.baseline) if options.baseline else None,
    )
    for kind, path in outputs.items():
        _write(path, _render(kind, examination))
    sys.stdout.write(_summary(examination))
    return 1 if examination.reaches(options.fail_on) else 0


def _look(folder: Path) -> int:
    from rqvae.health.live import look

    os.nice(10)  # a run is training
    sys.stdout.write(look(folder).line() + "\n")
    return 0


def _replay(folder: Path) -> int:
    """Each look of the run and the same one now; what is new in each."""
    from rqvae.health.live import look, news, read_looks

    before, differing = None, 0
    for then in read_looks(folder):
        now = look(folder, then.rows, then.words)
        same = now.line() == then.line()
        differing += not same
        found = [f"{f['severity']} {f['id']}" for f in news(before, now)]
        verdict = "as then" if same else "differs from what was found then"
        sys.stdout.write(f"step {now.step:g}: {', '.join(found) or 'nothing new'} ({verdict})\n")
        before = now
    return 1 if differing else 0


def _check_out(kind: str, path: Path) -> None:
    """BadInput unless a file can be written there."""
    if path.is_dir():
        raise BadInput(f"--{kind} {path}: expected a file, this is a folder")
    nearest = next(p for p in (path.parent, *path.parent.parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise BadInput(f"--{kind} {path}: expected a place that can be written, {nearest} is not")


def _render(kind: str, examination: Examination) -> str:
    if kind == "html":
        from rqvae.health.report_html import as_html

        return as_html(examination)
    if kind == "json":
        from rqvae.health.report_json import as_json

        return json.dumps(as_json(examination), indent=2, allow_nan=False) + "\n"
    from rqvae.health.report_markdown import as_markdown

    return as_markdown(examination)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _summary(examination: Examination) -> str:
    """What the terminal shows: verdict, findings with their lines, what to do first."""
    from rqvae.health.report_markdown import first_steps, place, verdict

    log = examination.log
    lines = [f"{log.path}: {log.format}, {log.lines} lines, {len(log.segments)} run(s)", verdict(examination)]
    for finding in examination.findings:
        where = next((place(e) for e in finding.evidence if e.line is not None), "")
        lines.append(
            f"  {finding.severity:8s} {finding.check.id:28s} {finding.found.message}{f' [{where}]' if where else ''}"
        )
    lines += [f"  first: {step}" for step in first_steps(examination)[:3]]
    lines.append(f"  {len(examination.silent)} checks found nothing, {len(examination.not_assessed)} not assessed")
    return "\n".join(lines) + "\n"
