"""Beginning with trained weights: the model's of another run or of an exported folder, at step 0 and with new moments.

A resume goes on with everything a run had. This is what fine-tuning needs instead: only the weights, for another data
set, another schedule or another loss.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from rqvae.errors import BadInput
from rqvae.files import read_json
from rqvae.run import AnyRun
from rqvae.trainers import checkpoint
from rqvae.trainers.evaluation_trainer import load_evaluated
from rqvae.trainers.fetching import fetched

log = logging.getLogger(__name__)

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"


def load_initial(modules: Mapping[str, nn.Module], path: str | None, stage1_sha256: str | None = None) -> None:
    """Give modules the weights that `train.initial_weights` names; null leaves them as they are.

    Args:
        modules: by the name of their part: the trained one first, then those whose weights belong to it.
        path: run or checkpoint folder (its evaluated weights, EMA where there is one), exported folder, or URL.
        stage1_sha256: of the autoencoder that a generator is trained on here.

    Raises:
        BadInput: no such folder; weights of another architecture; a generator of other Stage1 weights.
    """
    if path is None:
        return
    try:
        _load(modules, path, stage1_sha256)
    except BadInput as error:
        raise BadInput(f"train.initial_weights: {error}") from error
    log.info("%s begins with the weights of %s", next(iter(modules)), path)


def _load(modules: Mapping[str, nn.Module], path: str, stage1_sha256: str | None) -> None:
    folder, trained = fetched(path), next(iter(modules))
    exported = (folder / trained / WEIGHTS).exists()
    at = folder if exported else load_evaluated(modules[trained], trained, folder)
    _check_stage1(at, exported, stage1_sha256, path)
    for name, module in modules.items():
        if exported:
            checkpoint.load_into(module, checkpoint.read(at / name, "model"), str(at / name / WEIGHTS))
        elif name != trained:
            checkpoint.load_into(module, checkpoint.read(at, f"model/{name}"), str(at / "model" / name))


def only_at_its_start(run: AnyRun, resumed: bool) -> AnyRun:
    """The run; without `train.initial_weights` where a checkpoint has all weights, as the folder may be gone by now."""
    if not resumed or run.train.initial_weights is None:
        return run
    log.info("train.initial_weights is not read: the checkpoint has all weights")
    return replace(run, train=replace(run.train, initial_weights=None))


def _check_stage1(folder: Path, exported: bool, expected: str | None, path: str) -> None:
    """That a generator's latents are those it was trained on, where the folder says which these were."""
    if expected is None:
        return
    if exported:
        meta = read_json(folder / DESCRIPTION).get("source") or {} if (folder / DESCRIPTION).exists() else {}
    else:
        meta = checkpoint.read_meta(folder)
    if (got := meta.get("stage1_sha256")) not in (None, expected):
        raise BadInput(
            f"{path}: expected a generator of the Stage1 weights {expected[:12]} of this run, got one of {got[:12]}"
        )
