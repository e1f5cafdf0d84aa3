"""Snapshots on disk: `steps_FIRST_LAST.npz` under RUN/channels, small ones put together as they become many.

Statistics are stored in fp16, states in int8. A snapshot is written when it is there, so that a kill loses none; what
is put together is written whole before its parts go, and a reader takes a step that it meets twice once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rqvae.callbacks.channels.classifier import DEAD, STATES, Region
from rqvae.callbacks.channels.layers import Layer
from rqvae.callbacks.channels.snapshot import Snapshot
from rqvae.callbacks.channels.statistics import ACTIVATION_SUMS, PARAMETERS
from rqvae.callbacks.channels.wiring import Wire
from rqvae.files import replacing, write_json

FIELDS = ("mean", "std", *ACTIVATION_SUMS[2:], *PARAMETERS)
"""Of `values` in a snapshot, in the order in which they are stored."""
LATENT_FIELDS = ("kl", "variance", "clamped")
SHARD = 64
_LARGEST = 65504.0
ACTS = "interventions.jsonl"


class Store:
    """The folder of one run's snapshots; rank 0 writes it.

    Args:
        folder: RUN/channels.
        layers: tracked.
    """

    def __init__(self, folder: Path, layers: Sequence[Layer]) -> None:
        self.folder, self._layers = folder, layers
        folder.mkdir(parents=True, exist_ok=True)

    def describe(self, wires: Mapping[str, Wire], settings: Mapping[str, Any]) -> None:
        """Write layers.json: what the columns of the snapshots are."""
        rows = [
            {
                "name": layer.name,
                "class": type(layer.module).__name__,
                "channels": layer.channels,
                "activation": wires[layer.name].activation_name if layer.name in wires else "",
            }
            for layer in self._layers
        ]
        named = {"fields": FIELDS, "latent_fields": LATENT_FIELDS, "states": STATES, "dead": DEAD}
        write_json(self.folder / "layers.json", {"layers": rows, **named, **settings})

    def trim(self, step: int) -> None:
        """Drop what comes after `step`: a run that goes on there does it again."""
        for path in self._files():
            with np.load(path) as shard:
                arrays = dict(shard)
            kept = arrays["step"] <= step
            if not kept.any():
                path.unlink()
            elif not kept.all():
                self._write({name: value[kept] for name, value in arrays.items()})
                path.unlink()
        acts = self.folder / ACTS
        if acts.exists():
            lines = [line for line in acts.read_text().splitlines() if json.loads(line)["step"] <= step]
            with replacing(acts) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines))

    def add(self, snapshot: Snapshot, states: np.ndarray) -> None:
        """Write a snapshot and the states (N,) that it led to; put shards together where there are many."""
        values = np.stack([snapshot.values[name].numpy() for name in FIELDS])
        arrays = {
            "step": np.array([snapshot.step]),
            "observations": np.array([snapshot.observations]),
            "counts": np.array([[snapshot.counts[layer.name] for layer in self._layers]]),
            "values": _half(values)[None],
            "states": states.astype(np.int8)[None],
        }
        if snapshot.latent is not None:
            rows = [getattr(snapshot.latent, name).numpy() for name in LATENT_FIELDS]
            arrays["latent"] = _half(np.stack(rows))[None]
            places = snapshot.latent.place_variance.numpy()
            arrays["active_places"] = np.array([float((places > 0.01).mean()) if places.size else np.nan])
        self._write(arrays)
        single = [path for path in self._files() if len(set(path.stem.split("_")[1:])) == 1]
        if len(single) >= SHARD:
            self._put_together(single)

    def write_regions(self, regions: Sequence[Region]) -> None:
        """Write regions.json."""
        write_json(self.folder / "regions.json", {"regions": [vars(region) for region in regions]})

    def note_act(self, row: Mapping[str, Any]) -> None:
        """Add a line to interventions.jsonl."""
        with (self.folder / ACTS).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("steps_*.npz"))

    def _write(self, arrays: Mapping[str, np.ndarray]) -> None:
        steps = arrays["step"]
        path = self.folder / f"steps_{steps[0]:09d}_{steps[-1]:09d}.npz"
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    def _put_together(self, paths: Sequence[Path]) -> None:
        loaded = []
        for path in paths:
            with np.load(path) as shard:
                loaded.append(dict(shard))
        same = [arrays for arrays in loaded if arrays.keys() == loaded[0].keys()]
        self._write({name: np.concatenate([arrays[name] for arrays in same]) for name in loaded[0]})
        for path, arrays in zip(paths, loaded, strict=True):
            if arrays.keys() == loaded[0].keys():
                path.unlink()


def _half(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -_LARGEST, _LARGEST).astype(np.float16)
