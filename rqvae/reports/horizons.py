"""Scores over the horizon of a rollout as one vector drawing of small panels, with the intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rqvae.reports.curves import COLOURS, COLUMNS, INK, PANEL_INCHES, STYLE, to_svg


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        values: at each horizon; None where there is none.
        low: lower ends of the intervals; None without them.
        high: upper ends.
    """

    values: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


def draw_horizons(horizons: Sequence[int], panels: Mapping[str, Mapping[str, Line]]) -> str:
    """A panel a score, the horizon on a logarithmic axis, one colour a kind of line over all panels.

    Args:
        horizons: h, rising.
        panels: title -> name of a line -> line; intervals are shaded.

    Returns:
        An `<svg>` element as of `rqvae.reports.curves.draw_curves`.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        columns = len(panels) if len(panels) <= 5 else 3
        rows = -(-len(panels) // columns)
        height = rows * PANEL_INCHES[1] + 0.32
        figure = Figure(figsize=(COLUMNS * PANEL_INCHES[0], height), layout="constrained", facecolor="none")
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.08, rect=(0, 0, 1, 1 - 0.32 / height))  # type: ignore[union-attr, call-arg]
        axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for panel, (title, lines) in zip(axes, panels.items(), strict=False):
            _draw(panel, title, horizons, {name: (names.index(name), line) for name, line in lines.items()})
        for panel in axes[len(panels) :]:
            panel.set_axis_off()
        handles = [matplotlib.lines.Line2D([], [], linewidth=2, color=COLOURS[k]) for k in range(len(names))]
        figure.legend(handles, names, loc="upper left", ncols=len(names), frameon=False, fontsize=9)
        return to_svg(figure)


def _draw(panel: Axes, title: str, horizons: Sequence[int], lines: Mapping[str, tuple[int, Line]]) -> None:
    panel.set_facecolor("none")
    panel.set_title(title, loc="left", fontsize=8.5, fontweight="semibold")
    panel.grid(axis="y", color=INK, alpha=0.13, linewidth=0.5)
    panel.tick_params(length=2, labelsize=7.5)
    panel.set_xscale("log", base=2)
    panel.set_xticks(horizons, [str(h) for h in horizons])
    panel.set_xlabel("frames ahead")
    shown = np.concatenate([_floats(line.values) for _, line in lines.values()])
    if np.isfinite(shown).any():  # the interval of a few seeds may be wider than all that there is to see
        low, high = np.nanmin(shown), np.nanmax(shown)
        margin = 0.15 * (high - low) or 0.05
        panel.set_ylim(low - margin, high + margin)
    for colour, line in lines.values():
        panel.plot(horizons, _floats(line.values), color=COLOURS[colour], linewidth=1.5, marker="o", markersize=2.5)
        if line.low is not None and line.high is not None:
            ends = _floats(line.low), _floats(line.high)
            panel.fill_between(horizons, *ends, color=COLOURS[colour], alpha=0.18, linewidth=0)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
