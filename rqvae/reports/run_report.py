"""The report of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rqvae.errors import BadInput
from rqvae.reports.curves import XAxis, default_keys, draw_curves
from rqvae.reports.metrics_file import Metrics
from rqvae.reports.page import Cell, Page
from rqvae.reports.run_files import RunFiles, read_run
from rqvae.reports.summary import median_speeds, summary_rows

FACTS = {
    "train.steps": "length asked for",
    "data.batch_size": "batch size",
    "train.precision": "precision",
    "train.seed": "seed",
}
"""Config keys in the table of facts, and what they are called there; the difference of the configs shows the rest."""

ENVIRONMENT = ("parameters", "backend", "device", "world_size", "torch", "python", "platform", "commit")
"""Keys of environment.json in the table of facts; those nested below them come along."""

UNSAID = ("parameters", "wandb_id")
"""Keys of environment.json that are not in the table of differences: they are elsewhere, or differ always."""

COMMIT_LETTERS = 12

SAME_AS = {"train/images_per_s_device": "train/images_per_s"}
"""Values that get no curve of their own where they equal another."""

PAGE_WIDTH = 1200
"""Of the page's content, in CSS pixels."""

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
        runs: folders of runs, of one stage or of both, in the order of the legend.
        against: horizontal axis of the curves; `images` compares runs of different batch sizes.

    Returns:
        `out_html`.

    Raises:
        BadInput: a folder or file that is missing or cannot be read, or the same run twice.
    """
    read = [read_run(folder, name) for folder, name in zip(runs, distinct_names(runs), strict=True)]
    page = Page(title, ", ".join(run.name for run in read))
    page.heading("Runs")
    add_facts(page, {run.name: run for run in read})
    page.heading("Last and best values")
    _add_summary(page, read)
    page.heading("Curves")
    add_curves(page, read, against=against)
    _add_pictures(page, read)
    if len(read) > 1:
        page.heading("Differences")
        _add_differences(page, read)
    return page.write(out_html)


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as it takes to tell them apart.

    Raises:
        BadInput: the same folder twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for k, path in enumerate(parts):
        if path in parts[:k]:
            raise BadInput(f"{folders[k]}: expected different runs, got this one twice")
    depth = 1
    while len({path[-depth:] for path in parts}) < len(parts):
        depth += 1
    return ["/".join(path[-depth:]) for path in parts]


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
    facts |= median_speeds(run.metrics)
    if run.continues:
        facts["started from"] = ", ".join(run.continues)
    facts |= {name: run.config[key] for key, name in FACTS.items() if key in run.config}
    for start in ENVIRONMENT:
        for key, value in run.environment.items():
            if key == start or key.startswith(f"{start}."):
                facts[key.replace(".", " ")] = str(value)[:COMMIT_LETTERS] if key == "commit" else value
    return facts


def add_curves(page: Page, runs: Sequence[RunFiles], against: XAxis = "step") -> None:
    """The curves of all values that the runs logged."""
    metrics = [run.metrics for run in runs]
    caption = CURVES_CAPTION + (LAST_VALUE_CAPTION if len(runs) == 1 else "")
    keys = [key for key in default_keys(metrics) if key not in SAME_AS or _tells_more(metrics, key)]
    page.drawing(draw_curves(metrics, keys, against), caption)


def _tells_more(runs: Sequence[Metrics], key: str) -> bool:
    """Whether a value differs anywhere from the one that it equals on one device."""
    return any(row[key] != row.get(SAME_AS[key]) for run in runs for row in run.rows if key in row)


def _add_summary(page: Page, runs: Sequence[RunFiles]) -> None:
    rows = summary_rows([run.metrics for run in runs])
    header = ["", "run", "last", "best", "at step"]
    if len(runs) == 1:
        rows, header = [[row[0], *row[2:]] for row in rows], [header[0], *header[2:]]
    caption = "As logged, without smoothing. Best is the highest or lowest value where one of the two is better."
    page.table(header, rows, caption)


def _add_pictures(page: Page, runs: Sequence[RunFiles]) -> None:
    """The newest picture of each kind, the runs side by side."""
    found = {run.name: run.newest_pictures() for run in runs}
    kinds = dict.fromkeys(kind for pictures in found.values() for kind in pictures)
    if kinds:
        page.heading("Pictures")
    for kind in kinds:
        having = {name: pictures[kind] for name, pictures in found.items() if kind in pictures}
        labels = {f"{name}, step {_step(path)}": path for name, path in having.items()}
        width = PAGE_WIDTH / len(labels) - 20
        files = ", ".join(dict.fromkeys(path.name for path in having.values()))
        page.gallery(labels, f"{kind}: the newest of each run ({files}).", zoom=2, width=width)


def _step(path: Path) -> str:
    """`60` of `samples_00000060.png`."""
    return path.stem.rpartition("_")[2].lstrip("0") or "0"


def _add_differences(page: Page, runs: Sequence[RunFiles]) -> None:
    names = [run.name for run in runs]
    environments = [{k: v for k, v in run.environment.items() if k.partition(".")[0] not in UNSAID} for run in runs]
    for files, what, equal in (
        ([run.config for run in runs], "Config keys in which the runs differ; – is unset.", "configs"),
        (environments, "Where the runs were computed: what differs in environment.json; – is unset.", "environments"),
    ):
        rows = _differing(files)
        if rows:
            page.table(["key", *names], rows, what)
        else:
            page.paragraph(f"The runs have equal {equal}.")


def _differing(files: Sequence[Mapping[str, Cell]]) -> list[list[Cell]]:
    keys = dict.fromkeys(key for file in files for key in file)
    rows: list[list[Cell]] = [[key, *(_text(file.get(key)) for file in files)] for key in keys]
    return [row for row in rows if any(cell != row[1] for cell in row[2:])]


def _text(cell: Cell) -> Cell:
    """A list as one line of words, a command line among them."""
    return " ".join(str(part) for part in cell) if isinstance(cell, list) else cell
