"""Cached latents: what they hold, that training on them is training on the images, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from rqvae.errors import BadInput
from rqvae.img_datasets.feed import Positions, make_loader
from rqvae.img_datasets.image_folder import ImageFolder
from rqvae.img_datasets.interfaces import (
    DataSpec,
    LabeledImageData,
    LabeledImageDatasetWrapper,
    MaskCondition,
    Stage1Encodings,
    Transform,
)
from rqvae.img_datasets.latent_cache import LatentCache
from rqvae.img_datasets.photos import SkimagePhotos
from rqvae.img_datasets.transforms import TrainTransform
from rqvae.models.stage1.kl_vae import KLVAE
from rqvae.models.stage1.pixel import PixelStage1
from rqvae.randomness import Draw, normal
from rqvae.trainers.run_folder import RunLock
from tests.conftest import ROOT, finish, only, rows, start, tensors

STAGE1 = "configs/debug/stage1.yaml"
PIXELS = "configs/debug/stage2.yaml"
STEPS = 4
HERE = "tests.test_latent_cache"


class RandomCrop(Transform):
    """A transform whose results cannot be listed."""

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec

    def __call__(self, sample: LabeledImageData, rng: torch.Generator) -> LabeledImageData:
        raise NotImplementedError


class Unfaithful(TrainTransform):
    """Says that it flips, and does not."""

    def __call__(self, sample: LabeledImageData, rng: torch.Generator) -> LabeledImageData:  # noqa: ARG002
        return self.variant(sample, torch.tensor(0))


class Noisy(PixelStage1):
    """A Stage1 that samples in `encode` and does not say how to do it again."""

    def encode(self, inputs: LabeledImageData) -> Stage1Encodings:
        encodings = super().encode(inputs)
        return Stage1Encodings(encodings.zs + (inputs.draws or {}).get("eps", torch.zeros(())))

    def draws(self, image_shape: tuple[int, int, int]) -> dict[str, Draw]:
        return {"eps": Draw(self.latent_shape(image_shape), normal)}


class Huge(PixelStage1):
    """A Stage1 whose latents are more than float16 can hold."""

    def encode(self, inputs: LabeledImageData) -> Stage1Encodings:
        return Stage1Encodings(1e6 * (2 + super().encode(inputs).zs))


def train_stage1(folder: Path, *more: object) -> Path:
    from rqvae.cli import run

    line = ["train", STAGE1, "--save-dir", folder, "--project", "p", "--run-name", "r", "--train.steps", 2, *more]
    assert run([str(word) for word in line]) == 0
    return only(folder / "p")


@pytest.fixture(scope="module")
def stage2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stage2 config on the latents of a KL-VAE."""
    folder = tmp_path_factory.mktemp("latents")
    config = yaml.safe_load((ROOT / PIXELS).read_text())
    config["stage1"] = yaml.safe_load((ROOT / STAGE1).read_text())["stage1"]
    config["stage1_checkpoint"] = str(train_stage1(folder))
    config["connector"] = {"class_path": "rqvae.models.connectors.scale_shift.ScaleShift"}
    config["pictures"] = {"every": f"{STEPS} steps", "images": 2}
    file = folder / "stage2.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture(scope="module")
def cache(stage2: Path) -> Path:
    """Three shards of 96 patches in both flips."""
    from rqvae.cli import run

    out = stage2.parent / "cache"
    assert run(["cache-latents", str(stage2), str(out), "--shard-size", "40", "--batch-size", "16"]) == 0
    return out


def encoder(stage2: Path) -> KLVAE:
    import rqvae

    stage1 = rqvae.load(yaml.safe_load(stage2.read_text())["stage1_checkpoint"]).stage1
    assert isinstance(stage1, KLVAE)
    return stage1


def train(cli: Callable[..., int], config: object, save_dir: Path, *more: object) -> int:
    return cli(
        "train", config, "--save-dir", save_dir, "--project", "p", "--run-name", "r", "--train.steps", STEPS, *more
    )


def bytes_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.name != ".lock"}


@torch.no_grad()
def test_it_holds_the_posterior_of_each_image_and_of_its_mirror_image(stage2: Path, cache: Path) -> None:
    photos, model = SkimagePhotos("train", size=16, patches_per_photo=16), encoder(stage2)
    photos.open()
    images = torch.stack([photos[i].require_img() for i in range(len(photos))]).float() / 255
    shards = [load_file(cache / f"train-{k:05d}.safetensors") for k in range(3)]
    assert [len(shard["zs"]) for shard in shards] == [40, 40, 16]
    found = {name: torch.cat([shard[name] for shard in shards]) for name in ("zs", "logvar")}
    for variant, seen in enumerate((images, images.flip(-1))):
        mu, logvar = model.quant_conv(model.encoder(2 * seen - 1)).chunk(2, 1)
        torch.testing.assert_close(found["zs"][:, variant], mu, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["logvar"][:, variant], logvar.clamp(-30, 20), rtol=1e-5, atol=1e-6)
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["same_as_zs"] == ["mu"], "the mean is stored once"
    assert manifest["splits"]["train"]["variants"] == ["as stored", "flipped"]
    for entry in manifest["splits"]["train"]["shards"]:
        assert hashlib.sha256((cache / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]


def test_its_statistics_are_those_of_noisy_latents(cache: Path) -> None:
    """In float64 from the tensors on disk: the means' mean, and the law of total variance over two equal flips."""
    found = [load_file(cache / f"train-{k:05d}.safetensors") for k in range(3)]
    mu, logvar = (torch.cat([shard[name] for shard in found]).double().flatten(0, 1) for name in ("zs", "logvar"))
    mean, std = LatentCache.open(cache, "train").statistics()
    n = len(mu) / 2 * mu[0, 0].numel()
    expected_std = (mu.var((0, 2, 3)) + logvar.exp().mean((0, 2, 3))).sqrt()
    assert ((mean - mu.mean((0, 2, 3))).abs() < 5 * expected_std / n**0.5).all()
    assert ((std / expected_std - 1).abs() < 5 / (2 * n) ** 0.5).all()
    assert (expected_std > 1.2 * mu.std((0, 2, 3))).any(), "with noise that can be told from none"


@pytest.mark.parametrize("workers", [0, 1])
def test_training_on_it_is_training_on_images(
    stage2: Path, cache: Path, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    assert train(cli, stage2, tmp_path / "images", "--data.workers", workers) == 0

    def never(self: KLVAE, inputs: LabeledImageData) -> Stage1Encodings:
        raise AssertionError("an image was encoded")

    monkeypatch.setattr(KLVAE, "encode", never)
    assert train(cli, stage2, tmp_path / "cache", "--data.workers", workers, "--data.latents", cache) == 0
    images, cached = only(tmp_path / "images" / "p"), only(tmp_path / "cache" / "p")
    assert len(rows(images)) == STEPS
    for a, b in zip(rows(images), rows(cached), strict=True):
        for key in ("train/loss_total", "train/grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-5)
    a, b = tensors(images, STEPS), tensors(cached, STEPS)
    for name in ("mean", "std"):
        torch.testing.assert_close(b[f"model/connector:{name}"], a[f"model/connector:{name}"], rtol=1e-6, atol=0)
    assert len(list((cached / "samples").iterdir())) == 1, "the validation pictures need no cache"


def test_a_deterministic_stage1_gives_the_same_bits(tmp_path: Path, cli) -> None:
    assert cli("cache-latents", PIXELS, tmp_path / "cache", "--shard-size", 50) == 0
    for name, more in (("images", []), ("cache", ["--data.latents", tmp_path / "cache"])):
        assert train(cli, PIXELS, tmp_path / name / "run", *more) == 0
    a, b = (tensors(only(tmp_path / name / "run" / "p"), STEPS) for name in ("images", "cache"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_every_batch_has_one_shape_and_fills_up_with_what_is_not_kept(
    stage2: Path, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 samples in shards of 40 and batches of 15: 15, 15, 10; 15, 15, 10; 15, 1. Both flips of each.

    Whole batches give the bits of `encode`; in short ones a CPU sums in another order than in whole ones.
    """
    encode, seen = KLVAE.encode, []

    def watched(self: KLVAE, inputs: LabeledImageData) -> Stage1Encodings:
        seen.append(len(inputs.require_img()))
        return encode(self, inputs)

    out = tmp_path / "cache"
    with monkeypatch.context() as patched:
        patched.setattr(KLVAE, "encode", watched)
        assert cli("cache-latents", stage2, out, "--shard-size", 40, "--batch-size", 15) == 0
    assert set(seen) == {30, 15}, "15 once, for the check of the draws"
    model = encoder(stage2).eval()
    photos = SkimagePhotos("train", size=16, patches_per_photo=16)
    photos.open()
    for k, sizes in enumerate(((15, 15, 10), (15, 15, 10), (15, 1))):
        found, first = load_file(out / f"train-{k:05d}.safetensors"), 0
        assert {len(x) for x in found.values()} == {sum(sizes)}
        for size in sizes:
            images = torch.stack([photos[40 * k + first + i].require_img() for i in range(size)]).float() / 255
            both = torch.stack((images, images.flip(-1)), 1).flatten(0, 1)
            with torch.no_grad():
                encodings = model.encode(LabeledImageData(img=both))
            assert encodings.additional_attr is not None
            for name, expected in (("zs", encodings.zs), ("logvar", encodings.additional_attr["logvar"])):
                same, x = size == 15, found[name][first : first + size].flatten(0, 1)
                torch.testing.assert_close(x, expected, rtol=0 if same else 1e-5, atol=0 if same else 1e-6)
            first += size
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["splits"]["train"]["statistics"]["values_per_channel"] == 96 * 8 * 8


def test_two_processes_write_the_bytes_of_one(stage2: Path, cache: Path, tmp_path: Path) -> None:
    line = ["cache-latents", stage2, tmp_path / "two", "--shard-size", 40, "--batch-size", 16, "--world-size", 2]
    code, errors = finish(start(*line))
    assert code == 0, errors
    assert bytes_of(tmp_path / "two") == bytes_of(cache)


def test_half_written_and_damaged_shards_are_made_anew(stage2: Path, cache: Path, tmp_path: Path, cli, capfd) -> None:
    out = tmp_path / "cache"
    shutil.copytree(cache, out)
    (out / ".lock").unlink()
    line = ["cache-latents", stage2, out, "--shard-size", 40, "--batch-size", 16]
    whole, untouched = bytes_of(cache), (out / "train-00001.safetensors").stat().st_mtime_ns
    first, last = out / "train-00000.safetensors", out / "train-00002.safetensors"
    first.write_bytes(first.read_bytes()[:-100])
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    assert cli(*line) == 0
    log = capfd.readouterr().err
    assert "1 of 3 shards are there" in log
    assert all(f"{file}: half-written or damaged" in log for file in (first, last))
    assert bytes_of(out) == whole
    assert (out / "train-00001.safetensors").stat().st_mtime_ns == untouched
    for name in ("train-00001.json", "manifest.json"):
        (out / name).write_text((out / name).read_text()[:20])
    assert cli(*line) == 0
    assert "2 of 3 shards are there" in capfd.readouterr().err
    assert bytes_of(out) == whole
    claimed = (out / "request.json").stat().st_ino
    assert cli(*line) == 0
    assert "3 of 3 shards are there" in capfd.readouterr().err
    assert (out / "request.json").stat().st_ino == claimed, "what is there is not written again"
    (out / "request.json").write_text((out / "request.json").read_text()[:20])
    assert cli(*line) == 2
    assert f"{out / 'request.json'}: expected a JSON object that says what the shards are of" in said(capfd)
    shutil.copy(cache / "request.json", out)
    assert cli(*line) == 0
    assert bytes_of(out) == whole


def test_a_kill_while_the_folder_is_claimed_loses_nothing(tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is whole or not there: no later command meets half of what it needs to know its shards by."""
    out = tmp_path / "out"
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(f"rqvae.files.os.{step}", interrupted)
            patched.setattr(Path, "unlink", lambda *_, **__: None)
            assert cli("cache-latents", PIXELS, out, "--shard-size", 50) == 130
        assert not (out / "request.json").exists()
        assert list(out.glob(".request.*")), "as a kill leaves it"
    assert cli("cache-latents", PIXELS, out, "--shard-size", 50) == 0


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_loses_at_most_the_shards_at_hand(stage2: Path, tmp_path: Path, cli, capfd, ranks: int) -> None:
    line = ["cache-latents", stage2, tmp_path / "out", "--data.dataset.init_args.patches_per_photo", 120]
    line += ["--shard-size", 40, "--batch-size", 2, "--world-size", ranks]
    process = start(*line)
    until = time.monotonic() + 60
    while not list((tmp_path / "out").glob("train-*.json")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.terminate()
    code, errors = finish(process)
    assert code == 143, errors
    kept = bytes_of(tmp_path / "out")
    assert "manifest.json" not in kept
    notes = [name for name in kept if name.startswith("train") and name.endswith(".json")]
    assert cli(*line[:-1], 1) == 0
    assert f"{len(notes)} of 18 shards are there" in capfd.readouterr().err
    done = bytes_of(tmp_path / "out")
    assert all(done[name] == kept[name] for name in kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storage_in_half_the_bytes(stage2: Path, cache: Path, tmp_path: Path, cli, capfd, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    assert cli("cache-latents", stage2, tmp_path / "half", "--dtype", name, "--shard-size", 96) == 0
    half, full = LatentCache.open(tmp_path / "half", "train"), LatentCache.open(cache, "train")
    for index, choice in ((0, 0), (39, 1), (40, 0), (95, 1)):
        a, b = half.read(index, torch.tensor(choice)), full.read(index, torch.tensor(choice))
        assert a.zs.dtype == torch.float32
        for x, y in ((a.zs, b.zs), (a.additional_attr["logvar"], b.additional_attr["logvar"])):
            assert (x - y.to(dtype).float()).abs().max() <= 2.0**-8 * y.abs().max(), "batch size may round once more"
            assert torch.equal(x, x.to(dtype).float())
    assert train(cli, stage2, tmp_path / "a") == 0
    resumed = ["--resume-ckpt", only(tmp_path / "a" / "p"), "--train.steps", STEPS + 1]
    assert train(cli, stage2, tmp_path / "b", *resumed, "--data.latents", tmp_path / "half") == 2
    assert f"latents_rounded_to of the checkpoint is None, of this run {name}" in capfd.readouterr().err
    assert train(cli, stage2, tmp_path / "b", *resumed, "--data.latents", cache) == 0


def test_a_stage1_config_and_several_splits(stage2: Path, cache: Path, tmp_path: Path, cli) -> None:
    ckpt = yaml.safe_load(stage2.read_text())["stage1_checkpoint"]
    line = ["cache-latents", STAGE1, "--ckpt", ckpt, "--splits", "train,val", "--shard-size", 40, "--batch-size", 16]
    assert cli(*line, tmp_path / "out") == 0
    own, theirs = bytes_of(tmp_path / "out"), bytes_of(cache)
    assert all(own[k] == v for k, v in theirs.items() if k.startswith("train"))
    val = LatentCache.open(tmp_path / "out", "val")
    assert len(val) == 24
    assert val.manifest["splits"]["val"]["variants"] == ["as stored"]


# What is refused


def said(capfd: pytest.CaptureFixture[str]) -> str:
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    lines = [row for row in errors.splitlines() if row.startswith("error: ")]
    assert len(lines) == 1, errors
    return lines[0]


def cut(cache: Path) -> None:
    file = cache / "train-00001.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def bend(cache: Path) -> None:
    content = bytearray((cache / "train-00001.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (cache / "train-00001.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("change", "more", "expected"),
    [
        (None, ["--stage1_checkpoint", "OTHER"], r"expected latents of the Stage1 weights \w{12}, got of \w{12}"),
        (None, ["--data.dataset.init_args.size", "32"], r"image shape \[3, 32, 32\], got of \[3, 16, 16"),
        (None, ["--data.train_transform.init_args.flip", "false"], r"transform .*flip=False\), got of .*flip=True\)"),
        (None, ["--data.train_transform", "rqvae.img_datasets.transforms.Identity"], r"transform .*Identity\(\), got"),
        (None, ["--data.dataset.init_args.patches_per_photo", "17"], r"of the data SkimagePhotos:train:16:17"),
        (None, ["--stage1", "rqvae.models.stage1.pixel.PixelStage1"], r"of Stage1 PixelStage1 \w+, got of KLVAE"),
        (cut, [], r"train-00001\.safetensors: expected \d+ bytes, got 1000; the same `cache-latents` command"),
        (bend, [], r"train-00001\.safetensors: expected sha256 \w{12}\.\.\., got \w{12}"),
        (lambda c: (c / "train-00002.safetensors").unlink(), [], r"00002\.safetensors: expected .* got no such file"),
        (lambda c: (c / "manifest.json").unlink(), [], r"json: expected a complete latent cache.*cache-latents"),
        (lambda c: (c / "manifest.json").write_text("{"), [], r"manifest\.json: expected a manifest of latents"),
        (lambda c: (c / "manifest.json").write_text('{"schema": 2, "splits": {}}'), [], "schema: expected 1, got 2"),
        (lambda c: (c / "manifest.json").write_text('{"schema": 1, "splits": {"val": 0}}'), [], "split train, got val"),
    ],
)  # fmt: skip
def test_another_cache_is_refused_before_training(
    stage2: Path, cache: Path, tmp_path: Path, cli, capfd, change: Callable[[Path], object], more: list, expected: str
) -> None:
    if "OTHER" in more:
        more = [more[0], train_stage1(tmp_path / "other", "--train.seed", 1)]
    if change:
        shutil.copytree(cache, tmp_path / "changed")
        cache = tmp_path / "changed"
        change(cache)
    capfd.readouterr()
    assert train(cli, stage2, tmp_path / "runs", "--data.latents", cache, *more) == 2
    line = said(capfd)
    assert re.search(expected, line), line
    assert not (tmp_path / "runs").exists()


def test_stage1_is_trained_on_images(cache: Path, tmp_path: Path, cli, capfd) -> None:
    assert train(cli, STAGE1, tmp_path / "runs", "--data.latents", cache) == 2
    assert "data.latents: expected null for Stage1" in said(capfd)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([STAGE1, "OUT"], "--ckpt: expected a run or checkpoint folder for KLVAE, got null"),
        ([STAGE1, "OUT", "--ckpt", "no/such"], "no/such: no such checkpoint or run folder"),
        ([PIXELS, "FILE"], "expected a folder that can be"),
        ([PIXELS, "/proc/cache"], "OUT /proc/cache: expected a folder that can be"),
        ([PIXELS, "FULL"], "expected an empty folder or one of this cache"),
        ([PIXELS, "OUT", "--data.train_transform", f"{HERE}.RandomCrop"], "variants, got RandomCrop"),
        ([PIXELS, "OUT", "--data.train_transform", f"{HERE}.Unfaithful"], "Unfaithful: expected the result"),
        ([PIXELS, "OUT", "--stage1", f"{HERE}.Noisy"], "Noisy.with_draws: expected the latents"),
        ([PIXELS, "OUT", "--shard-size", 0], "--shard-size: expected at least 1, got 0"),
        ([PIXELS, "OUT", "--dtype", "int8"], "--dtype"),
        ([PIXELS, "OUT", "--splits", "train,dev"], "expected train, val or test, got dev"),
        ([PIXELS], "OUT"),
    ],
)  # fmt: skip
def test_bad_input_of_the_command(tmp_path: Path, cli, capfd, line: list, expected: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    places = {"OUT": tmp_path / "out", "FILE": tmp_path / "file", "FULL": tmp_path / "full"}
    assert cli("cache-latents", *[places.get(word, word) for word in line]) == 2
    assert expected in said(capfd)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_latents_that_the_type_cannot_hold(tmp_path: Path, cli, capfd) -> None:
    line = ["cache-latents", PIXELS, tmp_path / "out", "--stage1", f"{HERE}.Huge", "--dtype", "float16"]
    assert cli(*line) == 3
    assert "train-00000: zs is not finite as float16 (samples 0 to 31)" in said(capfd)


def test_a_full_disk(tmp_path: Path, cli, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["cache-latents", PIXELS, tmp_path / "out", "--shard-size", 40]

    def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
        if file.name == "train-00001.safetensors":
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, file)

    with monkeypatch.context() as patched:
        patched.setattr("rqvae.trainers.latent_shards.write_tensors", save)
        assert cli(*line) == 3
    assert "train-00001.safetensors: not written: [Errno 28] No space left on device; the shards" in said(capfd)
    assert cli(*line) == 0
    assert "1 of 3 shards are there" in capfd.readouterr().err


def test_two_commands_do_not_write_in_one_folder(stage2: Path, cache: Path, cli, capfd) -> None:
    lock = RunLock(cache)
    lock.acquire()
    assert cli("cache-latents", stage2, cache, "--shard-size", 40, "--batch-size", 16) == 2
    assert str(cache) in said(capfd)
    lock.release()


def test_a_folder_of_other_latents_is_refused(stage2: Path, cache: Path, cli, capfd) -> None:
    before = bytes_of(cache)
    line = ["cache-latents", stage2, cache, "--shard-size", 40, "--batch-size", 16]
    assert cli(*line, "--dtype", "bfloat16") == 2
    assert "holds other latents (dtype: float32 -> bfloat16)" in said(capfd)
    assert bytes_of(cache) == before


# The parts


def test_a_mask_without_its_image_is_cropped_and_flipped_as_with_it() -> None:
    transform = TrainTransform(DataSpec((3, 16, 16), num_mask_classes=9))
    img = torch.randint(0, 256, (3, 24, 40), dtype=torch.uint8)
    sample = LabeledImageData(img=img, condition=MaskCondition(torch.randint(0, 9, (24, 40)), 9))
    alone = LabeledImageData(condition=sample.condition)
    seen = []
    for k in range(2):
        whole, mask = transform.variant(sample, torch.tensor(k)), transform.variant(alone, torch.tensor(k))
        assert mask.img is None
        assert torch.equal(mask.condition.mask, whole.condition.mask)  # type: ignore[union-attr]
        seen.append(mask.condition.mask)  # type: ignore[union-attr]
    assert torch.equal(seen[0].flip(-1), seen[1])
    assert not torch.equal(seen[0], seen[1])


def test_images_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "0.png")
    folder = ImageFolder("train", root=str(tmp_path), size=8, num_classes=2)
    folder.open()
    described = folder[1]
    monkeypatch.setattr("rqvae.img_datasets.image_folder.read_image", None)
    sample = folder.without_image(1)
    assert sample.img is None
    assert (sample.condition, sample.img_path) == (described.condition, described.img_path)


def test_a_shard_lost_while_training_is_one_line(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    photos = SkimagePhotos("train", size=16, patches_per_photo=16)
    photos.open()
    stream = LabeledImageDatasetWrapper(photos, TrainTransform(photos.spec), {}, seed=0, shuffle=False)
    stream.latents = LatentCache.open(tmp_path / "cache", "train")
    cut(tmp_path / "cache")
    with pytest.raises(BadInput, match=r"train-00001\.safetensors: expected a shard of latents"):
        list(make_loader(stream, Positions(32, 64, 16), 1))
