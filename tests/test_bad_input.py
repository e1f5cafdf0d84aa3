"""Every mistake is one line that names the file, key or tensor; exit code 2; nothing is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, finish, only, start

STAGE1 = "configs/debug/stage1.yaml"
STAGE2 = "configs/debug/stage2.yaml"


def refused(cli, capfd, save_dir: Path, *line: object, code: int = 2) -> str:
    """Run the command; it must end with `code` and one line, and leave nothing in `save_dir`. Returns the line."""
    capfd.readouterr()
    assert cli("train", "--save-dir", save_dir, "--project", "p", "--run-name", "r", *line) == code
    errors = capfd.readouterr().err
    said = [row for row in errors.splitlines() if row.startswith("error: ")]
    assert len(said) == 1, errors
    assert "Traceback" not in errors
    assert not save_dir.exists() or not list(save_dir.rglob("*")), list(save_dir.rglob("*"))
    return said[0]


def yaml(folder: Path, text: str) -> Path:
    path = folder / "bad.yaml"
    path.write_text(text + "\n")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {stepz: 5}", "stepz.*did you mean steps"),
        ("train: {precision: fp8}", r"train\.precision.*fp32.*fp8"),
        ("train: {steps: soon}", r"train\.steps.*duration.*soon"),
        ("train: {accumulate: 0}", r"train\.accumulate.*at least 1.*0"),
        ("train: {accumulate: 3}", r"data\.batch_size.*3 x 1.*got 8"),
        ("stage1: {class_path: rqvae.models.stage1.kl_vae.KLVEA}", "KLVEA.*did you mean.*KLVAE"),
        ("stage1: {class_path: no.such.Model}", r"no\.such\.Model"),
        ("stage1: {init_args: {widht: 8}}", "widht.*did you mean width"),
        ("stage1: {init_args: {width: wide}}", "width.*int.*wide"),
        ("stage3: 1", "stage3.*did you mean stage1"),
        ("data: {dataset: {init_args: {size: 15}}}", "15.*divisible"),
        ("data: {dataset: {class_path: rqvae.img_datasets.photos.SkimagePhoto}}", "did you mean.*SkimagePhotos"),
        ("gan: {disc_start: later, discriminator: {class_path: rqvae.models.losses.patchgan.PatchGAN}}", "later"),
        ("ema: {decays: [1.5]}", r"ema\.decays.*1\.5"),
        ("updates: {autoencoder: {lr: -1}}", r"bad\.yaml: updates\.autoencoder\.lr.*-1"),
        ("updates: {autoencoder: {betas: [1.5, 2]}}", "betas"),
        (
            "updates: {autoencoder: {schedule: {class_path: rqvae.trainers.schedules.Constant, "
            "init_args: {warmup: soon}}}}",
            "warmup.*soon",
        ),
        (
            "gan: {discriminator: {class_path: rqvae.models.losses.patchgan.PatchGAN, init_args: {layers: 5}}}",
            "PatchGAN: expected images of at least 96 px",
        ),
        ("train: [1", r"bad\.yaml:\d+: not YAML"),
        ("- 1", "expected a mapping"),
        ("lpips: {weight: 1.0}", r"vgg16-397923af\.pth: no such file, and http://127.*place it there.*lpips: null"),
    ],
)
def test_config_mistakes(text: str, expected: str, tmp_path: Path, cli, capfd, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no_weights"))
    unreachable = {"vgg": "http://127.0.0.1:9/vgg16-397923af.pth"}
    monkeypatch.setattr("rqvae.lpips_network.TRUNK_URLS", unreachable)
    bad = yaml(tmp_path, text)
    line = refused(cli, capfd, tmp_path / "save", STAGE1, bad)
    assert re.search(expected, line), line


def test_the_file_is_named(tmp_path: Path, cli, capfd) -> None:
    assert "bad.yaml" in refused(cli, capfd, tmp_path / "s", STAGE1, yaml(tmp_path, "train: {stepz: 5}"))
    assert "command line" in refused(cli, capfd, tmp_path / "s", STAGE1, "--train.stepz", 5)
    assert "did you mean steps" in refused(cli, capfd, tmp_path / "s", STAGE1, "--train.step", 5), "not an abbreviation"
    assert "command line" in refused(cli, capfd, tmp_path / "s", STAGE1, "--ema.decays", "[2]")
    assert "nowhere.yaml: no such config file" in refused(cli, capfd, tmp_path / "s", "nowhere.yaml")


def folder_config(tmp_path: Path, root: Path, **more: object) -> Path:
    init = {"root": str(root), "size": 16, **more}
    return yaml(
        tmp_path,
        "data: {dataset: {class_path: rqvae.img_datasets.image_folder.ImageFolder, init_args: "
        f"{json.dumps(init)}}}, batch_size: 8, workers: 0}}",
    )


def write_photos(root: Path, count: int = 16) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(root / split / f"{i:03d}.png")


def test_missing_and_empty_dataset_folders(tmp_path: Path, cli, capfd) -> None:
    root = tmp_path / "images"
    assert str(root / "train") in refused(cli, capfd, tmp_path / "s", STAGE1, folder_config(tmp_path, root))
    (root / "train").mkdir(parents=True)
    assert str(root / "train") in refused(cli, capfd, tmp_path / "s", STAGE1, folder_config(tmp_path, root))
    (root / "train").rmdir()
    write_photos(root)
    shutil.rmtree(root / "val")
    assert str(root / "val") in refused(cli, capfd, tmp_path / "s", STAGE1, folder_config(tmp_path, root))
    config = ["--save-dir", tmp_path / "s", "--run-name", "r", STAGE1, folder_config(tmp_path, root)]
    assert cli("recon", *config, "--stage1", "{class_path: rqvae.models.stage1.pixel.PixelStage1}") == 2
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_named(workers: int, tmp_path: Path, cli, capfd) -> None:
    root = tmp_path / "images"
    write_photos(root)
    (root / "train" / "007.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    config = folder_config(tmp_path, root)
    line = ["train", STAGE1, config, "--save-dir", tmp_path / "s", "--project", "p", "--run-name", "r"]
    assert cli(*line, "--train.steps", 3, "--data.workers", workers) == 2
    errors = capfd.readouterr().err
    said = [row for row in errors.splitlines() if row.startswith("error: ")]
    assert len(said) == 1
    assert said[0].startswith(f"error: {root / 'train' / '007.png'}: ")
    assert "Traceback" not in errors
    skip = folder_config(tmp_path, root, on_bad_image="skip")
    assert cli("train", STAGE1, skip, *line[3:], "--fresh", "--train.steps", 3, "--data.workers", workers) == 0


def test_world_size_and_save_dir(tmp_path: Path, cli, capfd) -> None:
    assert "WORLD_SIZE" in refused(cli, capfd, tmp_path / "s", STAGE1, "--world-size", 0)
    blocked = tmp_path / "a_file"
    blocked.write_text("")
    assert cli("train", STAGE1, "--save-dir", blocked / "inside", "--project", "p", "--run-name", "r") == 2
    assert str(blocked) in capfd.readouterr().err
    assert "data.batch_size" in refused(cli, capfd, tmp_path / "s", STAGE1, "--world-size", 3)
    assert "pip install 'mae-dit[remote]'" in refused(cli, capfd, tmp_path / "s", STAGE1, "--save-dir", "gs://bucket/x")
    psnr = ["--online_eval.every", 2, "--online_eval.metrics", "[psnr]"]
    assert "online_eval" in refused(cli, capfd, tmp_path / "s", STAGE2, *psnr)


def test_unknown_backend_is_no_fallback(tmp_path: Path, cli, capfd, monkeypatch) -> None:
    assert "tpu" in refused(cli, capfd, tmp_path / "s", STAGE1, "--backend", "tpu")
    monkeypatch.setenv("RQVAE_BACKEND", "gpu")
    assert "gpu" in refused(cli, capfd, tmp_path / "s", STAGE1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stage1 run of two steps."""
    from rqvae.cli import run

    folder = tmp_path_factory.mktemp("trained")
    line = ["train", STAGE1, "--save-dir", str(folder), "--project", "p", "--run-name", "r", "--train.steps", "2"]
    assert run(line) == 0
    return only(folder / "p")


def test_checkpoint_of_another_architecture(trained: Path, tmp_path: Path, cli, capfd) -> None:
    wider = ["--stage1.init_args.width", 24, "--resume-ckpt", trained]
    line = refused(cli, capfd, tmp_path / "s", STAGE1, *wider)
    assert line.count("expected (") >= 3
    assert "more" in line
    assert "model/stage1" in line
    nowhere = refused(cli, capfd, tmp_path / "s", STAGE1, "--resume-ckpt", tmp_path / "nowhere")
    assert "nowhere: no such checkpoint" in nowhere


def test_damaged_checkpoint(trained: Path, tmp_path: Path, cli, capfd) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    file = only(copy / "checkpoints") / "model" / "stage1.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "stage1.safetensors: expected sha256" in refused(cli, capfd, tmp_path / "s", STAGE1, "--resume-ckpt", copy)
    file.write_bytes(data[:-100])
    assert "complete checkpoint" in refused(cli, capfd, tmp_path / "s", STAGE1, "--resume-ckpt", copy)


def stage2_on(stage1: Path) -> list[object]:
    kl_vae = "{latent_channels: 4, width: 16, multipliers: [1, 2], blocks: 1, norm_groups: 8}"
    return [
        "--stage1", f"{{class_path: rqvae.models.stage1.kl_vae.KLVAE, init_args: {kl_vae}}}",
        "--stage1_checkpoint", stage1,
    ]  # fmt: skip


def test_stage2_on_other_stage1_weights(trained: Path, tmp_path: Path, cli, capfd) -> None:
    first = ["train", STAGE2, "--save-dir", tmp_path / "a", "--project", "p", "--run-name", "r", "--train.steps", 2]
    assert cli(*first, *stage2_on(trained)) == 0
    other = ["train", STAGE1, "--save-dir", tmp_path / "b", "--project", "p", "--run-name", "r", "--train.steps", 2]
    assert cli(*other, "--train.seed", 1) == 0
    resume = ["--resume-ckpt", only(tmp_path / "a" / "p"), "--train.steps", 3]
    line = refused(cli, capfd, tmp_path / "s", STAGE2, *stage2_on(only(tmp_path / "b" / "p")), *resume)
    assert "stage1_sha256" in line
    assert "stage1_checkpoint" in refused(cli, capfd, tmp_path / "s", STAGE2, *stage2_on(trained)[:2])


def test_disk_that_fills_in_mid_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: small files pass, the model's do not.

    With loader workers, whom the failing trainer must not wait for.
    """
    save = tmp_path / "s"
    line = ["-m", "rqvae", "train", STAGE1, "--save-dir", str(save), "--project", "p", "--run-name", "r"]
    line += ["--data.workers", "2"]
    code = (
        "import resource, sys, runpy, rqvae.trainers.checkpoint as c\n"
        "whole = c.save\n"
        "def save(folder, *rest):\n"
        "    limit = (20_000, resource.RLIM_INFINITY)\n"
        "    if folder.name.endswith('20'): resource.setrlimit(resource.RLIMIT_FSIZE, limit)\n"
        "    whole(folder, *rest)\n"
        "c.save = save\n"
        "from rqvae.cli import run\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *line[2:]], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 3, done.stderr
    said = [row for row in done.stderr.splitlines() if row.startswith("error: ")]
    assert len(said) == 1
    assert "disk is full" in said[0]
    run = only(save / "p")
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000010"]
    code, errors = finish(start(*line[2:]))
    assert code == 0, errors
    assert (run / "FINISHED").exists()


@pytest.mark.parametrize("script", ["train_stage1.sh", "train_stage1woeval.sh", "train_stage2.sh", "recon_stage1.sh"])
def test_scripts_print_their_usage(script: str) -> None:
    right = ["p", "s", "configs/debug/stage1.yaml", "1", "r"]
    for arguments in ([], ["one"], ["a"] * 8, [*right[:3], "one", "r"], [*right, "--train.steps", "5"]):
        done = subprocess.run([f"./{script}", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"usage: ./{script} ")
        assert "RUN_NAME [RESUME_CKPT] [RESUME_WANDB_ID]" in done.stderr


@pytest.mark.slow
def test_scripts_train_and_reconstruct(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [f"./{name}", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)

    done = script("train_stage1.sh", "proj", tmp_path, STAGE1, 1, "name", "--", "--train.steps", "2")
    assert done.returncode == 0, done.stderr
    run = only(tmp_path / "proj", "name_*")
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert "val/psnr" in rows[-1], "online evaluation is on"
    done = script("recon_stage1.sh", tmp_path, run, STAGE1, 1, "recon")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "recon" / "metrics.json").read_text())
    images = sorted((tmp_path / "recon" / "images").iterdir())
    assert len(images) == scores["n"] > 0
    assert list((tmp_path / "recon" / "grids").iterdir())
    # cut off and repeated: what is there stays, the score is the same
    kept = images[0].stat().st_mtime_ns
    images[-1].unlink()
    done = script("recon_stage1.sh", tmp_path, run, STAGE1, 1, "recon", run)
    assert done.returncode == 0, done.stderr
    assert images[0].stat().st_mtime_ns == kept
    assert images[-1].exists()
    again = json.loads((tmp_path / "recon" / "metrics.json").read_text())
    assert again["psnr"] == pytest.approx(scores["psnr"], abs=1e-9)
    done = script("recon_stage1.sh", tmp_path, run, STAGE1, 1, "recon", tmp_path)
    assert done.returncode == 2
    assert "RESUME_CKPT" in done.stderr
    done = script("train_stage2.sh", "proj", tmp_path, STAGE1, 1, "name")
    assert done.returncode == 2
    assert "stage" in done.stderr
    done = script("train_stage1woeval.sh", "proj", tmp_path, STAGE1, 1, "noeval", "--", "--train.steps", "2")
    assert done.returncode == 0
    assert "val/psnr" not in (only(tmp_path / "proj", "noeval_*") / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_inference_ignores_the_other_sections(trained: Path, tmp_path: Path, cli) -> None:
    """Only dataset and model sections are read by recon; two processes give the numbers of one."""
    more = yaml(tmp_path, "train: {stepz: 5}\nsomething_else: 1")
    scores = []
    for name, world in (("one", 1), ("two", 2)):
        line = ["recon", STAGE1, more, "--save-dir", tmp_path, "--run-name", name, "--ckpt", trained]
        code, errors = finish(start(*line, "--world-size", world))
        assert code == 0, errors
        scores.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    assert scores[0]["psnr"] == pytest.approx(scores[1]["psnr"], abs=1e-9)
    assert scores[0]["ssim"] == pytest.approx(scores[1]["ssim"], abs=1e-12)
    images = [[p.read_bytes() for p in sorted((tmp_path / n / "images").iterdir())] for n in ("one", "two")]
    assert images[0] == images[1]
    assert len(images[0]) == scores[0]["n"]


@pytest.mark.parametrize(
    "line",
    [
        ["demo", "--out", "PLACE"],
        ["train", STAGE1, "--dry-run", "--json", "PLACE/x.json"],
        ["recon", STAGE1, "--save-dir", "PLACE", "--ckpt", "TRAINED"],
        ["collect", "maze-chase", "--frames", 50, "--out", "PLACE"],
    ],
)
def test_places_that_cannot_be_written(line: list, trained: Path, tmp_path: Path, cli, capfd) -> None:
    (tmp_path / "file").write_text("")
    words = {"PLACE": str(tmp_path / "file" / "below"), "TRAINED": str(trained)}
    line = [str(word).replace("PLACE", words["PLACE"]).replace("TRAINED", words["TRAINED"]) for word in line]
    assert cli(*line) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert [row.startswith("error: ") and words["PLACE"] in row for row in said.splitlines()] == [True]
