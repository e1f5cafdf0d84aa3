"""What a check says, and what a check is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rqvae.health.log import Series
from rqvae.health.settings import Setting
from rqvae.health.subject import Subject

SEVERITIES = ("info", "minor", "major", "critical")
"""From least to most: told, look at it, result invalid or compute wasted, stop."""


@dataclass(frozen=True)
class Evidence:
    """One thing that can be looked up.

    Args:
        text: what stands there; "" is filled with the file's line.
        line: 1-based line or record, None for a computed number.
        file: None for the log itself.
    """

    text: str
    line: int | None = None
    file: str | None = None


@dataclass(frozen=True)
class Found:
    """What a check found.

    Args:
        message: one sentence with the numbers.
        evidence: where to look.
        confidence: 0 to 1 that it is so, and no artefact of noise or of a guess.
        severity: in place of the check's own.
        power: what the points could have shown; that of the loss where None.
        steps: first and last step that it concerns.
    """

    message: str
    evidence: tuple[Evidence, ...] = ()
    confidence: float = 0.9
    severity: str | None = None
    power: str | None = None
    steps: tuple[float, float] | None = None


class NotAssessed(Exception):  # noqa: N818  (an outcome, not an error)
    """A check cannot say: `str` is what to log, or how many points more."""


Judge = Callable[[Subject], Iterator[Found]]


@dataclass(frozen=True)
class Check:
    """A check: a pure function of a subject and what stands beside it in a report.

    Args:
        id: such as LOSS.DIVERGED.
        title: a few words.
        severity: unless a finding says otherwise.
        needs: names in `needs.NEEDS`; an unmet one makes the check "not assessed".
        threshold: when it fires, in words and numbers.
        judge: yields findings; raises NotAssessed.
        alternatives: what else could look like this.
        recommendation: what to do.
        verify: how to see that it helped.
        source: papers or documents the threshold comes from.
    """

    id: str
    title: str
    severity: str
    needs: tuple[str, ...]
    threshold: str
    judge: Judge
    alternatives: tuple[str, ...] = ()
    recommendation: tuple[str, ...] = ()
    verify: str = ""
    source: str = ""


def check(id: str, title: str, severity: str, **declared: Any) -> Callable[[Judge], Check]:  # noqa: A002
    """Decorator that makes a check of a judging function."""
    return lambda judge: Check(id, title, severity, judge=judge, **declared)


@dataclass(frozen=True)
class Finding:
    """What a report shows: a check's text with what was found."""

    check: Check
    found: Found
    severity: str
    power: str
    run: str = ""
    evidence: tuple[Evidence, ...] = field(default=())


def at(series: Series, index: int, note: str = "") -> Evidence:
    """The line of one point."""
    point = f"{series.name} = {series.values[index]:.6g} at {series.steps[index]:g}"
    return Evidence(f"{point}{', ' + note if note else ''}", int(series.lines[index]))


def stated(setting: Setting) -> Evidence:
    """The line of a setting."""
    return Evidence(f"{setting.key}: {setting.value}", setting.line, setting.file)
