"""A checkpoint written in parts by many processes, as one that is whole: a folder that loads and resumes like a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rqvae.errors import BadInput
from rqvae.trainers import checkpoint
from rqvae.trainers.run_folder import check_can_write, describe_environment, read_config, write_new


def consolidate(source: Path, out: Path) -> Path:
    """Write a run folder with one checkpoint, all of whose tensors are safetensors.

    Args:
        source: run or checkpoint folder; of a run its newest checkpoint. One that is whole already is copied.
        out: folder to make.

    Returns:
        The new checkpoint's folder. It is named as the old one is, and `--resume-ckpt` goes on from it exactly.

    Raises:
        BadInput: no complete checkpoint inside a run; a damaged one; `out` exists or cannot be made.
        RunFailed: the disk is full.
    """
    if out.exists():
        raise BadInput(f"OUT {out}: expected a folder that does not exist yet")
    check_can_write(out, "OUT")
    folder = checkpoint.find(source).resolve()
    run = folder.parent.parent
    if not (run / "config.yaml").exists():
        raise BadInput(f"{folder}: expected a checkpoint inside its run, {run} has no config.yaml")
    groups = {name: checkpoint.read(folder, name) for name in checkpoint.groups(folder)}
    environment = run / "environment.json"
    old: dict[str, Any] = json.loads(environment.read_text()) if environment.exists() else {}
    # what relative paths of the config are relative to, and which data it was trained on, are the run's
    kept = {key: old[key] for key in ("working_directory", "data", "parameters") if key in old}
    write_new(out, read_config(run), describe_environment(**kept, consolidated_from=str(folder)))
    made = out / "checkpoints" / folder.name
    try:
        checkpoint.save(made, groups, checkpoint.read_meta(folder), copied=True)
    except BaseException:
        shutil.rmtree(out)
        raise
    return made
