"""Runs at URLs, brought to this machine: the small files, and the newest checkpoint whose COMPLETE is true."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from rqvae import remote
from rqvae.errors import BadInput
from rqvae.trainers import checkpoint

log = logging.getLogger(__name__)
GROUPS = ("checkpoints", "ema_snapshots")
"""Folders of a run that hold folders with a COMPLETE each."""
UNSENT = ".unsent"
"""In a run's copy while it may hold what its URL does not: a run trains in it, or was cut off."""


def fetched(place: str | Path, snapshots: bool = False) -> Path:
    """A run, checkpoint or exported folder as a folder of this machine.

    Args:
        place: a path, which comes back as it is, or a URL.
        snapshots: bring a run's snapshots of its averages too.

    Raises:
        BadInput: nothing at the URL, or a store that cannot be reached.
    """
    if not remote.is_url(place):
        return Path(place)
    url = str(place).rstrip("/")
    folder, parent = remote.folder_of(url), url.rpartition("/")[0]
    if parent.endswith("/checkpoints"):
        run = remote.Store(parent.rpartition("/")[0])
        sizes = run.sizes()
        with _alone(run):
            _bring_small(run, sizes, ours=(remote.folder_of(run.url) / UNSENT).exists())
            if not _bring_group(run, sizes, f"checkpoints/{folder.name}"):
                raise BadInput(f"{url}: expected a complete checkpoint, found none (COMPLETE decides)")
        return folder
    store = remote.Store(url)
    sizes = store.sizes()
    if not sizes:
        raise BadInput(f"{url}: expected a run, checkpoint or exported folder, found nothing there")
    with _alone(store):
        bring(store, sizes)
        for group in _names(sizes, "ema_snapshots") if snapshots else ():
            _bring_group(store, sizes, f"ema_snapshots/{group}")
    return folder


def refresh(folder: Path) -> None:
    """Bring what the URL of a copy has, if anything; nothing for a folder of this machine alone."""
    url = remote.url_of(folder)
    if url is not None and (sizes := (store := remote.Store(url)).sizes()):
        with _alone(store):
            bring(store, sizes)


def bring(store: remote.Store, sizes: Mapping[str, int]) -> None:
    """Bring small files and the newest complete checkpoint; what of it is here already is not brought again.

    Where this machine was cut off before it could send all (`UNSENT`), and has a checkpoint as new as the newest one
    at the URL, its own small files stay.
    """
    folder = remote.folder_of(store.url)
    here = [path.name for path in checkpoint.in_run(folder)]
    for name in sorted({*here, *_names(sizes, "checkpoints")}, reverse=True):
        if _bring_group(store, sizes, f"checkpoints/{name}"):
            ours = name in here and (folder / UNSENT).exists()
            break
    else:
        ours = (folder / UNSENT).exists()
    _bring_small(store, sizes, ours)


def _names(sizes: Mapping[str, int], group: str) -> list[str]:
    return sorted({name.split("/")[1] for name in sizes if name.startswith(f"{group}/") and name.count("/") > 1})


def _bring_small(store: remote.Store, sizes: Mapping[str, int], ours: bool = False) -> None:
    """All files that are in no group; `ours`: only those that are not here."""
    folder = remote.folder_of(store.url)

    def get(name: str) -> None:
        file = folder / name
        # files at the top change in place (config, rows); those below are pictures and pages, and do not
        same = file.exists() and (ours or ("/" in name and file.stat().st_size == sizes[name]))
        if not same:
            store.fetch(name, file)

    remote.in_parallel(get, [name for name in sizes if name.split("/")[0] not in GROUPS and not name.startswith(".")])


def _bring_group(store: remote.Store, sizes: Mapping[str, int], name: str) -> bool:
    """Bring a folder that has a COMPLETE; False, with a warning that names it, where that is not there or not true."""
    folder = remote.folder_of(store.url) / name
    if checkpoint.is_undamaged(folder):
        return True
    content = store.read(f"{name}/COMPLETE")
    fault = "it has no COMPLETE" if content is None else _fault(content, sizes, name)
    if content is not None and not fault:
        shutil.rmtree(folder, ignore_errors=True)
        files = [file for file in json.loads(content)]
        remote.in_parallel(lambda file: store.fetch(f"{name}/{file}", folder / file), files)
        (folder / "COMPLETE").write_bytes(content)
        if checkpoint.is_undamaged(folder):
            return True
        shutil.rmtree(folder)
        fault = "a file is not what COMPLETE says"
    log.warning("%s/%s: %s; it is passed over", store.url, name, fault)
    return False


def _fault(content: bytes, sizes: Mapping[str, int], name: str) -> str:
    """What is wrong with a folder at a URL by its COMPLETE and its objects' sizes; nothing where all is right."""
    try:
        listed = {file: entry["size"] for file, entry in json.loads(content).items()}
    except (ValueError, AttributeError, KeyError, TypeError):
        return "its COMPLETE cannot be read"
    wrong = [file for file, size in listed.items() if sizes.get(f"{name}/{file}") != size or ".." in file.split("/")]
    return f"{wrong[0]} is not there, or has another size than COMPLETE says" if wrong else ""


@contextlib.contextmanager
def _alone(store: remote.Store) -> Iterator[None]:
    """One process or thread of this host at a time: all ranks ask for the same."""
    folder = remote.folder_of(store.url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".fetching").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise BadInput(f"RQVAE_CACHE {remote.copies()}: expected a disk to write on, got: {error.strerror}") from error
