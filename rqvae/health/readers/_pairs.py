"""What text formats share: `key: value` pairs, clocks and what a log states before its first step."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from functools import lru_cache

from rqvae.health.log import LogBuilder

NUMBER = r"[-+]?(?:nan|inf(?:inity)?|(?:\d[\d_]*\.?\d*|\.\d+)(?:e[-+]?\d+)?)"
PAIR = re.compile(rf"([A-Za-z][\w /.%()-]*?)\s*[:=]\s*({NUMBER})(?![\w.:/])", re.IGNORECASE)
_CLOCK = re.compile(r"^\W{0,2}(\d{4})[-/](\d\d)[-/](\d\d)[ T](\d\d):(\d\d):(\d\d)")
_STATED = (
    (re.compile(r"([\w -]*?[Pp]arameters)\b(?: \(\w+\))?\s*[:=]\s*([\d,.]+ ?[KMB]?)"), None),
    (re.compile(r"([Dd]ataset) contains ([\d,]+)"), "dataset images"),
    (re.compile(r"([Ll]oaded model .*?) with (\d+) parameters"), "parameters"),
    (re.compile(r"(Training for) ([\d,]+) epochs"), "epochs"),
    (re.compile(r"(global batch size)\s*[:=]?\s*(\d+)"), None),
    (re.compile(r"()(\d+) global batch size"), "global batch size"),
    (re.compile(r"(Batch size) (\d+) per gpu"), "batch size per gpu"),
    (re.compile(r"(Optimizer): (\w+)"), None),
    (re.compile(r"(Experiment directory) created at (\S+)"), None),
    (re.compile(r"\b([Ll]oad|[Rr]esum|[Ff]ine-?tun)\w* (.*(?:\.pt|\.ckpt|\.safetensors|checkpoint).*)"), "starts from"),
)  # fmt: skip
_NAMESPACE = re.compile(r"Namespace\((.*)\)")
_ARGUMENT = re.compile(r"(\w+)=('[^']*'|\"[^\"]*\"|\[[^\]]*\]|\([^)]*\)|[^,]+)")
_ERROR = re.compile(r"^(?:Traceback \(most recent call last\)|\w*(?:Error|Exception)\b: |Killed$|.*CUDA out of memory)")
_WARNING = re.compile(r"^(?P<path>\S+?):\d+: (?P<kind>\w*Warning): ")


@lru_cache(maxsize=512)
def _midnight(year: str, month: str, day: str) -> float:
    return datetime(int(year), int(month), int(day), tzinfo=timezone.utc).timestamp()


def clock(text: str) -> float | None:
    """Seconds of a time stamp at the start of a line, read as UTC; None where there is none."""
    found = _CLOCK.match(text)
    if found is None:
        return None
    year, month, day, *time = found.groups()
    hour, minute, second = map(int, time)
    try:
        return _midnight(year, month, day) + 3600 * hour + 60 * minute + second
    except ValueError:
        return None


def pairs(text: str) -> dict[str, float]:
    """All `key: number` and `key=number` of a line."""
    return {key.strip(): float(value.replace("_", "")) for key, value in PAIR.findall(text)}


def note_line(log: LogBuilder, line: int, text: str) -> None:
    """What a line without a point says: a warning, an error, a fact, or nothing."""
    if len(text) > 4000 or not text:
        return
    if "arning" in text and _WARNING.match(text.strip()):
        log.event("warning", line, text.strip())
    elif _ERROR.match(text):
        log.event("error", line, text.strip())
    elif len(log.facts) < 500:
        _note_facts(log, line, text)


def _note_facts(log: LogBuilder, line: int, text: str) -> None:
    if found := _NAMESPACE.search(text):
        for key, value in _ARGUMENT.findall(found[1]):
            log.fact(key, value.strip("'\""), line)
        return
    for pattern, key in _STATED:
        if found := pattern.search(text):
            log.fact(key or found[1], found[2], line)
    if "Optimizer" in text or text.count("=") > 1:
        for key, value in re.findall(r"\b([a-z]\w*)=([^\s,;)]+)", text):
            log.fact(key, value, line)
    elif found := re.search(r"(Use [\w ]+|Using [\w ]+): (True|False|\w+)$", text):
        log.fact(found[1], found[2], line)
