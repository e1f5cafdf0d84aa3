"""The report on channels: where and when they die, what was done about it, and what that changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rqvae.errors import BadInput
from rqvae.reports.channel_drawings import (
    MAX_BARS,
    draw_arms,
    draw_channels,
    draw_dead_fraction,
    draw_histograms,
    draw_survival,
    draw_timeline,
)
from rqvae.reports.channel_files import ChannelFiles, read_channels
from rqvae.reports.effects import LEAST_SEEDS, Arm, arms_of, paired_effect
from rqvae.reports.page import Cell, Page, Tile, show
from rqvae.reports.run_files import read_run
from rqvae.reports.run_report import distinct_names

QUALITY = ("val/psnr", "val/ssim", "val/lpips", "val/rfid")
"""Values of metrics.jsonl that an intervention is judged by, beside those of `channels/`."""
TRACKED = ("channels/dead_fraction", "channels/dormant", "channels/active_units", "channels/latent_kl")
MAX_ROWS = 40
LEAST_FOLLOWED = 0.1
"""Share of the acts that must have been followed as far as a lag, for it to be told."""
LANDMARKS = (1, 5)
"""Snapshots after an act of which the survival is told as numbers."""

ARMS_CAPTION = (
    "Last values. Dots are runs, lines join runs of one seed; the mark is the mean over seeds, with one standard "
    "deviation of the runs to both sides. The axes do not begin at 0."
)
EFFECTS_CAPTION = (
    "Intervention minus baseline of the same seed, mean over seeds and its 95 % interval (Student's t of the "
    "differences). Where the interval covers 0 these runs do not resolve whether there is an effect."
)
SURVIVAL_CAPTION = (
    "Share of the channels that were acted upon which are in no dead state, by steps after the act, until the next act "
    "on the same channel. A state is left some snapshots after its cause has gone (tracking.thresholds.leave), so a "
    "line begins at 0."
)
DEAD_CAPTION = (
    "Share of a layer's channels that are in a dead state (suppressed, disconnected, constant, silent, saturated, "
    "inactive), over steps. Beside a layer's name: its channels."
)
CHANNELS_CAPTION = (
    "A panel a layer, a row a channel, those that vary most at the end on top. Grey: standard deviation over the "
    "layer's mean of it, from 1/100 (dark) to 3 (bright), on a log scale. Coloured: the state. Ticks: acts."
)
REGIONS_CAPTION = "Birth, death and length in steps; score is what decided, 0 is dead."


def write_channel_report(out_html: Path, *, title: str, runs: Sequence[Path]) -> Path:
    """Write one self-contained page on the channels of runs, and on what their interventions changed.

    Args:
        out_html: the page; missing folders are made.
        title: of the page.
        runs: run folders; those without tracking are compared by their scores alone.

    Returns:
        `out_html`.

    Raises:
        BadInput: a folder or file that cannot be read; the same run twice; no run with tracking; runs that differ in
            more than their seed and intervention.
    """
    read = [read_run(folder, name) for folder, name in zip(runs, distinct_names(runs), strict=True)]
    arms = arms_of(read, [*TRACKED, *QUALITY])
    tracked = [files for run in read if (files := read_channels(run)) is not None]
    if not tracked:
        raise BadInput(f"{runs[0]}: expected a run with tracking.enabled, this one has no folder channels")
    page = Page(title, ", ".join(run.name for run in read))
    if len(tracked) == 1:
        _add_tiles(page, tracked[0])
    if len(arms) > 1:
        page.heading("Baseline against intervention")
        _add_arms(page, arms)
    page.heading("Survival after interventions")
    _add_survival(page, tracked)
    for files in tracked:
        _add_run(page, files, several=len(tracked) > 1)
    return page.write(out_html)


def _add_tiles(page: Page, files: ChannelFiles) -> None:
    dead = files.is_dead[-1]
    opened = [row for row in files.regions if row["death"] is None]
    acted = sum(len(act["channels"]) for act in files.acts if not act["dry_run"])
    page.tiles(
        Tile("dead at the end", 100 * float(dead.mean()), "%", f"{int(dead.sum())} of {len(dead)} channels"),
        Tile("regions", len(files.regions), note=f"{len(opened)} go on at the end"),
        Tile("snapshots", len(files.steps), note=f"steps {files.steps[0]} to {files.steps[-1]}"),
        Tile("acts on channels", acted, note=f"{files.run.config.get('intervention.strategy', 'none')}"),
    )


def _add_arms(page: Page, arms: Sequence[Arm]) -> None:
    """Every arm against the one that does not intervene, or the refusal to."""
    keys = [key for key in (*QUALITY, *TRACKED) if sum(key in arm.values for arm in arms) > 1]
    baseline, others = arms[0], arms[1:]
    if baseline.intervenes:
        page.paragraph("No effect is stated: none of the runs is without an intervention.")
        return
    least = min(len(baseline.seeds & arm.seeds) for arm in others)
    if least < LEAST_SEEDS:
        page.paragraph(f"No effect is stated: expected {LEAST_SEEDS} seeds of baseline and intervention, got {least}.")
        return
    page.drawing(draw_arms(arms, keys), ARMS_CAPTION)
    rows: list[list[Cell]] = []
    for arm in others:
        for key in keys:
            if key not in arm.values or key not in baseline.values:
                continue
            effect = paired_effect(key, arm.name, baseline.values[key], arm.values[key])
            rows.append([arm.name, key, len(effect.seeds), effect.mean, effect.low, effect.high, effect.verdict])
    header = ["intervention", "value", "seeds", "mean difference", "from", "to", ""]
    page.table(header, rows, EFFECTS_CAPTION)


def survival(files: ChannelFiles) -> tuple[np.ndarray, np.ndarray]:
    """Share of the channels that were acted upon which are in no dead state, by snapshots after the act.

    A channel is followed until it is acted upon again. Each lag has the acts that were followed as far, if those are
    a tenth of all.

    Returns:
        (L,) steps after the act, mean over acts, and (L,) shares.
    """
    place, dead = files.column_of, files.is_dead
    starts: dict[int, list[int]] = {}
    for act in files.acts:
        for row in act["channels"] if not act["dry_run"] else ():
            starts.setdefault(place[row[0], row[1]], []).append(act["step"])
    alive: dict[int, list[tuple[float, bool]]] = {}
    for column, steps in starts.items():
        for begin, end in zip(steps, [*steps[1:], np.inf], strict=True):
            seen = [k for k, step in enumerate(files.steps) if begin < step <= end]
            for lag, k in enumerate(seen):
                alive.setdefault(lag, []).append((files.steps[k] - begin, not dead[k, column]))
    lags = [lag for lag in sorted(alive) if len(alive[lag]) >= LEAST_FOLLOWED * len(alive[0])]
    means = [np.mean(alive[lag], axis=0) for lag in lags]
    return np.array([row[0] for row in means]), np.array([row[1] for row in means])


def _add_survival(page: Page, tracked: Sequence[ChannelFiles]) -> None:
    curves = {files.run.name: survival(files) for files in tracked}
    curves = {name: curve for name, curve in curves.items() if len(curve[0])}
    if not curves:
        page.paragraph("No run acted on a channel.")
        return
    page.drawing(draw_survival(curves), SURVIVAL_CAPTION)
    acted = {files.run.name: sum(len(act["channels"]) for act in files.acts) for files in tracked}
    rows: list[list[Cell]] = [
        [name, acted[name], *(_at(share, lag) for lag in LANDMARKS), _at(share, len(share))]
        for name, (_, share) in curves.items()
    ]
    header = ["run", "acts on channels", *(f"alive at snapshot {lag}" for lag in LANDMARKS), "at the last"]
    page.table(header, rows, "Shares of 1, by snapshots after the act; the last is the right end of the line.")


def _at(share: np.ndarray, lag: int) -> float | None:
    return float(share[lag - 1]) if lag <= len(share) else None


def _add_run(page: Page, files: ChannelFiles, several: bool) -> None:
    of_run = f", {files.run.name}" if several else ""
    page.heading(f"Dead channels of each layer{of_run}")
    page.drawing(draw_dead_fraction(files), DEAD_CAPTION)
    _add_layers(page, files)
    page.heading(f"Regions{of_run}")
    if files.regions:
        page.drawing(draw_timeline(files), _timeline_caption(files))
        _add_regions(page, files)
    else:
        page.paragraph("No channel was in any state but active for long enough to be a region.")
    page.heading(f"Channels over steps{of_run}")
    page.drawing(draw_channels(files), CHANNELS_CAPTION)
    if any(not np.isnan(files.values[name]).all() for name in ("gamma", "beta")):
        page.heading(f"Gamma and beta{of_run}")
        page.drawing(draw_histograms(files), "How many channels have which value, over steps.")


def _timeline_caption(files: ChannelFiles) -> str:
    count = len(files.regions)
    which = f"The longest {MAX_BARS} of {count} regions" if count > MAX_BARS else f"All {count} regions"
    return f"{which}: a bar from birth to death, with an arrow where it goes on; ticks are acts on the channel."


def _add_layers(page: Page, files: ChannelFiles) -> None:
    """States of the last snapshot, layer by layer."""
    last = files.states[-1]
    present = [number for number in range(1, len(files.names)) if (last == number).any()]
    header = ["layer", "channels", *(files.names[number] for number in present), "dead"]
    rows: list[list[Cell]] = []
    for layer in files.layers:
        own = layer.of(last)
        counts = [int((own == number).sum()) for number in present]
        rows.append([layer.name, layer.channels, *counts, float(np.isin(own, list(files.dead)).mean())])
    page.table(header, rows, f"States at step {files.steps[-1]}; dead as a share of 1.")


def _add_regions(page: Page, files: ChannelFiles) -> None:
    """The regions that go on first, with what the channel is worth where somebody measured it."""
    effects = ablation_of(files)
    ordered = sorted(files.regions, key=lambda row: (row["death"] is not None, row["birth"]))
    rows: list[list[Cell]] = []
    for row in ordered[:MAX_ROWS]:
        length = (row["death"] if row["death"] is not None else int(files.steps[-1])) - row["birth"]
        cells: list[Cell] = [
            row["layer"],
            row["channel"],
            row["state"],
            row["birth"],
            row["death"],
            length,
            row["score"],
        ]
        if effects:
            cells.append(effects.get((row["layer"], row["channel"])) if row["death"] is None else None)
        rows.append(cells)
    header = ["layer", "channel", "state", "birth", "death", "length", "score", *(["ablation, dB"] if effects else [])]
    caption = REGIONS_CAPTION + _ablation_words(files)
    if len(ordered) > len(rows):
        caption = f"{len(rows)} of {len(ordered)} regions, those that go on first. {caption}"
    page.table(header, rows, caption)


def ablation_of(files: ChannelFiles) -> Mapping[tuple[str, int], float | None]:
    """Layer and channel -> change of PSNR when the channel is replaced by its mean; empty where nobody measured it."""
    if files.ablation is None:
        return {}
    return {(row["layer"], row["channel"]): row["psnr_change"] for row in files.ablation["rows"]}


def _ablation_words(files: ChannelFiles) -> str:
    found = files.ablation
    if found is None:
        return ""
    return (
        f" Ablation: change of PSNR when the channel is replaced by its mean, at step {found['step']}, "
        f"{found['images']} images of {found['split']}, from {show(found['psnr'])} dB; – where no layer takes the "
        f"channel in alone, or it is none of the {found['limit']} lowest scores."
    )
