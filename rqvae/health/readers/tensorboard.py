"""TensorBoard event files, read without TensorBoard: TFRecords of protobuf `Event` messages.

Formats: tensorflow/core/lib/io/record_writer.cc (length, its masked crc, data, its crc), core/util/event.proto:
Event{1: wall_time double, 2: step int64, 5: summary}, Summary{1: value},
Value{1: tag, 2: simple_value float, 8: tensor}, TensorProto{1: dtype, 4: tensor_content, 5: float_val, 6: double_val}.
The line of a point is the number of its record.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from rqvae.errors import BadInput
from rqvae.health.log import LogBuilder, RunLog

_LONGEST = 1 << 28


class Reader:
    """Scalars only; the head of each record is read, pictures and histograms are passed over."""

    name = "tensorboard"
    files = ("events.out.tfevents.*", "tensorboard/events.out.tfevents.*")

    def sniff(self, path: Path, head: str) -> float:
        if "tfevents" in path.name:
            return 0.99
        return 0.95 if "brain.Event:" in head[:64] else 0.0

    def read(self, path: Path) -> RunLog:
        log, count = LogBuilder(path, self.name), 0
        for count, data in enumerate(_records(path, log), 1):  # noqa: B007
            _event(log, count, data)
        if count == 0:
            raise BadInput(f"{path}: expected TensorBoard records, found none that is whole")
        return log.finish(count)


def _records(path: Path, log: LogBuilder) -> Iterator[bytes]:
    """The data of each whole record; a tail that was cut off, as a run leaves it that was killed, is noted."""
    with path.open("rb") as file:
        while header := file.read(12):
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else _LONGEST + 1
            data = file.read(length) if length <= _LONGEST else b""
            if len(data) < length or len(file.read(4)) < 4:
                log.notes.append("the last record is cut off")
                return
            yield data


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, raw value) of a protobuf message: an int for varints, bytes for all else."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        kind, number = key & 7, key >> 3
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            return
        yield number, data[at : at + size]
        at += size


def _event(log: LogBuilder, record: int, data: bytes) -> None:
    time, step, summaries = None, 0, []
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                time = struct.unpack("<d", value)[0]
            elif number == 2 and isinstance(value, int):
                step = value - (1 << 64) if value >> 63 else value
            elif number == 5 and isinstance(value, bytes):
                summaries.append(value)
        points = [point for summary in summaries for point in _scalars(summary)]
    except (IndexError, struct.error):
        log.notes.append(f"record {record} is damaged")
        return
    for tag, scalar in points:
        log.add(tag, float(step), scalar, record)
    if points and time is not None:
        log.add("wall_time", float(step), time, record)


def _scalars(summary: bytes) -> Iterator[tuple[str, float]]:
    for number, value in _fields(summary):
        if number != 1 or not isinstance(value, bytes):
            continue
        tag, scalar = "", None
        for inner, content in _fields(value):
            if inner == 1 and isinstance(content, bytes):
                tag = content.decode("utf-8", "replace")
            elif inner == 2 and isinstance(content, bytes):
                scalar = struct.unpack("<f", content)[0]
            elif inner == 8 and isinstance(content, bytes):
                scalar = _tensor(content)
        if tag and scalar is not None:
            yield tag, scalar


def _tensor(data: bytes) -> float | None:
    """The number of a tensor with one entry, float32 or float64."""
    forms = {1: "<f", 2: "<d"}
    kind = 0
    for number, value in _fields(data):
        if number == 1 and isinstance(value, int):
            kind = value
        elif number in (4, 5, 6) and isinstance(value, bytes) and kind in forms:
            form = forms[kind]
            return struct.unpack(form, value)[0] if len(value) == struct.calcsize(form) else None
    return None
