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
from rqvae.diagnostics.rows import FIGURES, TIMING, Row, bad
from rqvae.diagnostics.units import Unit, tree_json, tree_text
from rqvae.errors import BadInput
from rqvae.files import replacing, write_whole
from rqvae.metrics.grids import image_grid
from rqvae.trainers.evaluation_trainer import as_pictures
from rqvae.trainers.logging import wandb_mode
from rqvae.trainers.run_folder import make_folder
from rqvae.trainers.settings import LogSettings

log = logging.getLogger(__name__)

COLUMNS = ("index", "path", "type", "status", "role", "notes", "calls", "backend_calls", "graphs", *FIGURES)
_IMAGE = ("mean", "std", "blank", "psnr", "file", "error_map", "source", "no_picture")
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

    def write_submodules(self, units: Sequence[Unit], subject: str) -> Path:
        """submodules/submodule_list.txt, under a comment that says what it is of, and .json; returns the first."""
        text = self.folder / "submodules" / "submodule_list.txt"
        write_whole(text, f"# {' '.join(subject.split())}\n{tree_text(units)}")
        write_whole(text.with_suffix(".json"), json.dumps(tree_json(units), indent=1))
        return text

    def write_bad_paths(self, paths: Sequence[str], subject: str) -> None:
        """bad_paths.txt, one path a line, under a comment that says what they are of."""
        head = f"# submodules that a compiler breaks; read by --mode compile_except\n# {' '.join(subject.split())}\n"
        write_whole(self.bad_paths, head + "".join(f"{path}\n" for path in paths))

    def read_metrics(self) -> dict[str, Any] | None:
        """metrics.json of an earlier call; None where there is none.

        Raises:
            BadInput: a file that is not one of a diagnosis.
        """
        file = self.folder / "metrics" / "metrics.json"
        if not file.exists():
            return None
        try:
            whole = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"{file}: expected metrics.json of a diagnosis, got {error}") from None
        if not (isinstance(whole, dict) and whole.keys() >= {"results", "summary", "config"}):
            raise BadInput(f"{file}: expected results, summary and config of a diagnosis, got something else")
        return whole

    def write_metrics(self, whole: Mapping[str, Any]) -> None:
        """metrics/metrics.json and the table of it, metrics/metrics.csv: submodules, then sets of compile_except."""
        write_whole(self.folder / "metrics" / "metrics.json", json.dumps(whole, indent=1, allow_nan=False))
        alone = whole["config"]["mode"] == "compile_except"  # then the results are those of one of the sets
        rows = [(row, "") for row in whole["results"] if not alone]
        for key, entry in whole["summary"].get("compile_except", {}).items():
            rows += [(row, key) for row in entry["results"]]
        target = self.folder / "metrics" / "metrics.csv"
        with replacing(target) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*COLUMNS, *(f"image_{name}" for name in _IMAGE), *TIMING, "error", "excluded", "subject"])
            for row, key in rows:
                image, error, timing = row.get("image") or {}, row.get("error") or {}, row.get("timing") or {}
                cells = [";".join(row["notes"]) if name == "notes" else row.get(name) for name in COLUMNS]
                values = [*(image.get(name) for name in _IMAGE), *(timing.get(t) for t in TIMING)]
                writer.writerow([*cells, *values, error.get("message"), key, whole["config"]["subject"]])

    def picture(self, name: str, images: Tensor) -> str:
        """Write (B, 3, H, W) in [0, 1] side by side as images/NAME.png; returns the path within the folder.

        NaN is black, as PNG has none: the row's status and figures tell of it.
        """
        file = self.folder / "images" / f"{name}.png"
        pixels = as_pictures(images.float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1))
        Image.fromarray(image_grid(pixels, columns=len(pixels))).save(file)
        return f"images/{file.name}"

    def unit_pictures(self, row: Row, image: Tensor, reference: Tensor, group: str = "") -> dict[str, str]:
        """The image with one unit compiled, and ten times its error, which is white where it is not finite.

        The index keeps names apart (`a.b` and `a_b`), and so does the name of a group of rows with indices of its own.
        """
        stem = f"{group}{row['index']:03d}_{re.sub(r'[^A-Za-z0-9-]+', '_', row['path'])}"
        kind = "BAD" if bad(row) and row["status"] != Status.BLANK.value else row["status"]
        named = {"file": self.picture(f"{stem}_{kind}", image)}
        if image.shape == reference.shape:
            error = (image - reference).abs() * ERROR_GAIN
            named["error_map"] = self.picture(f"{stem}_error_x{ERROR_GAIN}", error.where(error.isfinite(), 1.0))
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
        self._steps: dict[str, int] = {}
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
        """Write a unit's values, as it ends: those of its image too, where it is known by then."""
        timing = row["timing"]
        duration = sum(timing[name] or 0.0 for name in ("compile_seconds", "run_seconds", "eager_seconds"))
        values = {**_of_image(row), "duration": duration, "status_code": list(Status).index(Status(row["status"]))}
        self._steps[row["path"]] = self._step
        self._write(row["path"], values, self._step, row["status"])

    def picture(self, row: Row) -> None:
        """Write the values of a unit's image that was decoded afterwards: in TensorBoard at the unit's own step, in
        Weights & Biases, whose steps only grow, at a new one."""
        self._write(row["path"], _of_image(row), self._steps.get(row["path"], self._step), None)

    def _write(self, path: str, values: Mapping[str, Any], step: int, status: str | None) -> None:
        numbers = {f"{path}/{name}": float(value) for name, value in values.items() if value is not None}
        if self._board is not None:
            self._guarded(lambda: self._to_board(path, numbers, step, status))
        if self._wandb is not None:
            words = {} if status is None else {f"{path}/status": status}
            self._guarded(lambda: self._wandb.log({**numbers, **words}, step=self._step))
        self._step += 1

    def _to_board(self, path: str, numbers: Mapping[str, float], step: int, status: str | None) -> None:
        for tag, value in numbers.items():
            self._board.add_scalar(tag, value, step)
        if status is not None:
            self._board.add_text(f"{path}/status", status, step)
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


def _of_image(row: Row) -> dict[str, Any]:
    image = row.get("image") or {}
    return {name: image.get(name) for name in ("mean", "std", "blank")}
