"""Drawings of channels over the steps of a run: maps, bars in time, survival, seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from rqvae.reports.channel_files import COLUMNS, ChannelFiles, LayerColumns
from rqvae.reports.curves import COLOURS, INK, STYLE, to_svg
from rqvae.reports.effects import Arm

STATE_COLOURS = {
    "outlier": "#1f9d78",
    "suppressed": "#e0b01b",
    "disconnected": "#8a6fdf",
    "constant": "#3b7ddd",
    "silent": "#d1495b",
    "saturated": "#c2519c",
    "inactive": "#e07b1a",
}
WIDTH = 11.4
_RANGE = (-2.0, 0.5)
MAX_BARS = 60


def _figure(height: float, rows: int = 1, columns: int = 1, **more: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
    axes = figure.subplots(rows, columns, squeeze=False, **more).flatten().tolist()
    for panel in axes:
        panel.set_facecolor("none")
        panel.tick_params(length=2, labelsize=7.5)
    return figure, axes


def _steps_axis(panel: Axes) -> None:
    panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _title(panel: Axes, text: str, size: float = 8.5) -> None:
    panel.set_title(text, loc="left", fontsize=size, fontweight="semibold")


def even_steps(steps: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Snapshots as columns of a picture with an even axis: of each column the last snapshot at or before it.

    Returns:
        (M,) places in `steps`, and the steps at the picture's left and right edge.
    """
    count = min(len(steps), COLUMNS)
    width = (steps[-1] - steps[0]) / max(count - 1, 1) or 1.0
    at = steps[0] + width * np.arange(count)
    places = np.searchsorted(steps, at + 1e-9, side="right") - 1
    return places, (float(steps[0] - width / 2), float(at[-1] + width / 2))


def draw_dead_fraction(files: ChannelFiles) -> str:
    """Layers from top to bottom, steps from left to right; how many of a layer's channels are dead."""
    places, (left, right) = even_steps(files.steps)
    dead = files.is_dead[places]
    share = np.stack([layer.of(dead).mean(1) for layer in files.layers])
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure, (panel,) = _figure(0.9 + 0.155 * len(files.layers))
        image = panel.imshow(share, aspect="auto", cmap="inferno", vmin=0, vmax=max(share.max(), 1e-9),
                             extent=(left, right, len(share) - 0.5, -0.5), interpolation="nearest")  # fmt: skip
        names = [f"{layer.name}  {layer.channels}" for layer in files.layers]
        panel.set_yticks(range(len(names)), names, fontsize=7)
        _steps_axis(panel)
        panel.set_xlabel("step")
        bar = figure.colorbar(image, ax=panel, shrink=0.8, aspect=30, pad=0.01)
        bar.ax.tick_params(labelsize=7.5, length=2)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        bar.outline.set_visible(False)
        return to_svg(figure)


def draw_channels(files: ChannelFiles) -> str:
    """A panel a layer: channels sorted by how much they vary at the end, over steps."""
    layers = [layer for layer in files.layers if layer.start + layer.channels <= files.values["std"].shape[1]]
    columns = 4
    rows = -(-len(layers) // columns)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure, axes = _figure(0.5 + 1.45 * rows, rows, columns, sharex=True)
        for panel, layer in zip(axes, layers, strict=False):
            _draw_layer(panel, files, layer)
        for panel in axes[len(layers) :]:
            panel.remove()
        _legend_of_states(figure, files.states[:, : layers[-1].start + layers[-1].channels], files.names)
        return to_svg(figure)


def _draw_layer(panel: Axes, files: ChannelFiles, layer: LayerColumns) -> None:
    at = np.searchsorted(files.steps, files.kept_steps)
    std = layer.of(files.values["std"]).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        constancy = np.log10(std / std.mean(1, keepdims=True))
    constancy = np.where(np.isnan(constancy), _RANGE[0], constancy).clip(*_RANGE)
    order = np.argsort(-constancy[-1], kind="stable")
    places, (left, right) = even_steps(files.kept_steps)
    grey = (constancy - _RANGE[0]) / (_RANGE[1] - _RANGE[0])
    picture = np.repeat((0.15 + 0.8 * grey)[..., None], 3, axis=2)
    states = layer.of(files.states[at])
    for number, name in enumerate(files.names):
        if name in STATE_COLOURS:
            picture[states == number] = to_rgb(STATE_COLOURS[name])
    panel.imshow(picture[places][:, order].transpose(1, 0, 2), aspect="auto", interpolation="nearest",
                 extent=(left, right, layer.channels - 0.5, -0.5))  # fmt: skip
    rank = {int(channel): row for row, channel in enumerate(order)}
    marks = [(act["step"] + 1, rank[row[1]]) for act in files.acts for row in act["channels"] if row[0] == layer.name]
    if marks:
        x, y = zip(*marks, strict=True)
        panel.plot(x, y, "|", color="#ffffff", markersize=4, markeredgewidth=1.6, clip_on=True)
        panel.plot(x, y, "|", color="#000000", markersize=3, markeredgewidth=0.7, clip_on=True)
    _title(panel, f"{layer.name}  {layer.channels}", 7.5 if len(layer.name) < 34 else 6.2)
    panel.set_yticks([])
    _steps_axis(panel)


def _legend_of_states(figure: Figure, states: np.ndarray, names: Sequence[str]) -> None:
    """Names of the states that occur."""
    patches = [Patch(facecolor=str(level), label=label) for level, label in (("0.95", "varies"), ("0.2", "hardly"))]
    present = [names[number] for number in np.unique(states)]
    patches += [Patch(facecolor=STATE_COLOURS[n], label=n) for n in STATE_COLOURS if n in present]
    figure.legend(handles=patches, loc="outside upper left", ncols=len(patches), frameon=False, fontsize=8)


def draw_histograms(files: ChannelFiles, bins: int = 60) -> str:
    """Gamma and beta of all layers that have them: how often each value occurs, over steps."""
    places, (left, right) = even_steps(files.kept_steps)
    tables = {name: files.values[name].astype(np.float32) for name in ("gamma", "beta")}
    tables = {name: table[:, ~np.isnan(table).any(0)] for name, table in tables.items()}
    tables = {name: table for name, table in tables.items() if table.size}  # a norm may have no beta
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure, axes = _figure(2.9, 1, len(tables))
        for panel, (name, table) in zip(axes, tables.items(), strict=True):
            low, high = float(table.min()), float(table.max())
            pad = 0.02 * (high - low) or 0.01
            edges = np.linspace(low - pad, high + pad, bins + 1)
            counts = np.stack([np.histogram(row, edges)[0] for row in table[places]], 1)
            shown = np.ma.masked_where(counts == 0, np.log10(np.maximum(counts, 1)))
            image = panel.imshow(shown, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest",
                                 extent=(left, right, edges[0], edges[-1]))  # fmt: skip
            bar = figure.colorbar(image, ax=panel, aspect=30, pad=0.01)
            bar.ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            bar.ax.yaxis.set_major_formatter(lambda value, _: f"{10**value:g}")
            bar.ax.tick_params(labelsize=7.5, length=2)
            bar.outline.set_visible(False)
            _title(panel, f"{name} of {table.shape[1]} channels")
            _steps_axis(panel)
        return to_svg(figure)


def draw_timeline(files: ChannelFiles) -> str:
    """A bar for each region, layer under layer; of many the longest."""
    end = int(files.steps[-1])
    rows = sorted(files.regions, key=lambda r: r["birth"] - (r["death"] if r["death"] is not None else end + 1))
    place = files.column_of
    rows = sorted(rows[:MAX_BARS], key=lambda r: (place[r["layer"], r["channel"]], r["birth"]))
    lanes = {key: k for k, key in enumerate(dict.fromkeys((r["layer"], r["channel"]) for r in rows))}
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure, (panel,) = _figure(0.8 + 0.125 * max(len(lanes), 3))
        for row in rows:
            until = row["death"] if row["death"] is not None else end
            lane = lanes[row["layer"], row["channel"]]
            width = max(until - row["birth"], 0.004 * end)
            panel.barh(lane, width, left=row["birth"], height=0.72, color=STATE_COLOURS[row["state"]])
            if row["death"] is None:
                panel.plot(row["birth"] + width, lane, ">", markersize=3, color=STATE_COLOURS[row["state"]])
        _mark_acts(panel, files.acts, lanes)
        labels = [f"{layer}  {channel}" for layer, channel in lanes]
        panel.set_yticks(range(len(labels)), labels, fontsize=6.5)
        panel.set_ylim(len(lanes) - 0.4, -0.6)
        panel.set_xlim(0, end * 1.02)
        panel.grid(axis="x", color=INK, alpha=0.13, linewidth=0.5)
        _steps_axis(panel)
        panel.set_xlabel("step")
        present = [name for name in STATE_COLOURS if any(r["state"] == name for r in rows)]
        patches = [Patch(facecolor=STATE_COLOURS[n], label=n) for n in present]
        figure.legend(handles=patches, loc="outside upper left", ncols=len(patches), frameon=False, fontsize=8)
        return to_svg(figure)


def _mark_acts(panel: Axes, acts: Sequence[Mapping[str, Any]], lanes: Mapping[tuple[str, int], int]) -> None:
    marks = [(act["step"] + 1, lanes[row[0], row[1]]) for act in acts for row in act["channels"]
             if (row[0], row[1]) in lanes]  # fmt: skip
    if marks:
        x, y = zip(*marks, strict=True)
        panel.plot(x, y, "|", color=INK, markersize=6, markeredgewidth=1.2)


def draw_survival(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Share of channels that are alive some steps after an act, a line a run."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure, (panel,) = _figure(2.7)
        for number, (name, (lags, share)) in enumerate(curves.items()):
            colour = COLOURS[number % len(COLOURS)]
            panel.plot(lags, 100 * share, color=colour, linewidth=1.5, marker="o", markersize=2.5, label=name)
        panel.set_ylim(-3, 103)
        panel.set_xlim(0, None)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        panel.grid(axis="y", color=INK, alpha=0.13, linewidth=0.5)
        _steps_axis(panel)
        panel.set_xlabel("steps after the act")
        if len(curves) > 1:
            figure.legend(
                loc="outside upper left", ncols=max(1, 110 // (6 + max(map(len, curves)))), frameon=False, fontsize=8
            )
        return to_svg(figure)


def draw_arms(arms: Sequence[Arm], keys: Sequence[str]) -> str:
    """A panel a value: an arm's mean over seeds with its standard deviation, and a dot a run, joined by seed."""
    columns = 4
    rows = -(-len(keys) // columns)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure, axes = _figure(0.3 + 2.1 * rows, rows, columns)
        for panel, key in zip(axes, keys, strict=False):
            having = [arm for arm in arms if key in arm.values]
            for x, arm in enumerate(having):
                values = list(arm.values[key].values())
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
                panel.errorbar(x, float(np.mean(values)), spread, color=COLOURS[x % len(COLOURS)], marker="_",
                               markersize=22, markeredgewidth=2, elinewidth=2, capsize=5)  # fmt: skip
            for seed in sorted({seed for arm in having for seed in arm.values[key]}):
                at = [(x, arm.values[key][seed]) for x, arm in enumerate(having) if seed in arm.values[key]]
                panel.plot(*zip(*at, strict=True), color=INK, alpha=0.6, linewidth=0.6, marker="o", markersize=2.5)
            every = [value for arm in having for value in arm.values[key].values()]
            room = 0.25 * (max(every) - min(every)) or 0.05 * abs(max(every)) or 1.0
            panel.set_ylim(min(every) - room, max(every) + room)
            panel.set_xticks(range(len(having)), [arm.name for arm in having], fontsize=7.5)
            panel.set_xlim(-0.5, len(having) - 0.5)
            _title(panel, key, 8.5 if len(key) < 25 else 7)
        for panel in axes[len(keys) :]:
            panel.remove()
        return to_svg(figure)
