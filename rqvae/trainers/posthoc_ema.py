"""An average of a length that was not tracked, from the snapshots of a run, as a folder that loads like a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rqvae.errors import BadInput
from rqvae.models.power_ema import Combination, Profile, combine, exponent_of
from rqvae.trainers import checkpoint
from rqvae.trainers.ema_snapshots import Snapshot, read_snapshots, weighted_sum
from rqvae.trainers.run_folder import check_can_write, describe_environment, read_config, write_new


@dataclass(frozen=True)
class PosthocRequest:
    """What to put together, and where.

    Args:
        run: run folder with ema_snapshots.
        sigma_rel: relative width of the average, in (0, 0.2886].
        out: folder to make.
        step: of a snapshot; None is the newest.
    """

    run: Path
    sigma_rel: float
    out: Path
    step: int | None = None

    def __post_init__(self) -> None:
        if not (self.run / "config.yaml").exists():
            raise BadInput(f"{self.run}: expected a run folder with config.yaml, found none")
        if self.out.exists():
            raise BadInput(f"--out {self.out}: expected a folder that does not exist yet")
        check_can_write(self.out, "--out")


def choose_snapshots(request: PosthocRequest) -> tuple[list[Snapshot], Combination]:
    """The snapshots up to the request's step and their combination.

    Raises:
        BadInput: no snapshots, none at the step that is asked for, or a width outside (0, 0.2886].
    """
    found = read_snapshots(request.run)
    if not found:
        raise BadInput(f"{request.run}: expected snapshots in ema_snapshots (`ema.power: [0.05, 0.10]`), found none")
    steps = sorted({snapshot.step for snapshot in found})
    step = steps[-1] if request.step is None else request.step
    if step not in steps:
        shown = ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:4], "...", *steps[-3:]]))
        raise BadInput(f"--step: expected a step with a snapshot ({shown}), got {step}")
    used = [snapshot for snapshot in found if snapshot.step <= step]
    wanted = Profile(exponent_of(request.sigma_rel), step)
    return used, combine([snapshot.profile for snapshot in used], wanted)


def reconstruct_average(request: PosthocRequest) -> dict[str, Any]:
    """Write `out` in the form of a run folder: whatever loads a run's evaluated weights loads this average.

    Returns:
        `step`, `snapshots` (how many), `profile_error`, `noise_gain`.

    Raises:
        BadInput: see `choose_snapshots`; a damaged snapshot; a run without a complete checkpoint, from which come the
            parts that are not averaged (the connector, integer buffers).
    """
    snapshots, combination = choose_snapshots(request)
    source = checkpoint.find(request.run)
    meta, module = checkpoint.read_meta(source), snapshots[-1].name.partition("/")[2]
    average, own = weighted_sum(snapshots, combination.coefficients), checkpoint.read(source, f"model/{module}")
    name = f"posthoc_ema_{request.sigma_rel:g}"
    groups: dict[str, dict[str, Tensor]] = {
        f"model/{module}": {key: value for key, value in own.items() if key not in average},
        f"{name}/{module}": {key: value.to(own[key].dtype) for key, value in average.items()},
    }
    if "model/connector" in checkpoint.groups(source):
        groups["model/connector"] = checkpoint.read(source, "model/connector")
    step = snapshots[-1].step
    facts = {
        "step": step,
        "snapshots": len(snapshots),
        "profile_error": combination.profile_error,
        "noise_gain": combination.noise_gain,
    }
    per_step = meta["clock"]["images"] // meta["clock"]["step"]
    epochs = meta["clock"]["epoch"] / meta["clock"]["step"]
    clock = {"images": step * per_step, "step": step, "epoch": step * epochs}
    how = {"sigma_rel": request.sigma_rel, "run": str(request.run), **facts}
    # what relative paths of the config are relative to, and which data it was trained on, are the run's
    try:
        old = json.loads((request.run / "environment.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{request.run / 'environment.json'}: expected the facts of a run, got {error}") from error
    kept = {key: old[key] for key in ("working_directory", "data", "parameters") if key in old}
    write_new(request.out, read_config(request.run), describe_environment(**kept, posthoc_ema=how))
    try:
        folder = request.out / "checkpoints" / f"step_{step:08d}"
        checkpoint.save(folder, groups, {**meta, "clock": clock, "evaluate": name, "posthoc_ema": how})
    except BaseException:
        shutil.rmtree(request.out)
        raise
    return facts
