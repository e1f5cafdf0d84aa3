"""The page of the demo: from recorded frames to samples, in numbers and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import Self

from rqvae.errors import BadInput
from rqvae.reports.page import Cell, Page, Tile, show
from rqvae.reports.rollout import world_tiles
from rqvae.reports.run_files import flatten, read_mapping, read_run
from rqvae.reports.run_report import add_curves, add_facts

HEADLINES = ("stage1_psnr", "stage1_ssim", "nearest_train_psnr", "seconds", "cpu_seconds")


_KINDS: dict[type, str] = {float: "a number", str: "a text", list: "a list", dict: "a mapping"}
Kind = TypeVar("Kind", float, str, list, dict)
RECON_ROWS = ("recorded", "decoded", "error × 4")


@dataclass(frozen=True)
class DemoInputs:
    """Where the demo's results are.

    Args:
        stage1: folder of the autoencoder's run.
        stage2: folder of the generator's run.
        reconstructions: sheet of three rows: recorded frames, their reconstructions, absolute error x 4.
        samples: sheet of one row an action.
        dream: film of dreams beside the real game.
        actions: names of the actions, in the order of the rows.
    """

    stage1: Path
    stage2: Path
    reconstructions: Path
    samples: Path
    dream: Path
    actions: Sequence[str]

    @classmethod
    def of(cls, root: Path, summary: Mapping[str, Any]) -> Self:
        """As the demo's parts leave them: the runs by summary.json, the action names by the recording's meta.json.

        Raises:
            BadInput: a key that is missing, or no meta.json.
        """
        meta_path = root / "frames" / "meta.json"
        return cls(
            stage1=Path(_get(summary, "stage1_run", root / "summary.json", str)),
            stage2=Path(_get(summary, "stage2_run", root / "summary.json", str)),
            reconstructions=root / "recon" / "grids" / "reconstructions.png",
            samples=root / "samples.png",
            dream=root / "dream.gif",
            actions=_get(read_mapping(meta_path), "action_names", meta_path, list),
        )


def write_demo_report(root: Path, inputs: DemoInputs | None = None) -> Path:
    """Write `root/report/index.html`, one self-contained page, from `root/summary.json` and the inputs.

    summary.json holds `stage1_psnr` (dB), `stage1_ssim`, `nearest_train_psnr` (dB), `seconds` and `cpu_seconds` of all
    parts, and of each in `parts`: {name: {"seconds": s, "cpu_seconds": s}}; `world` is the world model's evaluation.
    What else it holds is listed at the end.

    Args:
        root: the demo's folder.
        inputs: runs and pictures; None for those of `DemoInputs.of`.

    Returns:
        The page.

    Raises:
        BadInput: a file that is missing or cannot be read, a key that is missing or of another type.
    """
    summary_path = root / "summary.json"
    summary = read_mapping(summary_path)
    numbers = {key: _get(summary, key, summary_path, float) for key in HEADLINES}
    parts = _get(summary, "parts", summary_path, dict)
    inputs = inputs or DemoInputs.of(root, summary)
    stage1, stage2 = read_run(inputs.stage1), read_run(inputs.stage2)

    page = Page(
        "MAE-DiT demo: from recorded frames to a game that is dreamed",
        "An autoencoder learned the frames of a small maze game; a diffusion transformer learned the latent of the "
        "next frame from four frames and the player's actions.",
        "Made from summary.json, metrics.jsonl, config.yaml and environment.json; the page loads nothing.",
    )
    world = _get(summary, "world", summary_path, dict)
    page.tiles(*_tiles(numbers), *world_tiles(world))
    _add_pictures(page, inputs)
    page.heading("Stage 1: the autoencoder and its discriminator")
    add_curves(page, [stage1])
    page.heading("Stage 2: the model of the next frame")
    add_curves(page, [stage2])
    page.heading("The world model's scores")
    page.table(["score", "value"], [[*pair] for pair in flatten(world).items()], "Of `rollout`; PSNR in dB.")
    page.heading("Where the time went")
    _add_parts(page, parts, numbers, summary_path)
    page.heading("The runs")
    add_facts(page, {"stage 1": stage1, "stage 2": stage2})
    _add_rest(page, summary)
    return page.write(root / "report" / "index.html")


def _add_pictures(page: Page, inputs: DemoInputs) -> None:
    page.heading("Reconstructions")
    caption = (
        "Frames of the test split, none of which is in the train split: as recorded, what the autoencoder makes of "
        "them, and the absolute error times four (black: exact)."
    )
    page.picture(inputs.reconstructions, caption, zoom=2, rows=RECON_ROWS)
    page.heading("Dreams")
    caption = (
        "Four dreams of 64 frames, each beside the real game under the same actions: left of a pair the dream, right "
        "the game. Its ghosts turn at random, so the two part after some frames. rollout.html has more, and scores."
    )
    page.picture(inputs.dream, caption, zoom=1.5)
    page.heading("Next frames by action")
    caption = (
        "From eight moments of real play, the third frame that the model dreams while one action is held: a row an "
        "action, a column a moment."
    )
    page.picture(inputs.samples, caption, zoom=3, rows=inputs.actions)


def _tiles(numbers: Mapping[str, float]) -> list[Tile]:
    cpu = f"wall clock, all parts; {show(numbers['cpu_seconds'])} s of CPU time"
    return [
        Tile("Stage 1 PSNR", numbers["stage1_psnr"], "dB", "test split, 8-bit RGB, mean over images"),
        Tile("Stage 1 SSIM", numbers["stage1_ssim"], "", "test split; 1 is identical"),
        Tile(
            "Dreams: nearest train frame",
            numbers["nearest_train_psnr"],
            "dB",
            "PSNR of a dreamed frame to the most similar train frame: low is no frame of the game",
        ),
        Tile("Time", numbers["seconds"], "s", cpu),
    ]


def _add_parts(page: Page, parts: Mapping[str, Any], total: Mapping[str, float], path: Path) -> None:
    """Seconds by part; the last row is the sum that summary.json gives."""
    rows: list[list[Cell]] = []
    for name in parts:
        cost = _get(parts, name, path, dict, "parts.")
        rows.append([name, *(_get(cost, key, path, float, f"parts.{name}.") for key in ("seconds", "cpu_seconds"))])
    rows.append(["all", total["seconds"], total["cpu_seconds"]])
    page.table(["part", "seconds", "CPU seconds"], rows, "Wall-clock and CPU seconds by part of the demo.")


def _add_rest(page: Page, summary: Mapping[str, Any]) -> None:
    rest = flatten({key: value for key, value in summary.items() if key not in (*HEADLINES, "parts", "world")})
    if rest:
        page.table(["", "value"], [[key, value] for key, value in rest.items()], "What else summary.json holds.")


def _get(content: Mapping[str, Any], key: str, path: Path, kind: type[Kind], prefix: str = "") -> Kind:
    """A key of a file, of the type asked for; an integer is a number, too, a boolean is not."""
    if key not in content:
        raise BadInput(f"{path}: key {prefix}{key}: expected {_KINDS[kind]}, there is no such key")
    value = content[key]
    fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not fits:
        raise BadInput(f"{path}: key {prefix}{key}: expected {_KINDS[kind]}, got {value!r}")
    return value
