"""Logs with odd values, seeded: each is read, or told in one line; never another exception, and always valid JSON."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from rqvae.errors import BadInput
from rqvae.health.examine import examine
from rqvae.health.readers import read_log, readers
from rqvae.health.report_html import as_html
from rqvae.health.report_json import as_json
from rqvae.health.report_markdown import as_markdown
from tests.health_logs import WRITERS, healthy, trainer_state
from tests.health_sources import LOG

ODD = (
    "null", "NaN", "nan", "Infinity", "inf", "-inf", "1e999", "-1", "0", "", " ", "x", '"x"', '"nan"', "[]", "{}",
    '{"mean": "x"}', '{"mean": [1], "num": 1}', "true", "1_000", "1,5", "1.2.3", ".", "-", "+", "e5", "1e5", "::", ":1",
    "1:", "?", "9" * 25, "9" * 400, "0x1f", "\x00", "\x1b[31m", "\r", "é", "%", "|", "12k", "k",
)  # fmt: skip
_TOKEN = re.compile(r"[-+]?\d[\d.,:e+-]*|\"[^\"]*\"|null|true|[|\[\]{}<>:,=]")


def odd_value(text: str, rng: random.Random) -> str:
    """One number, word or sign replaced."""
    found = list(_TOKEN.finditer(text))
    one = rng.choice(found)
    return text[: one.start()] + rng.choice(ODD) + text[one.end() :]


def cut(text: str, rng: random.Random) -> str:
    """Some characters lost."""
    at = rng.randrange(len(text))
    return text[:at] + text[at + rng.randrange(1, 40) :]


def doubled(text: str, rng: random.Random) -> str:
    """Some characters written twice, somewhere else."""
    at, to = rng.randrange(len(text)), rng.randrange(len(text))
    return text[:to] + text[at : at + 60] + text[to:]


def spread(text: str, rng: random.Random) -> str:
    """The same odd value in place of one metric's number in many lines."""
    key, value = rng.choice(re.findall(r"[A-Za-z_/]{3,}\"?[:=]? ?", text)), rng.choice(ODD)
    return re.sub(re.escape(key) + r"[-\d.e+]+", lambda _: key + value, text)


MUTATIONS: tuple[Callable[[str, random.Random], str], ...] = (odd_value, odd_value, odd_value, cut, doubled, spread)


def writers() -> dict[str, tuple[str, Callable[[Path], None]]]:
    """Name of the file and what writes a good one, by format; two more with all that a log may hold."""
    curve = healthy(24)

    def rich_state(path: Path) -> None:
        trainer_state(path, curve, [(600.0, 0.5), (1200.0, 0.4), (1800.0, 0.6)])

    def scores(path: Path) -> None:
        rows = [
            {"results": {"fid50k_full": 9.0 - i}, "metric": "fid50k_full", "snapshot_pkl": f"a-{i:06d}.pkl"}
            for i in range(6)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    named: dict[str, tuple[str, Callable[[Path], None]]] = {
        form: (name, lambda path, write=write: write(path, curve))  # type: ignore[misc]
        for form, (name, _, write) in WRITERS.items()
    }
    named["trainer-state"] = ("trainer_state.json", rich_state)
    named["stats-jsonl of scores"] = ("metric-fid50k_full.jsonl", scores)
    named["dm with blocks"] = ("log_001.txt", lambda path: path.write_text(LOG[:2500] + LOG[-300:]) and None)
    return named


def holds(path: Path, whole: bool = True) -> str:
    """What became of a log: "read", or the line that told it."""
    try:
        examination = examine(read_log(path))
    except BadInput as told:
        return str(told)
    json.loads(json.dumps(as_json(examination), allow_nan=False))
    assert as_markdown(examination)
    if whole:
        assert as_html(examination)
    return "read"


def assert_read_or_told(path: Path, whole: bool = False) -> bool:
    """Whether a log was read; if not, it was told in one line that names the file."""
    outcome = holds(path, whole)
    assert outcome == "read" or (path.name in outcome and "\n" not in outcome), outcome
    return outcome == "read"


@pytest.mark.parametrize("form", writers())
def test_odd_values_are_read_or_told(tmp_path: Path, form: str) -> None:
    name, write = writers()[form]
    write(tmp_path / name)
    text, rng, read = (tmp_path / name).read_text(), random.Random(form), 0
    assert holds(tmp_path / name) == "read"
    for number in range(26):
        mutated = MUTATIONS[number % len(MUTATIONS)](text, rng)
        (tmp_path / name).write_text(mutated)
        try:
            read += assert_read_or_told(tmp_path / name, whole=number % 4 == 0)
        except Exception as error:
            error.add_note(f"mutation {number} of {form}")
            raise
    assert read >= 13  # one odd value does not make a log unreadable


def events(values: list[float]) -> bytes:
    """TensorBoard records of one scalar: length, its sum, Event{1: time, 2: step, 5: Summary}, its sum."""
    whole = b""
    for step, value in enumerate(values):
        scalar = b"\x0a\x04loss" + b"\x15" + struct.pack("<f", value)
        summary = b"\x0a" + bytes([len(scalar)]) + scalar
        event = (
            b"\x09"
            + struct.pack("<d", 1e9 + step)
            + b"\x10"
            + bytes([step])
            + b"\x2a"
            + bytes([len(summary)])
            + summary
        )
        whole += struct.pack("<Q", len(event)) + b"crc1" + event + b"crc2"
    return whole


def test_damaged_records_are_read_or_told(tmp_path: Path) -> None:
    path, rng = tmp_path / "events.out.tfevents.1.host", random.Random(1)
    good = events(healthy(24)[1].tolist())
    path.write_bytes(good)
    assert read_log(path).points("loss") == 24
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bytes(bad[: rng.randrange(1, len(bad))] if rng.random() < 0.3 else bad))
        assert_read_or_told(path)


def test_every_reader_is_among_them() -> None:
    assert {reader.name for reader in readers()} <= {*writers(), "tensorboard"}


@pytest.mark.parametrize(
    ("form", "old", "new"),
    [
        ("trainer-state", '"step": 700', '"step": null'),
        ("trainer-state", '"step": 700', '"step": {}'),
        ("stats-jsonl", '"mean": ', '"mean": "x", "was": '),
        ("stats-jsonl of scores", "a-000003.pkl", "a-x.pkl"),
        ("lucidrains", "[00:39<", "[00:<"),
        ("lucidrains", "| 199/2400", "| ./2400"),
        ("dit", "Train Steps/Sec: 1.66", "Train Steps/Sec: 1.6.6"),
        ("guided-json", '"samples": 8', '"samples": ' + "9" * 400),
        ("dm with blocks", "Std: 1.74", "Std: 1.7loss"),
    ],
)
def test_one_odd_value_leaves_the_rest_of_a_log(tmp_path: Path, form: str, old: str, new: str) -> None:
    name, write = writers()[form]
    write(tmp_path / name)
    text = (tmp_path / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new))
    assert holds(tmp_path / name) == "read"


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
def test_json_has_no_infinity(tmp_path: Path, value: str) -> None:
    """Also where all of a loss, or its steps, are infinite."""
    (tmp_path / "a.csv").write_text("epoch,step,train_loss\n" + "".join(f"0,{i},{value}\n" for i in range(40)))
    (tmp_path / "b.csv").write_text("epoch,step,train_loss\n" + "".join(f"0,{value},{0.5 * i}\n" for i in range(40)))
    for name in ("a.csv", "b.csv"):
        assert_read_or_told(tmp_path / name)
