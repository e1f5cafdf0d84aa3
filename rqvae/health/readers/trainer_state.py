"""trainer_state.json of Hugging Face's Trainer: `log_history` holds one object a logged step, training and "
"evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rqvae.errors import BadInput
from rqvae.health.log import LogBuilder, RunLog
from rqvae.health.text import as_number, encoding_of

_STATED = (
    "max_steps",
    "num_train_epochs",
    "train_batch_size",
    "best_metric",
    "eval_steps",
    "logging_steps",
    "global_step",
)
_HISTORY = re.compile(r'"log_history"\s*:\s*\[')
_FINAL = ("train_loss", "train_runtime", "total_flos", "train_samples_per_second", "train_steps_per_second")


class Reader:
    """A file that was cut off gives the objects that are whole."""

    name = "trainer-state"
    files = ("trainer_state.json", "checkpoint-*/trainer_state.json")

    def sniff(self, _path: Path, head: str) -> float:
        return 0.99 if _HISTORY.search(head) and head.lstrip()[:1] == "{" else 0.0

    def read(self, path: Path) -> RunLog:
        data = path.read_bytes()
        text = data.decode(encoding_of(data[:4]), errors="replace")
        found = _HISTORY.search(text)
        if found is None:
            raise BadInput(f"{path}: expected a trainer state with a log_history, found none")
        log = LogBuilder(path, self.name)
        end = found.end()
        for line, row, after in _objects(text, found.end(), log):
            _add(log, line, row)
            end = after
        _state(log, text, found.start(), end)
        return log.finish(text.count("\n") + 1)


def _objects(text: str, at: int, log: LogBuilder) -> Iterator[tuple[int, dict[str, Any], int]]:
    """(line, object, where it ends) of the list that begins at `at`."""
    decoder, line, counted = json.JSONDecoder(), text.count("\n", 0, at) + 1, at
    gap = re.compile(r"[\s,]*")
    while True:
        at = gap.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] != "{":
            return
        try:
            row, end = decoder.raw_decode(text, at)
        except ValueError:
            log.notes.append("the file is cut off within log_history")
            return
        line, counted = line + text.count("\n", counted, at), at
        yield line, row, end
        at = end


def _add(log: LogBuilder, line: int, row: dict[str, Any]) -> None:
    step = as_number(row.pop("step", None))
    step = (log.last_step or 0.0) if step is None else step
    if "train_runtime" in row:
        log.event("done", line, f"train_runtime {row['train_runtime']}", step)
        for key in _FINAL:
            if key in row:
                log.fact(key, row.pop(key), line)
    for key, value in row.items():
        if (number := as_number(value)) is not None:
            log.add(key, step, number, line)


def _state(log: LogBuilder, text: str, before: int, after: int) -> None:
    """What stands around the history."""
    for part, offset in ((text[:before], 0), (text[after:], after)):
        for key in _STATED:
            if found := re.search(rf'"{key}"\s*:\s*([-\d.eE+]+)', part):
                log.fact(key, found[1], text.count("\n", 0, offset + found.start()) + 1)
