"""Curves of one or several runs as one vector drawing of small panels."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from rqvae.errors import BadInput
from rqvae.reports.metrics_file import Metrics
from rqvae.reports.page import show

XAxis = Literal["step", "images", "epoch", "time"]

COLUMNS = 4
PANEL_INCHES = (2.85, 2.05)
# Middle tones: they stand out on a white and on a dark page.
COLOURS = ("#3b7ddd", "#e07b1a", "#1f9d78", "#c2519c", "#8a6fdf", "#b8931d", "#d1495b", "#4fa3c7")
INK = "#010203"
"""Stands for the colour of the page's text, which the SVG takes over."""

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rqvae",  # the same rows give the same bytes
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.5,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "axes.formatter.use_mathtext": False,
}


def draw_curves(runs: Sequence[Metrics], keys: Sequence[str], against: XAxis = "step") -> str:
    """Small panels, one a key, and beside it the same on a logarithmic axis where that shows more.

    Raw values are thin, smoothed ones strong (see `smooth`); rows whose value was not finite are marked by vertical
    lines. Several runs share the panels and get a legend. A logarithmic panel is drawn for keys whose values are all
    positive and span more than a factor of 3; below that it looks like the linear one.

    Args:
        runs: at least one; a run without a key is left out of that panel.
        keys: values to draw.
        against: the horizontal axis.

    Returns:
        An `<svg>` element without fixed size and without addresses, coloured by the CSS `color` around it.

    Raises:
        BadInput: a key that no run has, or no key.
    """
    known = {key for run in runs for key in run.keys}
    for key in keys:
        if key not in known:
            raise BadInput(f"curves: key {key}: expected one of {', '.join(sorted(known))}")
    if not keys:
        raise BadInput("curves: expected at least one key, got none")
    with_log = [key for key in keys if _has_log_panel(runs, key)]
    # Keys with two panels stand together, so that a single one between them does not break a pair over two rows.
    first = keys.index(with_log[0]) if with_log else len(keys)
    panels = [(key, "linear") for key in keys[:first]]
    panels += [(key, scale) for key in with_log for scale in ("linear", "log")]
    panels += [(key, "linear") for key in keys[first:] if key not in with_log]
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        return to_svg(_figure(runs, panels, against))


def smooth(values: np.ndarray, half_life: float) -> np.ndarray:
    """Mean weighted by a factor of 2 less every `half_life` rows, to both sides, so that a curve does not lag.

    The weights of the rows that exist sum to one: the ends are not drawn to zero (the same correction as that of
    Kingma & Ba 2015, section 3).

    Args:
        values: (n,); NaN has no weight.
        half_life: in rows.

    Returns:
        (n,); NaN only where no value is finite.
    """
    finite = np.isfinite(values)
    present, value = finite.astype(np.float64), np.where(finite, values, 0.0)
    decay = 0.5 ** (1 / half_life)
    total = _both_sides(value, decay)
    weight = _both_sides(present, decay)
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0)


def _both_sides(values: np.ndarray, decay: float) -> np.ndarray:
    """Sum over rows j of decay^|i - j| values[j], for every row i."""
    sides = []
    for side in (values, values[::-1]):
        total, sums = 0.0, []
        for value in side:
            total = decay * total + value
            sums.append(total)
        sides.append(np.array(sums))
    return sides[0] + sides[1][::-1] - values


def default_keys(runs: Sequence[Metrics]) -> list[str]:
    """The keys a reader looks for first: scores, then losses, then the rest, as the runs have them."""
    found = dict.fromkeys(key for run in runs for key in run.keys)
    order = ("eval/", "val/", "train/loss_total", "train/loss", "train/")
    rank = {key: next((k for k, start in enumerate(order) if key.startswith(start)), len(order)) for key in found}
    return sorted(found, key=lambda key: rank[key])


def _has_log_panel(runs: Sequence[Metrics], key: str) -> bool:
    if "_per_s" in key:
        return False  # a speed dips where pictures are made; on a log axis that is all one sees
    values = np.concatenate([run.series(key)[1] for run in runs])
    values = values[np.isfinite(values)]
    return len(values) > 1 and bool(values.min() > 0) and bool(values.max() > 3 * values.min())


def _figure(runs: Sequence[Metrics], panels: Sequence[tuple[str, str]], against: XAxis) -> Figure:
    rows = -(-len(panels) // COLUMNS)
    # names in rows that fit: 9 points a letter are 0.075 inches, the line beside it takes five letters
    longest = max(len(run.name) for run in runs) + 5
    columns = max(1, min(len(runs), int(COLUMNS * PANEL_INCHES[0] / (0.075 * longest))))
    legend_inches = 0.12 + 0.18 * -(-len(runs) // columns) if len(runs) > 1 else 0.0
    width, height = COLUMNS * PANEL_INCHES[0], rows * PANEL_INCHES[1] + legend_inches
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.08, rect=(0, 0, 1, 1 - legend_inches / height))  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten().tolist()
    for panel, (key, scale) in zip(axes, panels, strict=False):
        _draw_panel(panel, runs, key, scale, against)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    for panel in axes[(rows - 1) * COLUMNS : len(panels)]:
        panel.set_xlabel(against)
    if len(runs) > 1:
        lines = [matplotlib.lines.Line2D([], [], linewidth=2, **_look(k)) for k in range(len(runs))]
        names = [run.name for run in runs]
        figure.legend(lines, names, loc="upper left", ncols=columns, frameon=False, fontsize=9)
    return figure


def _draw_panel(panel: Axes, runs: Sequence[Metrics], key: str, scale: str, against: XAxis) -> None:
    panel.set_facecolor("none")
    panel.set_yscale(scale)
    last = [_draw_run(panel, run, key, against, k) for k, run in enumerate(runs) if key in run.keys]
    size = 8.5 if len(key) <= 24 else 7  # a long name leaves room for the value
    panel.set_title(f"{key} (log)" if scale == "log" else key, loc="left", fontsize=size, fontweight="semibold")
    if len(runs) == 1 and scale == "linear":
        panel.set_title(show(last[0]), loc="right", fontsize=size, color=COLOURS[0])
    panel.grid(axis="y", color=INK, alpha=0.13, linewidth=0.5)
    panel.tick_params(length=2, labelsize=7.5)
    panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=against in ("step", "images")))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    if scale == "log":
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=5))
        panel.yaxis.set_major_formatter(lambda value, _: show(float(value)))
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:
        panel.yaxis.set_major_locator(MaxNLocator(5))
    ends = [run.seconds if against == "time" else run.rows[-1][against] for run in runs]
    panel.set_xlim(0, 1.01 * max(ends) or None)


def _draw_run(panel: Axes, run: Metrics, key: str, against: str, number: int) -> float:
    """Draw run `number` into a panel; the last value of the strong line."""
    x, y = run.series(key, against)
    strong = y
    if _is_noisy(y):
        panel.plot(x, y, alpha=0.28, linewidth=0.6, **_look(number))
        strong = smooth(y, half_life=0.01 * len(y))
    panel.plot(x, strong, linewidth=1.5, marker="o" if len(y) < 25 else None, markersize=2.5, **_look(number))
    for bad in x[~np.isfinite(y)]:
        panel.axvline(bad, color="#d1495b", alpha=0.6, linewidth=0.7)
    finite = strong[np.isfinite(strong)]
    return float(finite[-1]) if len(finite) else float("nan")


def _is_noisy(values: np.ndarray) -> bool:
    """Whether there is something to smooth: at least 25 points that go up and down by thrice their range in total.

    A learning rate that warms up and decays varies by twice its range; smoothing would only bend it.
    """
    values = values[np.isfinite(values)]
    return len(values) >= 25 and bool(np.abs(np.diff(values)).sum() > 3 * np.ptp(values))


def _look(k: int) -> dict[str, Any]:
    """Colour and stroke of run k; after the last colour they begin again, dashed."""
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": ("-", "--", ":")[k // len(COLOURS) % 3]}


def to_svg(figure: Figure) -> str:
    """The figure as an element of a page: no prologue, no metadata, no ids but those that are referred to."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r'<svg role="img" \1', svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1)
    return svg.replace(INK, "currentColor").strip()
