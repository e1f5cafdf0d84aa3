"""What the report on channels reads from a run: RUN/channels beside config, metrics and environment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rqvae.errors import BadInput
from rqvae.reports.run_files import RunFiles, read_mapping

COLUMNS = 200
"""Points in time at which statistics are kept for a drawing; of more snapshots every so manieth is read."""
KEPT = ("std", "gamma", "beta")
LATENT = "latent"


@dataclass(frozen=True)
class LayerColumns:
    """Where a layer's channels stand.

    Args:
        name: in the network.
        start: its first column.
        channels: how many there are.
    """

    name: str
    start: int
    channels: int

    def of(self, values: np.ndarray) -> np.ndarray:
        """The layer's part of an array whose last axis is channels."""
        return values[..., self.start : self.start + self.channels]


@dataclass(frozen=True)
class ChannelFiles:
    """What a run observed of its channels, and did about them.

    Args:
        run: its other files.
        layers: tracked, the latent last where there is one.
        names: of states, by number.
        dead: numbers of the states that count as dead.
        steps: (T,) of the snapshots.
        states: (T, N) int8.
        kept_steps: (K,) of the snapshots whose statistics are here.
        values: name out of `KEPT` -> (K, N) float16 without the latent, NaN where a layer has none.
        regions: rows of regions.json.
        acts: lines of interventions.jsonl.
        ablation: ablation.json; None where nobody made it.
    """

    run: RunFiles
    layers: tuple[LayerColumns, ...]
    names: tuple[str, ...]
    dead: frozenset[int]
    steps: np.ndarray
    states: np.ndarray
    kept_steps: np.ndarray
    values: Mapping[str, np.ndarray]
    regions: list[dict[str, Any]]
    acts: list[dict[str, Any]]
    ablation: dict[str, Any] | None

    @property
    def is_dead(self) -> np.ndarray:
        """(T, N) bool."""
        return np.isin(self.states, list(self.dead))

    @property
    def column_of(self) -> dict[tuple[str, int], int]:
        """Layer and channel -> column of `states`."""
        return {(layer.name, c): layer.start + c for layer in self.layers for c in range(layer.channels)}


def read_channels(run: RunFiles) -> ChannelFiles | None:
    """Read RUN/channels; None for a run that was not tracked.

    Raises:
        BadInput: a file of it that is missing or cannot be read, by name.
    """
    folder = run.folder / "channels"
    files = sorted(folder.glob("steps_*.npz"))
    if not files:
        if run.config.get("tracking.enabled"):
            raise BadInput(f"{folder}: expected snapshots steps_FIRST_LAST.npz, found none")
        return None
    about = read_mapping(folder / "layers.json")
    layers = _layers(about["layers"])
    steps, states, kept_steps, values = _read_shards(files, about["fields"])
    channels = layers[-1].start + layers[-1].channels
    if states.shape[1] > channels:
        layers.append(LayerColumns(LATENT, channels, states.shape[1] - channels))
    ablation = folder / "ablation.json"
    return ChannelFiles(
        run,
        tuple(layers),
        tuple(about["states"]),
        frozenset(about["states"].index(name) for name in about["dead"]),
        steps,
        states,
        kept_steps,
        values,
        read_mapping(folder / "regions.json")["regions"],
        _lines(folder / "interventions.jsonl"),
        read_mapping(ablation) if ablation.exists() else None,
    )


def _layers(rows: Sequence[Mapping[str, Any]]) -> list[LayerColumns]:
    found: list[LayerColumns] = []
    for row in rows:
        start = found[-1].start + found[-1].channels if found else 0
        found.append(LayerColumns(row["name"], start, row["channels"]))
    return found


def _read_shards(
    files: Sequence[Path], fields: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Steps, states, the steps that are kept, and their statistics; a step that is in two files is read once."""
    spans = [tuple(int(part) for part in path.stem.split("_")[1:]) for path in files]
    order = sorted(range(len(files)), key=lambda k: (spans[k][0], -spans[k][1]))
    chosen = [fields.index(name) for name in KEPT]
    steps: list[int] = []
    states: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for k in order:
        with _open(files[k]) as shard:
            new = [i for i, step in enumerate(shard["step"].tolist()) if not steps or step > steps[-1]]
            steps += shard["step"][new].tolist()
            states += list(shard["states"][new])
            values += list(shard["values"][new][:, chosen])
    width = max(len(row) for row in states)  # a posterior may be seen later than the layers
    padded = np.stack([np.pad(row, (0, width - len(row))) for row in states])
    kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), COLUMNS)).round().astype(int))
    table = np.stack([values[k] for k in kept], 1)
    at = np.array(steps)
    return at, padded, at[kept], dict(zip(KEPT, table, strict=True))


def _open(path: Path) -> Any:
    try:
        return np.load(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: expected a shard of channel statistics, got an error at: {error}") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON; a last one that is still being written is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
