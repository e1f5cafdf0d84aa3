"""What processes that may be on several hosts agree on before they train: since when, and that they share a folder."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from rqvae.backends import Backend, launched_at
from rqvae.errors import BadInput
from rqvae.trainers.parts import on_main

_CACHED = 20.0
"""Seconds after which a network file system shows what another host has written; NFS keeps names for a few."""
_NEVER = 2.0**33
"""Seconds since 1970: in the year 2242."""


def job_start(backend: Backend) -> float | None:
    """When the job's first launcher started, in seconds since 1970; None without a launcher. Every rank calls it.

    Of all hosts the earliest: one that was lost and came back has a launcher younger than the job.
    """
    own = launched_at() or _NEVER
    earliest = -float(backend.all_reduce(torch.tensor([-own], dtype=torch.float64), "max"))
    return earliest if earliest < _NEVER else None


def made_since(runs: Sequence[Path], seconds: float) -> list[Path]:
    """Those run folders, named RUN_NAME_TIME, that are not older than `seconds` since 1970."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(seconds))
    return [run for run in runs if run.name.rpartition("_")[2] >= stamp]


def check_shared(backend: Backend, folder: Path) -> None:
    """Raise BadInput, on every rank, where a rank does not see what rank 0 writes into a run's folder."""
    if backend.world_size == 1:
        return
    file, words = folder / ".shared", backend.broadcast(uuid.uuid4().hex)
    on_main(backend, lambda: file.write_text(words))
    blind = int(backend.all_reduce(torch.tensor([0.0 if _reads(file, words) else float(backend.rank)]), "max"))
    if backend.rank == 0:
        file.unlink()
    if blind:
        raise BadInput(f"SAVE_DIR: expected a folder that all hosts share, rank {blind} does not see rank 0's {folder}")


def _reads(file: Path, words: str) -> bool:
    end = time.monotonic() + _CACHED
    while not (file.exists() and file.read_text() == words):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
