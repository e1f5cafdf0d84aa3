"""Training from Python: what `python -m rqvae train` does, with exceptions in place of exit codes."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rqvae import backends
from rqvae.configuration import Configuration, read
from rqvae.errors import BadInput
from rqvae.trainers.assembly import TrainingJob, TrainRequest, check
from rqvae.trainers.fetching import fetched
from rqvae.trainers.run_folder import RunPlace, name_of_run

Overrides = Mapping[str, Any] | Sequence[str]


@dataclass(frozen=True)
class Run:
    """An experiment, ready to be trained.

    Args:
        configuration: its checked config.
        name: of the run: the first config's name, or that of the run folder it was read from.
        folder: the run folder it was read from; None for a config.
    """

    configuration: Configuration
    name: str
    folder: Path | None = None

    @classmethod
    def load(cls, path: str | Path | Sequence[str | Path], overrides: Overrides = ()) -> Run:
        """Read an experiment.

        Args:
            path: a config, several that are merged in order, or a run folder or its URL.
            overrides: changed keys, `{"train.steps": 20}`, or as on the command line, `["--train.steps", "20"]`.

        Raises:
            BadInput: one line that names file and key.
        """
        paths = [fetched(path)] if isinstance(path, str | Path) else [Path(p) for p in path]
        words = _as_options(overrides)
        if len(paths) == 1 and paths[0].is_dir():
            folder = paths[0]
            return cls(read([folder / "config.yaml"], words), name_of_run(folder), folder)
        return cls(read(paths, words), paths[0].stem if paths else "")

    @property
    def config(self) -> dict[str, Any]:
        """Every key with its value, as written to config.yaml."""
        return self.configuration.resolved

    @property
    def stage(self) -> int:
        """1 for an autoencoder, 2 for a generator."""
        return self.configuration.stage

    def fit(
        self,
        save_dir: str | Path | None = None,
        run_name: str | None = None,
        project: str | None = None,
        *,
        resume_ckpt: str | Path | None = None,
        resume_wandb_id: str | None = None,
        fresh: bool = False,
        online_eval: bool = True,
        device: str | None = None,
    ) -> Path:
        """Train in this process and return the run's folder, `save_dir/project/run_name_TIME`.

        As with the command, the same call again goes on with the newest unfinished run of an equal config, and a
        finished one is returned as it is. A run that was read from its folder goes on where it is.

        Args:
            save_dir: folder of all runs, or a URL as text; None is `runs`, or where the run was read from.
            run_name: None is the config's name.
            project: folder below save_dir; None is `rqvae`, or where the run was read from.
            resume_ckpt: run or checkpoint folder to start from, with its full state.
            resume_wandb_id: Weights & Biases id to go on with.
            fresh: never go on with an earlier run.
            online_eval: score while training.
            device: cpu, cuda or auto, as the command's --backend.

        Raises:
            BadInput: what the command ends with exit code 2 for.
            RunFailed: what the command ends with exit code 3 for.
            KeyboardInterrupt: interrupted, after a checkpoint.
        """
        place = self._place(save_dir, run_name, project)
        backend_name = backends.choose(device)
        if not backends.in_job():
            check(self.configuration.for_checks(), 1)
            place.check_writable()
        settings = self.config["train"]
        backend = backends.create(backend_name, precision=settings["precision"], threads=settings["threads"])
        request = TrainRequest(
            place, None if resume_ckpt is None else str(resume_ckpt), resume_wandb_id, fresh, online_eval, self.folder
        )
        try:
            job = TrainingJob(self.configuration.instantiate(), self.config, backend, request)
            code = job.execute()
        finally:
            backend.close()
        assert job.folder is not None, "execute chooses a folder or raises"
        if code == 128 + signal.SIGINT:
            raise KeyboardInterrupt(f"{job.folder}: interrupted after a checkpoint; the same call goes on")
        if code:
            raise SystemExit(code)
        return job.folder

    def _place(self, save_dir: str | Path | None, run_name: str | None, project: str | None) -> RunPlace:
        if self.folder is not None:
            parent = self.folder.resolve().parent
            save_dir, project = save_dir or parent.parent, project or parent.name
        return RunPlace.at(save_dir or "runs", project or "rqvae", run_name or self.name)


def _as_options(overrides: Overrides) -> list[str]:
    """Changed keys as the command line has them."""
    if isinstance(overrides, Mapping):
        flat = {str(key): yaml.safe_dump(value, default_flow_style=True).strip() for key, value in overrides.items()}
        return [f"--{key}={text.removesuffix('...').strip()}" for key, text in flat.items()]
    if isinstance(overrides, str):
        raise BadInput(f"overrides: expected a mapping of keys or a list of words, got the text {overrides!r}")
    return [str(word) for word in overrides]
