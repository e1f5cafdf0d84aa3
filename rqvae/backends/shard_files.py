"""Split tensors on disk, through torch.distributed.checkpoint: each process writes its own part, any number reads.

    FOLDER/__0_0.distcp  __1_0.distcp  ...  .metadata

Tensors are named `GROUP:NAME`, for example `model/stage1:decoder.conv_in.weight`.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from rqvae.errors import BadInput, RunFailed

INDEX = ".metadata"
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath"},
}
"""What an index is made of. A pickle may name any function to be called, and a checkpoint may come from anywhere."""


class _IndexReader(pickle.Unpickler):
    """Reads an index, and nothing that would run code."""

    def find_class(self, module: str, name: str) -> Any:
        names = _ALLOWED.get(module, set())
        if names is None or name in names:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write split and whole tensors; collective. A tensor that all ranks hold is written by one of them.

    Args:
        folder: made where it is not there; the same one, on one file system, for all ranks.
        tensors: by name, the same names on every rank.

    Raises:
        RunFailed: on every rank, where one could not write.
    """
    writer = checkpoint.FileSystemWriter(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch's writer, of its own storages
            checkpoint.save(dict(tensors), storage_writer=writer)
    except checkpoint.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise RunFailed(f"{folder}: rank {rank} cannot write: {reason}; earlier checkpoints are untouched") from error


def index(folder: Path) -> Metadata:
    """What is in a folder.

    Raises:
        BadInput: an index that cannot be read, or that holds anything but names, shapes and places of tensors.
    """
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            found = _IndexReader(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        reason = str(error) or "it is cut off"
        raise BadInput(f"{path}: expected the index of a sharded checkpoint, {reason}") from error
    if not isinstance(found, Metadata):
        raise BadInput(f"{path}: expected the index of a sharded checkpoint, got {type(found).__name__}")
    return found


def entries(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape of the whole tensor and type, by name."""
    stored = index(folder).state_dict_metadata
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_into(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors, of which split ones get this rank's part only. Not collective: each process reads what it needs.

    Args:
        folder: that `write` made, with any number of processes.
        targets: by name, with the whole's shape and the stored type.

    Raises:
        BadInput: a file that is missing or cut off.
    """
    stored, state = index(folder), dict(targets)
    reader, planner = checkpoint.FileSystemReader(folder), checkpoint.DefaultLoadPlanner()
    # the steps of `checkpoint.load`, whose own form for a single process warns, and waits for others in torch 2.7
    planner.set_up_planner(state, stored, is_coordinator=True)
    reader.set_up_storage_reader(stored, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
    try:
        reader.read_data(planner.finish_plan(plan), planner).wait()
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise BadInput(f"{folder}: expected a whole sharded checkpoint, {str(error).splitlines()[0]}") from error
