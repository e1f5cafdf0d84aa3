"""The debug log of a mask-conditional latent diffusion (dm.py of DiffInfinite's forks): blocks and a tqdm bar.

A block begins with `=== Title [place()] ===` and states what one draw, one batch or one network call was like. The bar
goes to stderr, which is not buffered, and stands before blocks that were printed earlier: the file's order is not that
of time.
"""

from __future__ import annotations

import re
from pathlib import Path

from rqvae.health.log import LogBuilder, RunLog
from rqvae.health.readers._pairs import note_line
from rqvae.health.readers._progress_bar import ProgressBar
from rqvae.health.text import as_number, lines_of

_BLOCK = re.compile(r"^=== (.+?) \[(.*?)\] ===$")
_PAIR = re.compile(r"^ {0,4}([A-Za-z][\w /-]{0,60}?): (.+)$")
_COUNT = re.compile(r"^ {4}(\d+): (\d+)$")
_RANGE = re.compile(r"\[\s*([-\d.e+]+),\s*([-\d.e+]+)\s*\]")
_ROW = re.compile(r"\[([-\d.e+,\s]+)\]")
_STATING = ("Configuration", "Model Summary", "Dataset", "Cutoff")
_DRAWN = {"Selected class index": "draw/class", "Class size": "draw/size", "Selected sample index": "draw/index"}
_CALLS = 5000


class Reader:
    """Draws become series: `draw/class`, `draw/size`, `draw/masked`, `draw/timestep`, `image/std`, `pixels/class_K`.

    `condition/classes_train` and `condition/classes_sampling` count the classes of each row that a network call was
    conditioned on, `input/low` and `input/high` are the range of the images that training sees.
    """

    name = "dm"
    files = ("log_*.txt",)

    def sniff(self, _path: Path, head: str) -> float:
        blocks = len(re.findall(_BLOCK.pattern, head, re.MULTILINE))
        return 0.96 if blocks >= 2 else 0.0

    def read(self, path: Path) -> RunLog:
        log, count = LogBuilder(path, self.name), 0
        blocks, bar = _Blocks(log), ProgressBar(log)
        for count, text in lines_of(path):  # noqa: B007
            if not bar.line(count, text):
                blocks.line(count, text)
        blocks.end_draw()
        return log.finish(count)


class _Blocks:
    """Where in the log a line stands decides what it says."""

    def __init__(self, log: LogBuilder) -> None:
        self.log, self.block, self.part = log, "", ""
        self.draws = self.images = self.batches = self.calls = 0
        self.training, self.no_mask_line, self.draw_line = True, 0, 0
        self._rows: list[str] | None = None

    def line(self, number: int, text: str) -> None:
        if self._rows is not None:
            self._tensor_line(number, text)
        elif text.startswith("==="):
            self._begin(number, text)
        elif text.startswith("Size of masks"):
            self.training = self.block.startswith(("Diffusion Step", "Training"))
            if self.block.startswith("Model Predictions"):
                self.block = "Sampling"
        elif text.startswith("Value of classes distribution"):
            self._rows = []
            self._tensor_line(number, text)
        elif text.startswith("No mask found"):
            self.no_mask_line = number
        elif not text.startswith(("Value of c:", "Size of")):
            self._stated(number, text)

    def _stated(self, number: int, text: str) -> None:
        if found := _PAIR.match(text):
            self._pair(number, found[1], found[2])
        elif found := _COUNT.match(text):
            self._pixels(number, found[1], found[2])
        elif text.strip() == "training complete":
            self.log.event("done", number, text)
        elif text:
            self._heading(number, text)

    def _heading(self, number: int, text: str) -> None:
        if text.endswith(":"):
            self.part = text[:-1].strip()
        elif not self.block or any(word in self.block for word in _STATING):
            note_line(self.log, number, text)

    def _begin(self, number: int, text: str) -> None:
        found = _BLOCK.match(text)
        self.block, self.part = found[1] if found else text, ""
        if self.block.startswith("Data Selection"):
            self.end_draw()
            self.draws, self.draw_line = self.draws + 1, number
        elif self.block.startswith("Generated Samples"):
            self.log.event("sampling", number, text)

    def end_draw(self) -> None:
        """Whether the image that was drawn had a mask is known when the next draw begins."""
        if self.draw_line:
            self.log.add("draw/masked", self.draws, float(not self.no_mask_line), self.no_mask_line or self.draw_line)
        self.draw_line = self.no_mask_line = 0

    def _pair(self, number: int, key: str, value: str) -> None:
        if self.block.startswith("Data Selection"):
            name = _DRAWN.get(key)
            if name:
                self._point(name, self.draws, value, number)
        elif self.block.startswith("Image Loading"):
            self._image(number, key, value)
        elif self.block.startswith("Training Loop"):
            self._batch(number, key, value)
        elif self.block.startswith("Diffusion Step"):
            self._step(number, key, value)
        elif any(word in self.block for word in _STATING) or not self.block:
            self.log.fact(key, value, number)

    def _point(self, name: str, step: float, text: str, line: int) -> None:
        """A point, unless debug output of another process was printed into its number."""
        if (value := as_number(text)) is not None:
            self.log.add(name, step, value, line)

    def _image(self, number: int, key: str, value: str) -> None:
        if key == "Std" and self.part.startswith("Image"):
            self.images += 1
            self._point("image/std", self.images, value, number)

    def _batch(self, number: int, key: str, value: str) -> None:
        if key == "Value range" and self.part.startswith("Input images") and (found := _RANGE.search(value)):
            self.batches += 1
            self._point("input/low", self.batches, found[1], number)
            self._point("input/high", self.batches, found[2], number)

    def _step(self, number: int, key: str, value: str) -> None:
        if key == "Timestep":
            for t in re.findall(r"\d+", value.partition("]")[0]):
                self.log.add("draw/timestep", self.batches, float(t), number)
        elif key in ("Input shape", "Input dtype"):
            self.log.fact(f"network {key.lower()}", value, number)

    def _pixels(self, number: int, key: str, value: str) -> None:
        if self.block.startswith("Image Loading") and self.part.startswith("Value counts"):
            self.log.add(f"pixels/class_{key}", self.draws, float(value), number)

    def _tensor_line(self, number: int, text: str) -> None:
        """A printed tensor ends with `)`; its rows are class shares, summing to 1."""
        assert self._rows is not None
        self._rows.append(text)
        if not text.rstrip().endswith(")") and len(self._rows) < 4000:
            return
        whole, self._rows = " ".join(self._rows), None
        self.calls += 1
        if self.calls > _CALLS:
            return
        name = "condition/classes_train" if self.training else "condition/classes_sampling"
        for row in _ROW.findall(whole):
            shares = [as_number(x) for x in row.split(",") if x.strip()]
            self.log.add(name, self.calls, float(sum(share is not None and share > 0 for share in shares)), number)
