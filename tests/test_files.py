"""Files are whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rqvae.errors import BadInput
from rqvae.files import file_sha256, read_json, replacing, write_json, write_whole
from rqvae.weight_files import write_tensors


def test_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_json(path, {"psnr": 1.0})
    with pytest.raises(FileNotFoundError), replacing(path) as temporary:
        Path(f"{temporary.write_text('half')}/no/folder").read_text()
    assert read_json(path) == {"psnr": 1.0}
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]
    write_whole(path, b"{}")
    assert read_json(path) == {}


def test_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    write_whole(tmp_path / "a", content)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("content", "got"),
    [(None, "No such file"), ("{", "Expecting property name"), ("[1]", "got list"), (b"\xff", "codec can't decode")],
)
def test_what_is_no_json_object_is_told(content: str | bytes | None, got: str, tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    if content is not None:
        write_whole(path, content)
    with pytest.raises(BadInput, match=f"^{re.escape(str(path))}: expected a JSON .*{got}.*; remove it$"):
        read_json(path, "remove it")


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    """RFC 8259, section 6: NaN and infinity are no JSON; jq, JavaScript and Go refuse a file that has them."""
    path = tmp_path / "scores.json"
    value = {"psnr": math.nan, "rows": [1.5, (np.float64("inf"), "NaN")], "more": {"kl": -math.inf, "n": 3, "x": None}}
    write_json(path, value)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"psnr": None, "rows": [1.5, [None, "NaN"]], "more": {"kl": None, "n": 3, "x": None}}


def test_tensors_are_readable_like_any_other_new_file(tmp_path: Path) -> None:
    """Anew and in the place of one; by group and others as the umask says."""
    before = os.umask(0o027)
    try:
        other, weights = tmp_path / "other", tmp_path / "weights.safetensors"
        other.touch()
        for value in (1.0, 2.0):
            write_tensors({"x": torch.full((2,), value)}, weights, {"format": "pt"})
            assert weights.stat().st_mode == other.stat().st_mode
            assert load_file(weights)["x"].tolist() == [value, value]
    finally:
        os.umask(before)


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    """The kernel's own: a file that may not grow beyond a page."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="weights") as caught:
            write_tensors({"x": torch.zeros(100_000)}, tmp_path / "weights.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
