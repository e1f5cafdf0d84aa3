"""Which run a command is about, and where that starts: the one it goes on with, or a new one."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rqvae import remote
from rqvae.backends import Backend
from rqvae.trainers import checkpoint
from rqvae.trainers.fetching import fetched, refresh
from rqvae.trainers.joint_start import made_since
from rqvae.trainers.mirror import Mirror
from rqvae.trainers.parts import on_main
from rqvae.trainers.run_folder import RunPlace, changed_keys, is_finished, read_config, same_config
from rqvae.trainers.state import TrainState


@dataclass(frozen=True)
class TrainRequest:
    """What the user asked for besides the config.

    Args:
        place: SAVE_DIR, PROJECT and RUN_NAME.
        resume_ckpt: run or checkpoint folder to start from, with its full state.
        resume_wandb_id: W&B id to go on with.
        fresh: never go on with an earlier run.
        online_eval: evaluate while training.
        folder: the very run to go on with; None is the newest that fits.
    """

    place: RunPlace
    resume_ckpt: str | None = None
    resume_wandb_id: str | None = None
    fresh: bool = False
    online_eval: bool = True
    folder: Path | None = None


@dataclass(frozen=True)
class Choice:
    """The run's folder and where it starts.

    Args:
        folder: of the run.
        load: checkpoint folder to load, or None to start at step 0.
        wandb_id: id of the run's earlier part.
        finished: nothing is left to do.
        words: what to tell the user.
        new: the folder is still to be made; rank 0's word, since other hosts may not see its disk.
    """

    folder: Path
    load: Path | None = None
    wandb_id: str | None = None
    finished: bool = False
    words: tuple[str, ...] = ()
    new: bool = False


def choose(request: TrainRequest, config: dict[str, Any], data: str, since: float | None = None) -> Choice:
    """The same command on the same data goes on; a run that is finished stays; else a new folder. Writes nothing.

    Args:
        request: the command.
        config: its resolved config.
        data: the train split's fingerprint.
        since: when this job began; with `fresh` it goes on with its own run after a restart, and with no other.
    """
    source = remote.absolute(request.resume_ckpt) if request.resume_ckpt else None
    if not request.fresh or since:
        earlier = [request.folder] if request.folder else request.place.earlier()
        for run in made_since(earlier, since) if request.fresh and since else earlier:
            environment = json.loads((run / "environment.json").read_text())
            same = same_config(run, config) and environment.get("data") == data
            if not same or environment.get("resumed_from") != source:
                continue
            refresh(run)
            if is_finished(run):
                return Choice(run, finished=True, words=(f"{_shown(run)} is finished; --fresh starts a new run",))
            load = TrainState.last_good(run)
            start = load or (checkpoint.find(fetched(source)) if source else None)
            at = f"from {load.name}" if load else "from its start: it has no checkpoint yet"
            wandb_id = request.resume_wandb_id or environment.get("wandb_id")
            return Choice(run, start, wandb_id, words=(f"going on with {_shown(run)}, {at}",))
    folder = request.place.new()
    if not source:
        return Choice(folder, wandb_id=request.resume_wandb_id, words=(f"new run {_shown(folder)}",), new=True)
    load = checkpoint.find(fetched(source))
    old = load.parent.parent / "config.yaml"
    rows = changed_keys(read_config(old.parent), config) if old.exists() else []
    words = (f"new run {_shown(folder)} from {_shown(load)}", *(f"changed: {row}" for row in rows))
    return Choice(folder, load, request.resume_wandb_id, words=words, new=True)


def _shown(folder: Path) -> str:
    """A folder as the user named it: by its URL where it is a copy."""
    return remote.url_of(folder) or str(folder)


def on_this_host(choice: Choice, backend: Backend) -> Choice:
    """Rank 0's choice with this host's own copies, where the folders are at URLs; every rank calls it."""
    own = [remote.url_of(place) if place else None for place in (choice.folder, choice.load)]
    folder, load = backend.broadcast(own)  # what rank 0's own paths are copies of
    if backend.world_size == 1 or not (folder or load):
        return choice
    if choice.load and load:
        run, chosen = choice.load.parent.parent, choice.load
        on_main(backend, lambda: Mirror(run).send_checkpoint(chosen))  # it may have been cut off before it could
    if backend.rank == 0:
        return choice
    return replace(
        choice,
        folder=remote.folder_of(folder) if folder else choice.folder,
        load=fetched(load) if load else choice.load,
    )
