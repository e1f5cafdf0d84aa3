"""World models of every workflow: two processes, split weights, a stop in between and XLA change nothing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from rqvae.games.collect import collect
from tests.conftest import ROOT, finish, largest_difference, only, rows, start, tensors
from tests.xla_job import environment

STEPS = 4
NETWORK = "--stage2.init_args.backbone.init_args"
WORKFLOWS: dict[str, list[object]] = {
    "concat": ["world_model.yaml"],
    "history": ["world_model.yaml", "--stage2.init_args.workflow", "latent_history"],
    "pixel": ["world_model.yaml", "--stage2.init_args.workflow", "pixel", "--stage2.init_args.loss_space", "both"],
    "causal": ["world_model_causal.yaml"],
    "rollout": ["world_model.yaml", "--data.dataset.init_args.rollout_steps", 2],
}


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    collect("maze-chase", 300, 32, folder)
    return folder


def command(name: str, frames: Path, save_dir: Path, *more: object) -> list[object]:
    config, *options = WORKFLOWS[name]
    return [
        "train", ROOT / "configs" / "maze_chase" / str(config), *options, "--save-dir", save_dir, "--project", "p",
        "--run-name", "r", "--data.dataset.init_args.root", frames, "--data.workers", 0, "--data.batch_size", 4,
        f"{NETWORK}.width", 32, f"{NETWORK}.depth", 1, "--train.precision", "fp64", "--train.steps", STEPS,
        "--train.log_every", 1, "--pictures.every", "null", "--checkpoint.every", 2, *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKFLOWS)
def test_two_processes_split_weights_and_a_resume_equal_one_run(name: str, frames: Path, tmp_path: Path, cli) -> None:
    assert cli(*command(name, frames, tmp_path / "one")) == 0
    one = only(tmp_path / "one" / "p")
    others = {"two": ["--world-size", 2], "split": ["--world-size", 2, "--train.parallel", "sharded"]}
    for place, more in others.items():
        code, errors = finish(start(*command(name, frames, tmp_path / place, *more)))
        assert code == 0, errors
        run = only(tmp_path / place / "p")
        losses = [[row["train/loss_total"] for row in rows(each)] for each in (one, run)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-9)
        if place == "two":
            assert largest_difference(tensors(one, STEPS), tensors(run, STEPS)) < 1e-9
    first = one / "checkpoints" / f"step_{2:08d}"
    assert cli(*command(name, frames, tmp_path / "again", "--resume-ckpt", first)) == 0
    again = tensors(only(tmp_path / "again" / "p"), STEPS)
    assert all(value.equal(again[key]) for key, value in tensors(one, STEPS).items() if not key.startswith("log/"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch_xla") is None, reason="torch_xla is not installed")
@pytest.mark.parametrize("name", WORKFLOWS)
def test_xla_equals_eager(name: str, frames: Path, tmp_path: Path, cli) -> None:
    """In float64; XLA's own exp and tanh differ by 1e-9 a call."""
    assert cli(*command(name, frames, tmp_path / "eager")) == 0
    line = command(name, frames, tmp_path / "xla", "--backend", "xla")
    code, errors = finish(start(*line, env=environment()), timeout=280)
    assert code == 0, errors
    eager, xla = only(tmp_path / "eager" / "p"), only(tmp_path / "xla" / "p")
    losses = [[row["train/loss_total"] for row in rows(each)] for each in (eager, xla)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-7)
    assert largest_difference(tensors(eager, STEPS), tensors(xla, STEPS)) < 1e-6
