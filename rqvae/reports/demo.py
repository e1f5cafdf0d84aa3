"""The page of the demo: from recorded frames to samples, in numbers and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rqvae.errors import BadInput
from rqvae.reports.page import Cell, Page, Tile, show
from rqvae.reports.run_files import flatten, read_mapping, read_run
from rqvae.reports.run_report import add_curves, add_facts

HEADLINES = ("stage1_psnr", "stage1_ssim", "nearest_train_psnr", "cpu_seconds")


@dataclass(frozen=True)
class DemoInputs:
    """Where the demo's results are.

    Args:
        stage1: folder of the autoencoder's run.
        stage2: folder of the generator's run.
        reconstructions: sheets of triples original | reconstruction | error x 4, as
            `rqvae.metrics.grids.comparison_grid` makes them.
        samples: name of an action -> sheet of samples under it.
        zoom: size of a sheet's pixel on the page; 3 suits sheets of 32-pixel frames that were not scaled.
    """

    stage1: Path
    stage2: Path
    reconstructions: Sequence[Path]
    samples: Mapping[str, Path]
    zoom: float = 3


def write_demo_report(root: Path, inputs: DemoInputs) -> Path:
    """Write `root/report/index.html`, one self-contained page, from `root/summary.json` and the inputs.

    summary.json holds `stage1_psnr` (dB), `stage1_ssim`, `nearest_train_psnr` (dB), `cpu_seconds`, and `seconds`: a
    number, or seconds by part of the demo. What else it holds is listed at the end of the page.

    Args:
        root: the demo's folder.
        inputs: the runs and the pictures.

    Returns:
        The page.

    Raises:
        BadInput: a file that is missing or cannot be read, a key that is missing or no number.
    """
    summary_path = root / "summary.json"
    summary = read_mapping(summary_path)
    numbers = {key: _number(summary, key, summary_path) for key in HEADLINES}
    seconds = _seconds(summary, summary_path)
    stage1, stage2 = read_run(inputs.stage1), read_run(inputs.stage2)

    page = Page(
        "MAE-DiT demo: from recorded frames to new ones",
        "An autoencoder learned the frames of a small maze game, a diffusion transformer learned its latents.",
        "Made from summary.json, metrics.jsonl, config.yaml and environment.json; the page loads nothing.",
    )
    page.tiles(*_tiles(numbers, seconds))
    page.heading("Reconstructions")
    caption = (
        "Frames of the test split, in triples: the recorded frame, what the autoencoder makes of it, and the absolute "
        "error x 4 (black: exact). No frame of this split is in the train split."
    )
    for path in inputs.reconstructions:
        page.picture(path, caption, inputs.zoom)
    page.heading("Samples by action")
    caption = "Frames that the diffusion model made from noise and decoded, each sheet under the action that led to it."
    page.gallery(inputs.samples, caption, inputs.zoom)
    page.heading("Stage 1: the autoencoder and its discriminator")
    add_curves(page, [stage1])
    page.heading("Stage 2: the diffusion transformer")
    add_curves(page, [stage2])
    page.heading("Where the time went")
    _add_seconds(page, seconds)
    page.heading("The runs")
    add_facts(page, {"stage 1": stage1, "stage 2": stage2})
    _add_rest(page, summary)
    return page.write(root / "report" / "index.html")


def _tiles(numbers: Mapping[str, float], seconds: Mapping[str, float]) -> list[Tile]:
    return [
        Tile("Stage 1 PSNR", numbers["stage1_psnr"], "dB", "test split, 8-bit RGB, mean over images"),
        Tile("Stage 1 SSIM", numbers["stage1_ssim"], "", "test split; 1 is identical"),
        Tile(
            "Samples: nearest train frame",
            numbers["nearest_train_psnr"],
            "dB",
            "PSNR of a sample and the train frame closest to it: high is a frame of this game",
        ),
        Tile("Time", sum(seconds.values()), "s", f"all parts; {show(numbers['cpu_seconds'])} s of CPU time"),
    ]


def _add_seconds(page: Page, seconds: Mapping[str, float]) -> None:
    total = sum(seconds.values())
    rows: list[list[Cell]] = [[part, value, round(100 * value / total, 1)] for part, value in seconds.items()]
    rows.append(["total", total, 100.0])
    page.table(["part", "seconds", "% of all"], rows, "Wall-clock seconds by part of the demo.")


def _add_rest(page: Page, summary: Mapping[str, Any]) -> None:
    rest = flatten({key: value for key, value in summary.items() if key not in (*HEADLINES, "seconds")})
    if rest:
        page.table(["", "value"], [[key, value] for key, value in rest.items()], "What else summary.json holds.")


def _seconds(summary: Mapping[str, Any], path: Path) -> dict[str, float]:
    """Seconds by part; one part called `demo` where only their sum is given."""
    parts = summary.get("seconds")
    if isinstance(parts, Mapping) and parts:
        return {key: _number(parts, key, path, "seconds.") for key in parts}
    return {"demo": _number(summary, "seconds", path)}


def _number(content: Mapping[str, Any], key: str, path: Path, prefix: str = "") -> float:
    if key not in content:
        raise BadInput(f"{path}: key {prefix}{key}: expected a number, there is no such key")
    value = content[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(f"{path}: key {prefix}{key}: expected a number, got {value!r}")
    return value
