"""What a compile diagnosis leaves: metrics, images, lists; and its mirrors in TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from rqvae.diagnostics.compare import Status
from rqvae.diagnostics.rows import FIGURES, TIMING, Row
from rqvae.diagnostics.units import Unit, tree_json, tree_text
from rqvae.files import replacing, write_whole
from rqvae.metrics.grids import image_grid
from rqvae.trainers.evaluation_trainer import as_pictures
from rqvae.trainers.logging import wandb_mode
from rqvae.trainers.run_folder import make_folder
from rqvae.trainers.settings import LogSettings

log = logging.getLogger(__name__)

COLUMNS = ("index", "path", "type", "status", "role", "notes", "calls", "backend_calls", "graphs", *FIGURES)
_IMAGE = ("mean", "std", "blank", "psnr", "file", "error_map", "source")
ERROR_GAIN = 10


class DiagnosticFiles:
    """The output folder.

    Args:
        folder: `--output`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in ("images", "metrics", "logs", "submodules"):
            make_folder(folder / part, "--output")

    @property
    def bad_paths(self) -> Path:
        """What compile_except leaves eager where nothing else is said."""
        return self.folder / "bad_paths.txt"

    def write_submodules(self, units: Sequence[Unit]) -> Path:
        """submodules/submodule_list.txt and .json; returns the first."""
        text = self.folder / "submodules" / "submodule_list.txt"
        write_whole(text, tree_text(units))
        write_whole(text.with_suffix(".json"), json.dumps(tree_json(units), indent=1))
        return text

    def write_bad_paths(self, paths: Sequence[str], subject: str) -> None:
        """bad_paths.txt, one path a line, under a comment that says what they are of."""
        head = f"# submodules that a compiler breaks; read by --mode compile_except\n# {' '.join(subject.split())}\n"
        write_whole(self.bad_paths, head + "".join(f"{path}\n" for path in paths))

    def write_metrics(self, rows: Sequence[Row], summary: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """metrics/metrics.json and the table of it, metrics/metrics.csv."""
        whole = {"results": list(rows), "summary": summary, "config": config}
        write_whole(self.folder / "metrics" / "metrics.json", json.dumps(whole, indent=1, allow_nan=False))
        target = self.folder / "metrics" / "metrics.csv"
        with replacing(target) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*COLUMNS, *(f"image_{name}" for name in _IMAGE), *TIMING, "error", "subject"])
            for row in rows:
                image, error = row.get("image") or {}, row.get("error") or {}
                cells = [";".join(row["notes"]) if name == "notes" else row.get(name) for name in COLUMNS]
                timing = row.get("timing") or {}
                writer.writerow(
                    [
                        *cells,
                        *(image.get(name) for name in _IMAGE),
                        *(timing.get(t) for t in TIMING),
                        error.get("message"),
                        config["subject"],
                    ]
                )

    def picture(self, name: str, images: Tensor) -> str:
        """Write (B, 3, H, W) in [0, 1] side by side as images/NAME.png; returns the path within the folder."""
        file = self.folder / "images" / f"{name}.png"
        pixels = as_pictures(images.float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1))
        Image.fromarray(image_grid(pixels, columns=len(pixels))).save(file)
        return f"images/{file.name}"

    def unit_pictures(self, row: Row, image: Tensor, reference: Tensor) -> dict[str, str]:
        """The image with one unit compiled, and ten times its error; the index keeps names apart (`a.b` and `a_b`)."""
        stem = f"{row['index']:03d}_{re.sub(r'[^A-Za-z0-9-]+', '_', row['path'])}"
        kind = row["status"] if row["status"] in (Status.OK.value, Status.BLANK.value) else "BAD"
        named = {"file": self.picture(f"{stem}_{kind}", image)}
        if image.shape == reference.shape:
            named["error_map"] = self.picture(f"{stem}_error_x{ERROR_GAIN}", (image - reference).abs() * ERROR_GAIN)
        return named


class Mirrors:
    """TensorBoard and Weights & Biases: one step a unit, tags named by the module's path.

    Whatever goes wrong here is kept in `errors` and changes no verdict.

    Args:
        folder: the output folder; `logs/tensorboard` and `logs/wandb` are in it.
        tensorboard: write events.
        wandb: (project, run name), or None.
        config: of the diagnosis.
        step: units already written by an earlier call.
    """

    def __init__(
        self, folder: Path, tensorboard: bool, wandb: tuple[str, str] | None, config: dict[str, Any], step: int
    ) -> None:
        self.errors: list[str] = []
        self._board: Any = None
        self._wandb: Any = None
        self._step = step
        if tensorboard:
            self._guarded(lambda: self._open_board(folder / "logs" / "tensorboard", config))
        if wandb:
            self._guarded(lambda: self._open_wandb(folder / "logs" / "wandb", wandb, config))

    def _open_board(self, folder: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder))
        self._board.add_text("config", json.dumps(config, indent=1))

    def _open_wandb(self, folder: Path, names: tuple[str, str], config: dict[str, Any]) -> None:
        import wandb

        make_folder(folder, "--output")
        mode: Any = wandb_mode(LogSettings())
        self._wandb = wandb.init(project=names[0], name=names[1], dir=folder, mode=mode, config=config)

    def row(self, row: Row) -> None:
        """Write a unit's values, as it ends."""
        image, timing = row.get("image") or {}, row["timing"]
        duration = sum(timing[name] or 0.0 for name in ("compile_seconds", "run_seconds", "eager_seconds"))
        values = {"mean": image.get("mean"), "std": image.get("std"), "blank": image.get("blank"), "duration": duration}
        values["status_code"] = list(Status).index(Status(row["status"]))
        numbers = {f"{row['path']}/{name}": float(value) for name, value in values.items() if value is not None}
        if self._board is not None:
            self._guarded(lambda: self._to_board(row, numbers))
        if self._wandb is not None:
            self._guarded(lambda: self._wandb.log({**numbers, f"{row['path']}/status": row["status"]}, step=self._step))
        self._step += 1

    def _to_board(self, row: Row, numbers: Mapping[str, float]) -> None:
        for tag, value in numbers.items():
            self._board.add_scalar(tag, value, self._step)
        self._board.add_text(f"{row['path']}/status", row["status"], self._step)
        self._board.flush()

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write the counts and close both."""
        if self._board is not None:
            self._guarded(self._board.close)
        if self._wandb is not None:
            counts = {name: summary[name] for name in ("total", "compiled", "failed", "blank") if name in summary}
            self._guarded(lambda: (self._wandb.summary.update(counts), self._wandb.finish()))

    def _guarded(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001  (a mirror's failure is not the compiler's)
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.errors.append(text)
            log.warning("mirror: %s", text)
