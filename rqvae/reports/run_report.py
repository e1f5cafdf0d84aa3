"""The report of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rqvae.reports.curves import XAxis, default_keys, draw_curves
from rqvae.reports.page import Cell, Page
from rqvae.reports.run_files import RunFiles, read_run

FACTS = {
    "train.steps": "length asked for",
    "data.batch_size": "batch size",
    "train.precision": "precision",
    "train.seed": "seed",
}
"""Config keys in the table of facts, and what they are called there; the difference of the configs shows the rest."""

ENVIRONMENT = ("parameters", "backend", "world_size", "torch", "python", "platform", "commit")
"""Keys of environment.json in the table of facts; those nested below them come along."""

CURVES_CAPTION = (
    "Thin: as logged. Strong: smoothed, a row's weight halving every 1 % of the run to both sides; what has no noise "
    "is drawn as logged. Red vertical lines: rows whose value was not finite. The log panels show the same rows."
)
LAST_VALUE_CAPTION = " The number at the upper right is where the strong line ends."


def write_report(out_html: Path, *, title: str, runs: Sequence[Path], against: XAxis = "step") -> Path:
    """Write one self-contained page: facts, differences of configs, curves in shared panels, newest pictures.

    Args:
        out_html: the page; missing folders are made.
        title: of the page.
        runs: folders of runs, in the order of the legend.
        against: horizontal axis of the curves; `images` compares runs of different batch sizes.

    Returns:
        `out_html`.

    Raises:
        BadInput: a folder or file that is missing or cannot be read.
    """
    read = [read_run(folder) for folder in runs]
    page = Page(title, ", ".join(run.name for run in read))
    page.heading("Runs")
    add_facts(page, {run.name: run for run in read})
    if len(read) > 1:
        _add_differences(page, read)
    page.heading("Curves")
    add_curves(page, read, against=against)
    pictures = [(run, run.newest_pictures()) for run in read]
    if any(found for _, found in pictures):
        page.heading("Pictures")
    for run, found in pictures:
        for name, path in found.items():
            page.picture(path, f"{name} of {run.name}: {path.name}, the newest of its kind.", zoom=2)
    return page.write(out_html)


def add_facts(page: Page, runs: dict[str, RunFiles]) -> None:
    """A table with a column for each run: how far it came, what it is, where it was computed."""
    columns = {label: run_facts(run) for label, run in runs.items()}
    names = list(dict.fromkeys(name for facts in columns.values() for name in facts))
    groups = list(dict.fromkeys(name.split()[0] for name in names))
    names.sort(key=lambda name: groups.index(name.split()[0]))
    rows = [[name, *(facts.get(name) for facts in columns.values())] for name in names]
    caption = "How far the runs came (last row of metrics.jsonl), from config.yaml, and from environment.json."
    page.table(["", *columns], rows, caption)


def run_facts(run: RunFiles) -> dict[str, Cell]:
    """Name -> value; what a run's files do not tell is left out."""
    last = run.metrics.rows[-1]
    facts: dict[str, Cell] = {name: last[name] for name in ("step", "images", "epoch") if name in last}
    if "time" in last:
        facts["seconds, first row to last"] = run.metrics.seconds
    facts |= {name: run.config[key] for key, name in FACTS.items() if key in run.config}
    for start in ENVIRONMENT:
        for key, value in run.environment.items():
            if key == start or key.startswith(f"{start}."):
                facts[key.replace(".", " ")] = value
    return facts


def add_curves(page: Page, runs: Sequence[RunFiles], against: XAxis = "step") -> None:
    """The curves of all values that the runs logged."""
    metrics = [run.metrics for run in runs]
    caption = CURVES_CAPTION + (LAST_VALUE_CAPTION if len(runs) == 1 else "")
    page.drawing(draw_curves(metrics, default_keys(metrics), against), caption)


def _add_differences(page: Page, runs: Sequence[RunFiles]) -> None:
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows: list[list[Cell]] = [[key, *(run.config.get(key) for run in runs)] for key in keys]
    differing = [row for row in rows if any(cell != row[1] for cell in row[2:])]
    if differing:
        page.table(["key", *(run.name for run in runs)], differing, "Config keys in which the runs differ; – is unset.")
    else:
        page.paragraph("The runs have equal configs.")
