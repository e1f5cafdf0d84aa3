"""What the trainers of github.com/lucidrains print: a tqdm bar with the loss, `12: 0.0345` lines, or `G: | "
"D: | GP:`."""

from __future__ import annotations

import re
from pathlib import Path

from rqvae.health.log import LogBuilder, RunLog
from rqvae.health.readers._pairs import NUMBER, note_line
from rqvae.health.readers._progress_bar import ProgressBar
from rqvae.health.text import lines_of

_BAR = re.compile(r"(?:loss\b.{0,200}?\d+%\|[^|]*\|)|(?:\d+%\|[^|]*\|.{0,80}\bloss=)", re.IGNORECASE)
_PLAIN = re.compile(rf"^(\d+):\s+(?:loss:?\s*)?({NUMBER})\s*$", re.IGNORECASE)
_GAN = re.compile(rf"^(?:[A-Z]\w*:\s*(?:{NUMBER})?\s*\|\s*){{2,}}", re.IGNORECASE)
_PART = re.compile(rf"([A-Z]\w*):\s*({NUMBER})", re.IGNORECASE)


class Reader:
    """Losses of a GAN are named `G`, `D`, `GP` as they are printed; their step is the bar's, else the row."""

    name = "lucidrains"
    files = ("train.log", "nohup.out")

    def sniff(self, _path: Path, head: str) -> float:
        plain = len(re.findall(_PLAIN.pattern, head, re.MULTILINE | re.IGNORECASE))
        if _BAR.search(head) or plain >= 3:
            return 0.8
        return 0.8 if re.search(r"^G: .*\| D: ", head, re.MULTILINE) else 0.0

    def read(self, path: Path) -> RunLog:
        log, count = LogBuilder(path, self.name), 0
        bar = ProgressBar(log)
        for count, text in lines_of(path):  # noqa: B007
            if not text or bar.line(count, text):
                continue
            if found := _PLAIN.match(text):
                log.add("loss", float(found[1]), float(found[2]), count)
            elif " | " in text and _GAN.match(text):
                step = max(0.0, log.last_step_of("G") + 1)
                log.row(step, {key: float(value) for key, value in _PART.findall(text)}, count)
            elif text.strip() == "training complete":
                log.event("done", count, text)
            else:
                note_line(log, count, text)
        return log.finish(count)
