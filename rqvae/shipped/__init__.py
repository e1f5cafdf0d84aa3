"""Models that come with the package: one folder a name, as `python -m rqvae export RUN FOLDER` writes it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent


def names() -> list[str]:
    """The names that `rqvae.load` knows without a path."""
    return sorted(file.parent.name for file in ROOT.glob("*/config.json"))


def folder(name: str) -> Path:
    """The folder of one of `names()`."""
    return ROOT / name
