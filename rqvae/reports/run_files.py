"""What a report reads from a run's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rqvae.errors import BadInput
from rqvae.reports.lineage import earlier_rows
from rqvae.reports.metrics_file import Metrics, read_metrics
from rqvae.reports.page import Cell


@dataclass(frozen=True)
class RunFiles:
    """A run as its folder tells it.

    Args:
        folder: of the run.
        config: resolved config.yaml, keys joined by dots.
        environment: environment.json (versions, commit, backend, parameters ...), keys joined by dots.
        metrics: metrics.jsonl, behind the rows of the runs that this one was started from.
        continues: names of those runs, oldest first.
    """

    folder: Path
    config: dict[str, Cell]
    environment: dict[str, Cell]
    metrics: Metrics
    continues: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the run is called, the folder's name unless the reader was given another."""
        return self.metrics.name

    def newest_pictures(self) -> dict[str, Path]:
        """The last picture of each kind in samples/, for example `samples` -> samples/samples_00001200.png."""
        found = {}
        for path in sorted((self.folder / "samples").glob("*.png")):
            named = re.fullmatch(r"(.+)_\d+", path.stem)
            found[named.group(1) if named else path.stem] = path
        return found


def read_run(folder: Path, name: str | None = None) -> RunFiles:
    """Read a run's folder.

    Args:
        folder: of the run.
        name: what to call it; None for the folder's name.

    Raises:
        BadInput: a folder of something else, or a file that is missing or cannot be read, by name.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: expected a run's folder, there is none")
    if not any((folder / file).exists() for file in ("config.yaml", "metrics.jsonl")):
        raise BadInput(f"{folder}: expected the folder of a training run (config.yaml, metrics.jsonl), {_is(folder)}")
    config = read_mapping(folder / "config.yaml")
    environment = read_mapping(folder / "environment.json")
    own = read_metrics(folder / "metrics.jsonl", name or folder.name)
    if not own.keys:
        raise BadInput(f"{folder / 'metrics.jsonl'}: expected rows with values such as train/loss_total, got none")
    earlier, continues = earlier_rows(environment, own.rows[0]["step"])
    metrics = Metrics(own.name, earlier + own.rows)
    return RunFiles(folder, flatten(config), flatten(environment), metrics, tuple(continues))


def _is(folder: Path) -> str:
    """What a folder that is no run seems to be."""
    if (folder / "COMPLETE").exists() or (folder / "meta.json").exists():
        return "this one is a checkpoint"
    if (folder / "stage1.json").exists():
        return "this one holds reconstructions"
    runs = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    if runs:
        return f"this one holds {len(runs)} of them, the last is {runs[-1]}"
    if any(folder.glob("*.png")):
        return "this one holds pictures"
    return "this one has none of these"


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping.

    Raises:
        BadInput: no such file, or another content.
    """
    if not path.is_file():
        raise BadInput(f"{path}: expected a file with a mapping, there is no such file")
    text = path.read_text(encoding="utf-8")
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        content = json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{path}: expected {kind}, got an error at: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Cell]:
    """Nested mappings as one, keys joined by dots; lists stay as they are."""
    flat: dict[str, Cell] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = None if isinstance(value, Mapping) else value
    return flat
