"""Curves as SVG: every point that a screen can show, a smoothed line over them, and marks where something was found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from rqvae.health.log import Series
from rqvae.health.statistics import smooth

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 236, 62, 34, 14, 24
_COLUMNS = 300
_MOST_SIGNS = 60
_SIGNS = {
    "restart": ("M{x:.1f} {y:.1f}m0 4v-8", 0),
    "checkpoint": ("M{x:.1f} {y:.1f}m-3.5 3l3.5 -7l3.5 7z", 4),
    "evaluation": ("M{x:.1f} {y:.1f}m-3 0l3 -3.5l3 3.5l-3 3.5z", 13),
}
"""What is drawn at a moment, and how far above the lower border."""
_COLOURS = ("#2a5db0", "#c2571a", "#2e7d4f", "#7a4a9e", "#8a6d00", "#00707a")


@dataclass(frozen=True)
class Mark:
    """Something at a step, or over a range of steps."""

    first: float
    last: float
    text: str
    severity: str


@dataclass(frozen=True)
class Moment:
    """Something that happened at a step: `kind` is restart, checkpoint or evaluation."""

    kind: str
    step: float


def curve(
    title: str,
    many: Sequence[Series],
    unit: str,
    marks: Sequence[Mark] = (),
    logarithmic: bool = False,
    moments: Sequence[Moment] = (),
) -> str:
    """One picture of one or several series; "" where nothing can be shown.

    Args:
        title: above the picture.
        many: series on one axis.
        unit: of the horizontal axis.
        marks: shaded and labelled.
        logarithmic: vertical axis; values that are not positive are left out.
        moments: restarts as dashed lines, checkpoints and evaluations as signs along the lower border.
    """
    shown = [s.finite for s in many]
    shown = [s.pick(s.values > 0) if logarithmic else s for s in shown]
    shown = [s for s in shown if len(s)]
    if not shown:
        return ""
    values = np.concatenate([_vertical(s.values, logarithmic) for s in shown])
    steps = np.concatenate([s.steps for s in shown])
    frame = _Frame(float(steps.min()), float(steps.max()), *_limits(values), logarithmic)
    body = [frame.axes(unit), *(frame.mark(mark, i) for i, mark in enumerate(marks)), frame.moments(moments)]
    for series, colour in zip(shown, _COLOURS * 3, strict=False):
        body.append(frame.line(series, colour))
    if len(shown) > 1:
        body += [_legend(i, s.name, c) for i, (s, c) in enumerate(zip(shown, _COLOURS * 3, strict=False))]
    label = escape(title)
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return f"<figure><figcaption>{label}</figcaption>{opening}{''.join(body)}</svg></figure>"


def _vertical(values: np.ndarray, logarithmic: bool) -> np.ndarray:
    return np.log10(values) if logarithmic else values


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The range of all values: what jumps out of it is what one looks for."""
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _legend(index: int, name: str, colour: str) -> str:
    y = TOP + 12 + 14 * index
    return (
        f'<text x="{WIDTH - RIGHT - 4}" y="{y}" text-anchor="end" style="fill:{colour}" class="t">{escape(name)}</text>'
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within a range."""
    raw = (high - low) / count
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    base = 10 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw)
    first = math.ceil(low / step) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of 1, 2 and 5 times powers of ten within a range of logarithms; of the powers alone if it is wide."""
    digits = (1.0,) if high - low > 3 else (1.0, 2.0, 5.0)
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [power + math.log10(digit) for power in powers for digit in digits]
    inside = [tick for tick in found if low <= tick <= high]
    return inside if len(inside) > 1 else ticks(low, high)


@dataclass(frozen=True)
class _Frame:
    x0: float
    x1: float
    y0: float
    y1: float
    logarithmic: bool

    def x(self, step: float) -> float:
        share = (step - self.x0) / (self.x1 - self.x0) if self.x1 > self.x0 else 0.5
        return LEFT + min(max(share, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - BOTTOM - TOP)

    def axes(self, unit: str) -> str:
        parts = []
        rows = log_ticks(self.y0, self.y1) if self.logarithmic else ticks(self.y0, self.y1)
        for tick in rows:
            text = f"{10**tick:.3g}" if self.logarithmic else f"{tick:.4g}"
            y = self.y(tick)
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="g"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3:.1f}" text-anchor="end" class="t">{text}</text>')
        for tick in ticks(self.x0, self.x1):
            parts.append(
                f'<text x="{self.x(tick):.1f}" y="{HEIGHT - 20}" text-anchor="middle" class="t">{tick:g}</text>'
            )
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end" class="t">{escape(unit)}</text>')
        return "".join(parts)

    def mark(self, mark: Mark, index: int) -> str:
        left, right = self.x(mark.first), max(self.x(mark.last), self.x(mark.first) + 2)
        anchor = "end" if left > 0.7 * WIDTH else "start"
        x, y = (left - 3 if anchor == "end" else left + 3), TOP + 10 + 12 * (index % 4)
        size = f'width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        box = f'<rect x="{left:.1f}" y="{TOP}" {size} class="m {mark.severity}"/>'
        return box + f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" class="t b">{escape(mark.text)}</text>'

    def moments(self, moments: Sequence[Moment]) -> str:
        """Those within the frame, as many of a kind as can be told apart, and what their signs mean."""
        parts, x = [], float(LEFT)
        for kind, (sign, height) in _SIGNS.items():
            steps = sorted({m.step for m in moments if m.kind == kind and self.x0 <= m.step <= self.x1})
            if not steps:
                continue
            shape = f"M{{x:.1f}} {TOP}V{HEIGHT - BOTTOM}" if kind == "restart" else sign
            for step in steps[:: math.ceil(len(steps) / _MOST_SIGNS)]:
                path = shape.format(x=self.x(step), y=HEIGHT - BOTTOM - height)
                parts.append(f'<path d="{path}" class="e {kind}"/>')
            words = f"{kind} ({len(steps)})"
            parts.append(f'<path d="{sign.format(x=x + 5, y=HEIGHT - 8)}" class="e {kind}"/>')
            parts.append(f'<text x="{x + 13:.0f}" y="{HEIGHT - 5}" class="t">{words}</text>')
            x += 27 + 6.2 * len(words)
        return "".join(parts)

    def line(self, series: Series, colour: str) -> str:
        values = _vertical(series.values, self.logarithmic)
        smoothed = smooth(values, max(2, len(values) // 60)) if len(values) > 60 else None
        faint = ' stroke-opacity="0.35"' if smoothed is not None else ""
        parts = [f'<path d="{self._path(*_envelope(series.steps, values))}" stroke="{colour}"{faint} class="l"/>']
        if len(values) <= 40:
            parts += [self._dot(step, value, colour) for step, value in zip(series.steps, values, strict=True)]
        if smoothed is not None:
            keep = np.linspace(0, len(values) - 1, min(len(values), _COLUMNS)).astype(int)
            path = self._path(series.steps[keep], smoothed[keep])
            parts.append(f'<path d="{path}" stroke="{colour}" stroke-width="1.8" class="l"/>')
        return "".join(parts)

    def _dot(self, step: float, value: float, colour: str) -> str:
        return f'<circle cx="{self.x(step):.1f}" cy="{self.y(value):.1f}" r="2.2" fill="{colour}"/>'

    def _path(self, steps: np.ndarray, values: np.ndarray) -> str:
        return "M" + "L".join(f"{self.x(s):.1f} {self.y(v):.1f}" for s, v in zip(steps, values, strict=True))


def _envelope(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most two points a column of the screen: its lowest and its highest, so that no jump is "
    "lost."""
    if len(values) <= 2 * _COLUMNS:
        return steps, values
    chosen = []
    for part in np.array_split(np.arange(len(values)), _COLUMNS):
        chosen += sorted({part[int(np.argmin(values[part]))], part[int(np.argmax(values[part]))]})
    return steps[chosen], values[chosen]
