"""What a world model shows while it trains: the same windows and noise each time, by the sampler that is asked for."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rqvae
from rqvae.diffusion.solvers import dpm_solver_pp_2m, euler
from rqvae.games.collect import collect
from rqvae.img_datasets.game_frames import GameFrames
from rqvae.metrics.reconstruction import to_uint8
from rqvae.trainers.dream import Dream, frame_noise
from rqvae.trainers.stage2_trainer import seeded_noise
from tests.conftest import ROOT, only

DPM = '{"solver": "rqvae.diffusion.solvers.dpm_solver_pp_2m", "steps": 6, "shift": 3.0}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    collect("maze-chase", 1000, 32, folder / "frames", max_steps=20)
    return folder


def train(folder: Path, name: str, *more: object) -> tuple[int, Path]:
    from rqvae.cli import run as command

    backbone = "--stage2.init_args.backbone.init_args"
    line = ["train", ROOT / "configs/maze_chase/world_model.yaml", "--save-dir", folder, "--project", name]
    line += ["--data.dataset.init_args.root", folder / "frames", "--data.workers", 0, "--data.batch_size", 8]
    line += ["--train.steps", 2, f"{backbone}.width", 32, f"{backbone}.depth", 1, "--logging.progress", "false"]
    line += ["--pictures.every", 1, "--pictures.images", 3, "--pictures.frames", 5]
    return command([str(word) for word in (*line, *more)]), folder / name


def sheet(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_grid_and_film_are_those_of_the_sampler_that_is_asked_for(folder: Path) -> None:
    code, project = train(folder, "dpm", "--pictures.vis_sampler", DPM, "--updates.generator.lr", 0.05)
    assert code == 0
    run = only(project)
    pipeline = rqvae.load(run)
    two_stage, sampler = pipeline.two_stage, replace(pipeline.sampler(steps=6, solver=dpm_solver_pp_2m), shift=3.0)
    val = GameFrames("val", root=str(folder / "frames"), size=32, history=4, context=True, padding=False)
    val.open()
    grid = sheet(run / "samples" / "samples_00000002.png")
    noise = seeded_noise(two_stage, 0, 3)
    for row, index in enumerate((0, len(val) // 3, 2 * len(val) // 3)):
        sample = val[index]
        context = sample.condition.context
        tops = slice(row * 66, row * 66 + 64, 2)
        assert np.array_equal(grid[tops, 66:130:2], context[1].permute(1, 2, 0).numpy())
        target = 4 * 66 - 2 + 8
        assert np.array_equal(grid[tops, target : target + 64 : 2], sample.img.permute(1, 2, 0).numpy())
        condition = replace(sample.condition, context=context[None].float() / 255)
        condition = replace(condition, actions=condition.actions[None], mask=condition.mask[None])
        shown = grid[tops, target + 72 : target + 136 : 2].astype(int)
        expected = two_stage.decode(two_stage.sample(condition, noise[row : row + 1], sampler))
        assert np.abs(shown - to_uint8(expected)[0].permute(1, 2, 0).numpy()).max() <= 1
        other = two_stage.decode(two_stage.sample(condition, noise[row : row + 1], replace(sampler, solver=euler)))
        assert np.abs(shown - to_uint8(other)[0].permute(1, 2, 0).numpy()).max() > 1, "the sampler matters"

    film = Image.open(run / "samples" / "rollout_00000002.gif")
    assert film.n_frames <= 5
    frames, actions = next(e for e in map(val.episode, range(val.episodes)) if len(e[1]) >= 9)
    start = torch.from_numpy(frames[None, :4]).permute(0, 1, 4, 2, 3).float() / 255
    dream = Dream.begin(two_stage, start, torch.from_numpy(actions[None, :3]), 5, sampler)
    film.seek(0)
    dreamed = dream.step(torch.from_numpy(actions[3:4]), frame_noise((48, 8, 8), 0, 0, 4)[None])
    shown = np.asarray(film.convert("RGB"))
    assert np.abs(shown[98:194:3, :96:3].astype(int) - to_uint8(dreamed)[0].permute(1, 2, 0).numpy()).mean() < 10
    assert np.abs(shown[:96:3, :96:3].astype(int) - frames[4]).mean() < 10, "a GIF has 256 colours"


def test_pictures_of_a_model_that_does_not_change_are_equal_and_mirrored(folder: Path) -> None:
    code, project = train(folder, "still", "--updates.generator.lr", 1e-12)
    assert code == 0
    run = only(project)
    samples = run / "samples"
    assert (samples / "samples_00000001.png").read_bytes() == (samples / "samples_00000002.png").read_bytes()
    film = (samples / "rollout_00000002.gif").read_bytes()
    assert (samples / "rollout_00000001.gif").read_bytes() == film
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    images = board.Images("rollout")
    assert [image.step for image in images] == [1, 2]
    assert images[1].encoded_image_string == film
    assert Image.open(io.BytesIO(images[1].encoded_image_string)).format == "GIF"
    assert [image.step for image in board.Images("samples")] == [1, 2]


def test_a_sampler_that_does_not_fit_is_refused_before_training(
    folder: Path, capfd: pytest.CaptureFixture[str], cli: Callable[..., int]
) -> None:
    free = '{"class_path": "rqvae.diffusion.guidance.ClassifierFree", "init_args": {"scale": 4.5}}'
    guided = f'{{"steps": 3, "guidance": {free}}}'
    code, project = train(folder, "refused", "--pictures.vis_sampler", guided, "--stage2.init_args.drop_condition", 0)
    assert code == 2
    assert "sampler.guidance: expected a model trained with the null condition" in capfd.readouterr().err
    assert not project.exists()
