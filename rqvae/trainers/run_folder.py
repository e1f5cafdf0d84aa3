"""A run's folder: its name, its lock, and which earlier run the same command goes on with."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from rqvae import remote
from rqvae.errors import BadInput
from rqvae.files import write_json, write_whole
from rqvae.trainers.heartbeat import Heartbeat, RemoteHeartbeat

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# Keys that say where, with how many processes and how watched a run is computed, not what is computed. Other data under
# another path are told apart by their fingerprint, other Stage1 weights by their hash.
_PLACE_KEYS = {
    "data.workers",
    "data.dataset.init_args.root",
    "data.dataset.init_args.vae",
    "data.latents",
    "train.parallel",
    "train.threads",
    "train.stop_check_seconds",
    "train.peak_tflops",
    "checkpoint.asynchronous",
    "profile",
    "logging.progress",
    "pictures.vis_sampler",
    "pictures.frames",
    "lpips.trunk_weights",
    "online_eval.reference",
    "online_eval.extractor.init_args.weights",
    "online_eval.lpips_weights",
    "stage1_checkpoint",
}


def make_folder(folder: Path, what: str) -> None:
    """Make a folder and its parents; BadInput, with `what` it is for, where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{what} {folder}: expected a folder that can be made, got: {error.strerror}") from error


def check_can_write(folder: Path, what: str) -> None:
    """BadInput unless `folder`, or the nearest one above it that exists, can be written, and its URL. Makes nothing."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise BadInput(f"{what} {folder}: expected a folder that can be written, {nearest} is not")
    if url := remote.url_of(folder):
        remote.Store(url).check_writable(what)


@dataclass(frozen=True)
class RunPlace:
    """Where a run lives: `save_dir/project/run_name_TIME`. Of a URL `save_dir` is the copy (`rqvae/remote.py`)."""

    save_dir: Path
    project: str
    run_name: str

    @classmethod
    def at(cls, save_dir: str | Path, project: str, run_name: str) -> RunPlace:
        """The place that SAVE_DIR, a path or a URL, PROJECT and RUN_NAME are.

        Raises:
            BadInput: a URL that is none.
        """
        return cls(remote.place_of(save_dir), project, run_name)

    @property
    def parent(self) -> Path:
        """The project's folder."""
        return self.save_dir / self.project

    def check_writable(self) -> None:
        """Raise BadInput unless the folder can be made and written."""
        if ":/" in str(self.save_dir):
            raise BadInput(f"SAVE_DIR {self.save_dir}: expected a folder, or a URL as text: a Path takes a / from it")
        for name in (self.project, self.run_name):
            if not name or "/" in name:
                raise BadInput(f"PROJECT and RUN_NAME: expected names without /, got {name!r}")
        check_can_write(self.parent, "SAVE_DIR")

    def earlier(self) -> list[Path]:
        """Runs of this name, newest first; at a URL those that are there, whatever this machine has copies of."""
        url = remote.url_of(self.parent)
        named = self._at(url) if url else self.parent.glob(f"{glob.escape(self.run_name)}_*")
        found = [p for p in named if (p / "config.yaml").exists() and (p / "environment.json").exists()]
        return sorted((p for p in found if _is_time(p.name[len(self.run_name) + 1 :])), reverse=True)

    def _at(self, url: str) -> list[Path]:
        """Copies of the folders of this name at a URL, with the files by which the same run is told."""
        store = remote.Store(url)
        folders = [self.parent / name for name in store.folders() if name.startswith(f"{self.run_name}_")]
        for folder in folders:
            for name in ("config.yaml", "environment.json"):
                content = store.read(f"{folder.name}/{name}")
                if content is not None:
                    make_folder(folder, "RQVAE_CACHE")
                    write_whole(folder / name, content)
        return folders

    def new(self) -> Path:
        """A folder name that does not exist yet, with the present time."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = self.parent / f"{self.run_name}_{stamp}"
        return folder if not folder.exists() else self.parent / f"{self.run_name}_{stamp}-{os.getpid()}"


def name_of_run(folder: Path) -> str:
    """RUN_NAME of a run's folder, `RUN_NAME_TIME`."""
    name, _, time_of_start = folder.resolve().name.rpartition("_")
    if not _is_time(time_of_start):
        raise BadInput(f"{folder}: expected a run folder, named RUN_NAME_TIME")
    return name


def _is_time(text: str) -> bool:
    return len(text) >= 15 and text[:8].isdigit() and text[8] == "-" and text[9:15].isdigit()


def what_is_computed(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The resolved config without the keys that only say where, and with how many processes, it is computed."""
    return {
        key: what_is_computed(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in _PLACE_KEYS
    }


def same_config(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the run in `folder` computes what `config` computes."""
    return what_is_computed(read_config(folder)) == what_is_computed(_plain(config))


def read_config(folder: Path) -> dict[str, Any]:
    """A run's resolved config."""
    return yaml.safe_load((folder / "config.yaml").read_text())


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every key that differs."""
    rows = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            rows += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            rows.append(f"{prefix}{key}: {a} -> {b}")
    return rows


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The config as it reads after a round trip through YAML."""
    return yaml.safe_load(yaml.safe_dump(config))


def is_finished(folder: Path) -> bool:
    """Whether the run reached its last step."""
    return (folder / "FINISHED").exists()


def write_new(folder: Path, config: dict[str, Any], environment: dict[str, Any]) -> None:
    """Make a run's folder with its resolved config and environment."""
    make_folder(folder, "SAVE_DIR")
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(environment, indent=1))


def note_wandb_id(folder: Path, wandb_id: str | None) -> None:
    """Keep the W&B id, under which the same command goes on."""
    path = folder / "environment.json"
    environment = {**json.loads(path.read_text()), "wandb_id": wandb_id}
    write_json(path, environment)


def describe_environment(**more: Any) -> dict[str, Any]:
    """Versions, commit, machine and command line, and what `more` adds."""
    try:
        commit = subprocess.run(  # noqa: S603
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "commit": commit,
        "argv": sys.argv,
        "working_directory": os.getcwd(),  # what relative paths of the config are relative to
        **more,
    }


class RunLock:
    """A lock on the run's folder.

    The OS's, freed by any death of the process that holds it; a heartbeat where the file system has no locks. A run at
    a URL has a heartbeat there besides, for other machines.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: IO[str] | None = None
        self._heartbeats: list[Heartbeat] = []

    def acquire(self) -> None:
        """Raise BadInput when another process trains in this folder."""
        self._acquire_here()
        if url := remote.url_of(self.path.parent):
            try:
                self._beat(RemoteHeartbeat(url))
            except BaseException:
                self.release()
                raise

    def _beat(self, heartbeat: Heartbeat) -> None:
        heartbeat.acquire()
        self._heartbeats.append(heartbeat)

    def _acquire_here(self) -> None:
        file = self.path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in _NO_LOCKS:
                return self._beat(Heartbeat(self.path.parent))
            raise BadInput(
                f"{self.path.parent}: another run is training in this folder (it holds {self.path})"
            ) from None
        self._file = file
        return None

    @property
    def lost(self) -> bool:
        """Whether another process holds it by now; only a heartbeat can be lost."""
        return any(heartbeat.lost for heartbeat in self._heartbeats)

    def release(self) -> None:
        """Free the lock."""
        while self._heartbeats:
            self._heartbeats.pop().release()
        if self._file is not None:
            self._file.close()
            self._file = None
