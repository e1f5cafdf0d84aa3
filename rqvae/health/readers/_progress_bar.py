"""Lines of tqdm: `loss: 0.1234:  50%|#####     | 1/2 [00:01<00:01,  1.32s/it]`, or with `loss=0.1234` at the end."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rqvae.health.log import LogBuilder
from rqvae.health.readers._pairs import pairs

_COUNT = r"\d+(?:\.\d+)?k?"
_BAR = re.compile(
    rf"^(?P<before>.*?)\s*\d+%\|[^|]*\|\s*(?P<n>{_COUNT})/(?P<total>{_COUNT}) \[(?P<clock>(?:\d+:)*\d+|\?)<[^,\]]*,?\s*"
    r"(?:(?P<rate>[\d.?]+)(?P<unit>it/s|s/it))?(?P<after>[^\]]*)"
)


def _seconds(clock: str) -> float | None:
    if "?" in clock:
        return None
    total = 0.0
    for part in clock.split(":"):
        total = 60 * total + float(part)
    return total


def _count(text: str) -> float:
    return float(text[:-1]) * 1000 if text.endswith("k") else float(text)


@dataclass
class ProgressBar:
    """Points of a training bar.

    lucidrains' loop sets the loss as description *before* it counts the step, so that a loss appears first beside the
    number of the step before; a bar that shows `loss=` behind the clock counts first. Every change is one point.

    Args:
        log: where points go.
    """

    log: LogBuilder
    _shown: tuple[float, dict[str, float]] | None = None
    _recorded: float = -1.0
    _repeats: bool | None = None
    total: float | None = None

    def line(self, number: int, text: str) -> bool:
        """Whether the text is a bar; a training bar's point is added."""
        found = _BAR.match(text) if "%|" in text else None
        if found is None:
            return False
        before, after = pairs(found["before"].rstrip(": ")), pairs(found["after"])
        n = _count(found["n"])
        values = {**before, **after}
        if not any("loss" in name.lower() for name in values) and not values:
            if "sampling" in found["before"].lower() and n == 0:
                self.log.event("sampling", number, text[:120])
            return True
        self._state_total(found["total"], number)
        if before:
            self._described(number, n, values)
        elif n > self._recorded and n > 0:
            self._add(number, n, values)
        self._clock(number, n, found)
        return True

    def _state_total(self, text: str, line: int) -> None:
        total = _count(text)
        if total != self.total:
            self.total = total
            self.log.fact("total steps", f"{total:g}", line)

    def _described(self, line: int, n: float, values: dict[str, float]) -> None:
        """A description: the loss of step n + 1 unless the bar shows again what it showed before it counted."""
        shown, self._shown = self._shown, (n, values)
        if shown is not None and shown[1] == values:
            if self._repeats is None:
                self._repeats = n == shown[0] + 1
            if n == shown[0] or self._repeats:
                return
        elif shown is not None and self._repeats is None and n == shown[0] + 1:
            self._repeats = False
        self._add(line, n + 1, values)

    def _add(self, line: int, step: float, values: dict[str, float]) -> None:
        self._recorded = step
        self.log.row(step, values, line)

    def _clock(self, line: int, n: float, found: re.Match[str]) -> None:
        seconds = _seconds(found["clock"])
        if seconds is not None and n > max(0.0, self.log.last_step_of("wall_time")):
            self.log.add("wall_time", n, seconds, line)
