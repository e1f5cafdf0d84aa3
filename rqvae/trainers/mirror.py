"""A run's folder sent to its URL while it trains: files as they change, checkpoints with COMPLETE last.

A run at a URL trains in its copy on this machine (`rqvae/remote.py`). On several hosts that share no file system each
has a copy of its own: rank 0's is the run's, and of split weights each rank sends the part that it wrote.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rqvae import remote
from rqvae.backends import Backend
from rqvae.errors import BadInput, RunFailed
from rqvae.files import file_sha256
from rqvae.trainers import checkpoint
from rqvae.trainers.fetching import GROUPS, UNSENT

log = logging.getLogger(__name__)
Outdated = Callable[[Collection[str], Collection[str]], list[str]]
_NOT_SENT = (*GROUPS, "wandb")  # W&B has its own way of sending


class Mirror:
    """One rank's sending. Rank 0 sends the run; the others only their shards.

    Args:
        folder: of the run, the copy of a URL.
        every: seconds between two looks at files that changed.
    """

    def __init__(self, folder: Path, every: float = 30.0) -> None:
        url = remote.url_of(folder)
        assert url is not None, "only a copy is sent"
        self._folder, self._every, self._store = folder, every, remote.Store(url)
        self._sent: dict[str, tuple[int, int]] = {}
        self._by_others: set[str] = set()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_sending, name="mirror", daemon=True)

    def start(self) -> None:
        """Send what the URL does not have yet, and go on doing so.

        Raises:
            BadInput: the store cannot be reached.
            RunFailed: or written.
        """
        (self._folder / UNSENT).touch()
        self.send()
        self._thread.start()

    def send(self, outdated: Outdated | None = None) -> None:
        """Send files that changed and groups that are complete here, then remove checkpoints that need not stay.

        Files come first: where a checkpoint's COMPLETE is, the rows up to its step are.

        Args:
            outdated: of all names of checkpoints at the URL, and of the complete ones, those to remove.

        Raises:
            RunFailed: something could not be sent; it stays here, and the same command sends it.
        """
        with self._lock:
            try:
                self._send_small()
                sizes = self._store.sizes()
                for folder in self._complete_here():
                    self._send_group(folder, sizes)
                if outdated:
                    self._remove(outdated)
            except BadInput as error:
                raise RunFailed(str(error)) from error

    def send_checkpoint(self, folder: Path) -> None:
        """Send this one alone, where the URL does not have it."""
        with self._lock:
            self._send_group(folder, self._store.sizes(self._name(folder)))

    def finish(self) -> None:
        """Send the last of it, and end."""
        self._stop()
        self.send()
        (self._folder / UNSENT).unlink(missing_ok=True)

    def settle(self) -> None:
        """Send what can be sent where another error is on its way: this one's own is only logged."""
        self._stop()
        try:
            self.send()
        except RunFailed as error:
            log.error("%s", error)

    def forget(self, folder: Path) -> None:
        """Take COMPLETE away from a checkpoint that is to be written anew."""
        self._store.remove([f"{self._name(folder)}/COMPLETE"])

    def send_shards(self, backend: Backend, folder: Path) -> dict[str, dict[str, Any]]:
        """Send the files of split tensors that this rank wrote; collective.

        Returns:
            On every rank the size and sha256 of all ranks' files, by name in the checkpoint, as COMPLETE lists them.

        Raises:
            RunFailed: on every rank, where one could not send.
        """
        shards = folder / checkpoint.SHARDS
        own = sorted(shards.glob(f"__{backend.rank}_*")) + ([shards / ".metadata"] if backend.rank == 0 else [])
        listed: dict[str, dict[str, Any]] = {}
        error = ""
        try:
            for file in own:
                name = str(file.relative_to(folder))
                self._store.send(file, f"{self._name(folder)}/{name}")
                listed[name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
            self._drop_older_parts(folder)
        except (OSError, RunFailed) as problem:
            error = f"rank {backend.rank}: {problem}"
        told = _gathered(backend, {"error": error, "listed": listed})
        if failed := [part["error"] for part in told if part["error"]]:
            raise RunFailed(f"{failed[0]}; earlier checkpoints are untouched")
        everything = {name: entry for part in told for name, entry in part["listed"].items()}
        self._by_others |= {f"{self._name(folder)}/{name}" for name in everything}
        return everything

    def _drop_older_parts(self, folder: Path) -> None:
        """Where rank 0 is on another host nobody else prunes: older folders that hold shards and nothing else."""
        for older in folder.parent.glob("step_*"):
            if older < folder and [path.name for path in older.iterdir()] == [checkpoint.SHARDS]:
                shutil.rmtree(older, ignore_errors=True)

    def _stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _keep_sending(self) -> None:
        while not self._over.wait(self._every):
            try:
                with self._lock:
                    self._send_small()
            except (BadInput, RunFailed, OSError) as error:
                log.warning("%s; it is tried again in %g s", error, self._every)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._folder))

    def _small_files(self) -> Iterator[Path]:
        for path in self._folder.iterdir():
            if path.name.startswith(".") or path.name in _NOT_SENT:
                continue
            yield from (file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())

    def _send_small(self) -> None:
        changed = {}
        for file in self._small_files():
            stat = file.stat()
            mark = (stat.st_size, stat.st_mtime_ns)
            if self._sent.get(self._name(file)) != mark and not file.name.startswith("."):
                changed[file] = mark

        def put(file: Path) -> None:
            # read at once: a client that sends in pieces would be at odds with a file that grows meanwhile
            self._store.write(self._name(file), file.read_bytes())
            self._sent[self._name(file)] = changed[file]

        remote.in_parallel(put, changed)

    def _complete_here(self) -> list[Path]:
        found = [folder for group in GROUPS for folder in (self._folder / group).glob("step_*")]
        return sorted(folder for folder in found if (folder / "COMPLETE").exists())

    def _send_group(self, folder: Path, sizes: Mapping[str, int]) -> None:
        """Send a folder, COMPLETE last; nothing where the URL has the same one."""
        name, content = self._name(folder), (folder / "COMPLETE").read_bytes()
        listed = {file: entry["size"] for file, entry in json.loads(content).items()}
        there = {file for file, size in listed.items() if sizes.get(f"{name}/{file}") == size}
        if f"{name}/COMPLETE" in sizes:
            if there == listed.keys() and self._store.read(f"{name}/COMPLETE") == content:
                return
            self.forget(folder)
        sent = {file for file in there if f"{name}/{file}" in self._by_others}
        missing = [file for file in listed if file not in sent and not (folder / file).exists()]
        if missing:
            log.warning("%s/%s: not sent: %s is neither here nor there", self._store.url, name, missing[0])
            return
        remote.in_parallel(
            lambda file: self._store.send(folder / file, f"{name}/{file}"), [f for f in listed if f not in sent]
        )
        self._store.write(f"{name}/COMPLETE", content)

    def _remove(self, outdated: Outdated) -> None:
        names = [name.removeprefix("checkpoints/") for name in self._store.sizes("checkpoints")]
        steps = {name.split("/")[0] for name in names if name.startswith("step_")}
        for step in outdated(steps, {step for step in steps if f"{step}/COMPLETE" in names}):
            # COMPLETE goes first, so that a removal cut short leaves no folder that looks whole
            self._store.remove([f"checkpoints/{step}/COMPLETE"])
            files = [name for name in names if name.startswith(f"{step}/") and name != f"{step}/COMPLETE"]
            remote.in_parallel(lambda file: self._store.remove([f"checkpoints/{file}"]), files)


def mirror_of(folder: Path) -> Mirror | None:
    """What sends the run's folder to its URL; None where it is a folder of this machine alone."""
    return Mirror(folder) if remote.url_of(folder) is not None else None


def _gathered(backend: Backend, value: dict[str, Any]) -> list[dict[str, Any]]:
    """Each rank's value, on every rank."""
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = int(backend.all_reduce(torch.tensor(float(len(own)), dtype=torch.float64), "max"))
    padded = torch.full((length,), ord(" "), dtype=torch.uint8)
    padded[: len(own)] = own
    return [json.loads(bytes(row.tolist())) for row in backend.all_gather(padded)]
