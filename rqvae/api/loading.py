"""`rqvae.load`: from a run, a checkpoint, an exported folder, a shipped name or a hub id to a `Pipeline`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rqvae import remote
from rqvae.api import exported, sources
from rqvae.api.pipeline import Pipeline
from rqvae.configuration import read
from rqvae.errors import BadInput
from rqvae.files import read_json
from rqvae.img_datasets.interfaces import DataSpec
from rqvae.randomness import kept
from rqvae.run import Stage1Run
from rqvae.trainers import checkpoint
from rqvae.trainers.evaluation_trainer import load_evaluated
from rqvae.trainers.fetching import fetched
from rqvae.trainers.run_folder import read_config
from rqvae.trainers.stage2_trainer import load_two_stage

DIFFUSERS_WRAPPERS = "rqvae.models.stage1.diffusers_vae."


def load(
    source: str | Path,
    *,
    weights: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    trust_code: bool = False,
) -> Pipeline:
    """A trained model, by default with the weights that are evaluated (EMA).

    Args:
        source: a run folder of either stage, a checkpoint folder inside one, a folder that was exported (also of
            diffusers: `AutoencoderKL`, `AutoencoderDC`, `AutoencoderTiny`), the URL of any of these (`s3://...`), a
            shipped name, or a hub id `owner/name`.
        weights: of a run: `model` for the trained weights themselves, or the name of an average such as `ema_0.9999`.
        revision: of a hub id: branch, tag or commit.
        device: cpu, cuda or auto, as the commands' --backend; None stays on the host.
        trust_code: of a hub id: import what its config names from other packages than this one. Folders on this
            machine are trusted.

    Raises:
        BadInput: one line: nothing there, no complete checkpoint, other Stage1 weights than the generator was trained
            on, a class that cannot be imported, a hub that cannot be reached.
    """
    folder = sources.find(source, revision)
    if (run := _run_of(folder)) is not None:
        pipeline = _load_run(run, folder, weights)
    elif weights is not None:
        raise BadInput(f"{folder}: weights: expected null, as only a run has several, got {weights}")
    elif is_diffusers_folder(folder):
        from rqvae.api.diffusers_folder import wrap_diffusers  # diffusers takes seconds to import

        pipeline = wrap_diffusers(folder)
    elif (folder / exported.CONFIG).exists():
        here = Path(source).exists()
        description, stage1, two_stage = exported.read(folder, trust_code=trust_code or here)
        pipeline = Pipeline(description.data_spec, stage1, two_stage, description)
    else:
        raise BadInput(
            f"{folder}: expected a run folder with config.yaml, a checkpoint in one, or an exported folder with "
            f"{exported.CONFIG}, found none"
        )
    return pipeline if device is None else pipeline.to(device)


def is_diffusers_folder(folder: Path) -> bool:
    """Whether config.json is one of diffusers."""
    file = folder / exported.CONFIG
    return file.is_file() and "_class_name" in read_json(file)


def _run_of(folder: Path) -> Path | None:
    """The run folder that `folder` is, or is a checkpoint of."""
    inside = (folder / "meta.json").exists()
    run = folder.resolve().parent.parent if inside else folder
    if (run / "config.yaml").exists():
        return run
    if inside:
        raise BadInput(f"{folder}: expected a checkpoint inside its run, {run} has no config.yaml")
    return None


def _load_run(folder: Path, path: Path, weights: str | None) -> Pipeline:
    """A run's model; `path` is the run itself or one of its checkpoints."""
    configuration = read([folder / "config.yaml"], _source_overrides(folder), inference=True)
    run = configuration.instantiate()
    spec = _with_action_names(run.data.make("train")[0].spec, folder)
    parts = {name: configuration.resolved.get(name) for name in exported.PARTS}
    if isinstance(run, Stage1Run):
        at = load_evaluated(run.stage1, "stage1", path, weights)
        description = exported.Description(spec, parts, describe_run(folder, at, configuration.resolved, weights))
        return Pipeline(spec, run.stage1.eval(), None, description)
    if run.stage1_checkpoint is not None:
        run = replace(run, stage1_checkpoint=str(place_of(run.stage1_checkpoint, folder)))
    with kept():  # start weights are overwritten: loading draws no number of the caller's
        two_stage = load_two_stage(run, path, weights)
    at = checkpoint.find(path)
    description = exported.Description(spec, parts, describe_run(folder, at, configuration.resolved, weights))
    return Pipeline(spec, two_stage.stage1, two_stage, description)


def _with_action_names(spec: DataSpec, run: Path) -> DataSpec:
    """With the names of actions that the run's environment.json has, where the config leaves them to the recording."""
    if spec.names or not spec.num_actions or not (run / "environment.json").exists():
        return spec
    return replace(spec, names=tuple(read_json(run / "environment.json").get("action_names", ())))


def place_of(path: str, run: Path) -> Path:
    """Where a path of a run's config is now.

    A relative one was relative to the working directory of the training, which environment.json has. Where the whole
    tree was moved or copied, it is found from the folders above the run. A path that is nowhere is returned as it is,
    for its reader to complain about.
    """
    environment = run / "environment.json"
    if remote.is_url(path):
        return fetched(path)
    trained_in = json.loads(environment.read_text()).get("working_directory") if environment.exists() else None
    above = [*([Path(trained_in)] if trained_in else []), *run.resolve().parents, Path()]
    found = [folder / path for folder in above if (folder / path).exists()]
    return found[0] if found else Path(path)


def _source_overrides(run: Path) -> list[str]:
    """Where a diffusers Stage1 was named by a relative folder: the folder as it is found from here."""
    stage1 = read_config(run).get("stage1") or {}
    source = (stage1.get("init_args") or {}).get("source")
    if source is None or not str(stage1.get("class_path")).startswith(DIFFUSERS_WRAPPERS):
        return []
    place = place_of(source, run)
    return ["--stage1.init_args.source", str(place)] if place.is_dir() else []


def describe_run(run: Path, at: Path, config: dict[str, Any], weights: str | None) -> dict[str, Any]:
    """Where weights are from: run, step, weights, data, command, versions, and the last scores up to that step.

    Args:
        run: run folder.
        at: its checkpoint.
        config: its resolved config.
        weights: those that were asked for; None is what the run evaluates.
    """
    meta = checkpoint.read_meta(at)
    environment = json.loads((run / "environment.json").read_text()) if (run / "environment.json").exists() else {}
    dataset = config["data"]["dataset"]
    arguments = {k: v for k, v in (dataset.get("init_args") or {}).items() if k != "root"}
    return {
        "run": run.resolve().name,
        "step": meta["clock"]["step"],
        "images": meta["clock"].get("images"),
        "weights": checkpoint.weights_of(at, weights),
        "stage1_sha256": meta.get("stage1_sha256"),
        "dataset": {"class_path": dataset["class_path"], "init_args": arguments},
        "command": _command(environment.get("argv", [])),
        "commit": environment.get("commit"),
        "torch": environment.get("torch"),
        "scores": _scores(run / "metrics.jsonl", meta["clock"]["step"]),
    }


def _command(argv: list[str]) -> str:
    """The command line of a training; that of a notebook's kernel says nothing."""
    return " ".join(["python -m rqvae", *argv[1:]]) if argv[1:2] == ["train"] else "rqvae.Run.load(CONFIG).fit()"


def _scores(path: Path, step: int) -> dict[str, float]:
    """The last value of each `val/` and `eval/` key up to `step`."""
    scores: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        if '"val/' in line or '"eval/' in line:
            try:
                row = json.loads(line)
            except ValueError:  # the last row of a run that is being written, or was cut
                continue
            if row["step"] <= step:
                scores |= {k: v for k, v in row.items() if k.startswith(("val/", "eval/"))}
    return scores
