"""What the programs of `eval` and `gpu_eval` share: their end, their device, and the file of their result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from rqvae.errors import BadInput
from rqvae.files import write_json


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are BadInput, one line without the usage."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(message)


def exit_code(run: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """What `run` returns, or 2 after bad input, which is said in one line on stderr."""
    try:
        return run(arguments)
    except BadInput as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2


def at_least_one(text: str) -> int:
    """The value of an option that counts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return int(text)


def device_named(name: str | None) -> torch.device:
    """A device; None is the accelerator, where there is one.

    Raises:
        BadInput: no such device here.
    """
    if name is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"--device: expected a device of this machine, got {name} ({reason})") from error
    return device


def prepare_files(**places: Path | None) -> None:
    """Make the folders of files that will be written, before hours of work.

    Args:
        places: each option and its file, or None.

    Raises:
        BadInput: one that cannot be written.
    """
    for option, path in places.items():
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            trial = path.with_name(f".{path.name}.trial")
            trial.touch()
            trial.unlink()
        except OSError as error:
            name = option.replace("_", "-")
            raise BadInput(f"--{name}: {path}: cannot be written ({error.strerror or error})") from error


def write_result(path: Path | None, result: Mapping[str, Any]) -> None:
    """The JSON of a result, if it is asked for."""
    if path is not None:
        write_json(path, dict(result))
