"""What the command line makes of mistakes, interrupts and defects: one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rqvae.callbacks.interfaces import Observer
from rqvae.commands import COMMANDS
from rqvae.commands import collect as a_command
from rqvae.errors import BadInput, RunFailed
from tests.conftest import finish, start


def test_help_lists_every_command(cli, capfd) -> None:
    assert cli("--help") == 0
    said = capfd.readouterr().out
    assert all(f"  {name} " in said and line in said for name, line in COMMANDS.items())
    assert cli() == 2, "no command is no success"


def test_unknown_command_names_the_known_ones(cli, capfd) -> None:
    assert cli("trian") == 2
    said = capfd.readouterr().err
    assert said.startswith("error: unknown command trian; expected one of train, ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (BadInput("x.yaml: a:\n expected b"), 2, "x.yaml: a: expected b"),
        (RunFailed("step 3: not finite"), 3, "step 3: not finite"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/somewhere/file"), 3, "/somewhere/file: the disk is full"),
        (OSError(errno.EIO, "Input/output error"), 3, "Input/output error"),
        (ZeroDivisionError("a defect of ours"), 3, "ZeroDivisionError: a defect of ours"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_become_a_line_and_a_code(
    error: BaseException, code: int, words: str, cli, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setattr(a_command, "run", fail)
    assert cli("collect") == code
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [lines[-1]]
    assert words in lines[-1]
    # a defect of ours is shown whole; what a user did wrong is not
    assert any(line.startswith("Traceback") for line in lines) == (words in ("Input/output error",) or "ours" in words)


class Misfortune(Observer):
    """After the first step, on one rank: its process is killed, or it finds bad input.

    Args:
        rank: which one.
        kind: killed or bad_input.
    """

    def __init__(self, rank: int, kind: str) -> None:
        self.rank, self.kind = rank, kind

    def after_step(self, run: Any, losses: object) -> None:
        if run.backend.rank != self.rank:
            return
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise BadInput("the sample: expected a picture, got a tune")


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("killed", 3, "error: rank 1 was killed by SIGKILL"),
        pytest.param("bad_input", 2, "error: the sample: expected a picture, got a tune", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_fails_is_told_once(kind: str, code: int, line: str, tmp_path: Path) -> None:
    observer = f'[{{"class_path": "{__name__}.Misfortune", "init_args": {{"rank": 1, "kind": "{kind}"}}}}]'
    process = start(
        "train", "configs/debug/stage2.yaml", "--save-dir", tmp_path, "--project", "p", "--world-size", 2,
        "--observers", observer, "--pictures.every", "null",
    )  # fmt: skip
    returned, errors = finish(process)
    assert returned == code, errors
    assert [row for row in errors.splitlines() if row.startswith("error: ")] == [line]
