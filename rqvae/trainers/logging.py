"""The log of record, metrics.jsonl, and its mirrors TensorBoard and Weights & Biases; log.txt for words."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rqvae.files import write_whole
from rqvae.metrics.animations import gif_bytes
from rqvae.trainers.settings import LogSettings

log = logging.getLogger(__name__)
_RANK_OF_THREAD: dict[int, int] = {}


class _AboveTheBar(logging.Handler):
    """Writes lines to stderr without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_text_log(rank: int, file: Path | None = None, quiet: bool = False) -> None:
    """Standard logging with the rank in front: rank 0 to the terminal, every rank that has a `file` to it."""
    root, thread = logging.getLogger(), threading.get_ident()
    _RANK_OF_THREAD[thread] = rank
    for handler in list(root.handlers):
        if getattr(handler, "rank", rank) == rank:  # another rank's, where ranks are threads of one process, stays
            root.removeHandler(handler)
            handler.close()
    form = logging.Formatter(f"%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s")
    handlers: list[logging.Handler] = []
    if rank == 0 and not quiet:
        handlers.append(_AboveTheBar())
    if file is not None:
        handlers.append(logging.FileHandler(file))
    for handler in handlers or [logging.NullHandler()]:
        handler.setFormatter(form)
        handler.rank = rank  # type: ignore[attr-defined]
        handler.addFilter(lambda record: _RANK_OF_THREAD.get(record.thread or 0, rank) == rank)
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    for client in ("aiobotocore", "botocore"):  # of S3: where it found keys and an address, at each start
        logging.getLogger(client).setLevel(logging.WARNING)


def trim_metrics(path: Path, step: int) -> None:
    """Drop the rows after `step`, and a half-written last line: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and row["step"] <= step:
            kept.append(line)
    write_whole(path, "".join(kept))


def wandb_mode(settings: LogSettings) -> str:
    """Where W&B writes: the setting, WANDB_MODE, or online where a key is configured and offline where none is."""
    if settings.wandb != "auto":
        return settings.wandb
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    has_key = "WANDB_API_KEY" in os.environ or (netrc.exists() and "api.wandb.ai" in netrc.read_text())
    mode = "online" if has_key else "offline"
    log.info("Weights & Biases: %s (%s)", mode, "a key is configured" if has_key else "no key: `wandb login`")
    return mode


def add_to_wandb(folder: Path, wandb_id: str, values: dict[str, float]) -> None:
    """Add values to the summary of a W&B run that may have ended."""
    mode = wandb_mode(LogSettings())
    if mode != "disabled":
        import wandb

        with wandb.init(id=wandb_id, resume="allow", dir=folder, mode=mode) as run:  # type: ignore[arg-type]
            run.summary.update(values)


class RunLog:
    """Writes rows and pictures of one run. Made on rank 0 only.

    Args:
        folder: the run's folder.
        settings: mirrors.
        project: W&B project.
        wandb_id: W&B id to go on with, or None for a new one.
        step: the step the run starts or goes on at.
        config: resolved config, shown by W&B.
    """

    def __init__(
        self, folder: Path, settings: LogSettings, project: str, wandb_id: str | None, step: int, config: dict[str, Any]
    ) -> None:
        trim_metrics(folder / "metrics.jsonl", step)
        self._rows = (folder / "metrics.jsonl").open("a")
        self.folder, self._board, self._wandb = folder, None, None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)
        mode = wandb_mode(settings)
        if mode != "disabled":
            import wandb

            self._wandb = wandb.init(
                project=project,
                name=folder.name,
                id=wandb_id,
                resume="allow" if wandb_id else None,
                dir=folder,
                mode=mode,  # type: ignore[arg-type]
                config=config,
            )

    @property
    def wandb_id(self) -> str | None:
        """The id under which W&B goes on."""
        return self._wandb.id if self._wandb else None

    def write(self, clock: dict[str, Any], values: dict[str, float]) -> None:
        """One row: `clock` has step, images, epoch, time; `values` are named `train/loss_total`.

        A value that is not finite is written as null: JSON has no NaN.
        """
        row = {**clock, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        if self._board:
            for key, value in values.items():
                self._board.add_scalar(key, value, clock["step"])
        if self._wandb:
            self._wandb.log({**values, "images": clock["images"], "epoch": clock["epoch"]}, step=clock["step"])

    def picture(self, name: str, image_hwc: np.ndarray, step: int) -> None:
        """A picture (H, W, 3) uint8: samples/NAME_STEP.png and the mirrors."""
        from PIL import Image

        file = self.folder / "samples" / f"{name}_{step:08d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(image_hwc).save(file)
        if self._board:
            self._board.add_image(name, image_hwc, step, dataformats="HWC")
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Image(image_hwc)}, step=step)

    def film(self, name: str, frames_thwc: np.ndarray, fps: float, step: int) -> None:
        """A film (T, H, W, 3) uint8: samples/NAME_STEP.gif and the mirrors, which show the same file."""
        content = gif_bytes(frames_thwc, fps)
        file = self.folder / "samples" / f"{name}_{step:08d}.gif"
        file.parent.mkdir(exist_ok=True)
        write_whole(file, content)
        if self._board:
            from tensorboard.compat.proto.summary_pb2 import Summary

            # `add_video` makes the same record, but needs moviepy to make a GIF of its own
            height, width = frames_thwc.shape[1:3]
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
            self._board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Video(str(file), format="gif")}, step=step)

    def close(self) -> None:
        """Flush and close all."""
        self._rows.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()
