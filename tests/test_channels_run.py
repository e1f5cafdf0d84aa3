"""Channel tracking and interventions in training runs: what they leave alone, resume, ranks, and the files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rqvae.callbacks.channels.classifier import STATES
from tests.conftest import assert_same, only, rows, tensors

CLI = Callable[..., int]
# thresholds under which many healthy channels count as suppressed, so that interventions have work
ACTING = [
    "--tracking.enabled", "true", "--tracking.every", "2", "--tracking.thresholds.suppressed", "0.8",
    "--tracking.thresholds.enter", "1", "--intervention.cooldown", "4", "--intervention.max_channels", "5",
    "--train.precision", "fp64", "--train.steps", "12", "--checkpoint.every", "6", "--online_eval.every", "null",
    "--pictures.every", "null",
]  # fmt: skip


def train(cli: CLI, place: Path, *more: object, code: int = 0) -> Path:
    arguments = ["--backend", "cpu", "--save-dir", place, "--project", "p", "--run-name", "r"]
    assert cli("train", "configs/debug/stage1.yaml", *arguments, *more) == code
    return only(place / "p") if code == 0 else place


def shards(run: Path) -> dict[str, np.ndarray]:
    files = [dict(np.load(path)) for path in sorted((run / "channels").glob("steps_*.npz"))]
    return {name: np.concatenate([f[name] for f in files]) for name in files[0]}


def acts(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "channels" / "interventions.jsonl").read_text().splitlines()]


def test_a_tracked_run_ends_in_the_same_weights(cli: CLI, tmp_path: Path) -> None:
    short = ["--train.steps", 6, "--online_eval.every", "null", "--pictures.every", "null"]
    plain = train(cli, tmp_path / "plain", *short)
    tracked = train(cli, tmp_path / "tracked", *short, "--tracking.enabled", "true", "--tracking.every", 2)
    kept = {k: v for k, v in tensors(tracked, 6).items() if not k.startswith("callbacks/")}
    assert_same(tensors(plain, 6), kept)
    found = shards(tracked)
    assert found["step"].tolist() == [2, 4, 6]
    assert (found["counts"] == 1).all()
    assert found["values"].dtype == np.float16
    assert found["states"].shape[1] == found["values"].shape[2] + 4  # the latent's channels are the last
    logged = rows(tracked)[-1]
    assert {"channels/dead_fraction", "channels/dormant", "channels/active_units", "channels/latent_kl"} <= set(logged)
    assert 0 <= logged["channels/dead_fraction"] <= 1


@pytest.mark.parametrize("strategy", ["recycle", "freeze"])
def test_a_cut_run_goes_on_bit_for_bit(strategy: str, cli: CLI, tmp_path: Path) -> None:
    """As if killed after its first checkpoint: weights, moments, states, acts and files are those of a whole run."""
    run = train(cli, tmp_path, *ACTING, "--intervention.strategy", strategy)
    whole, whole_shards, whole_acts = tensors(run, 12), shards(run), acts(run)
    regions = (run / "channels" / "regions.json").read_text()
    assert {act["step"] for act in whole_acts} & {7, 9, 11}  # some after the cut
    (run / "FINISHED").unlink()
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    train(cli, tmp_path, *ACTING, "--intervention.strategy", strategy)
    assert_same(tensors(run, 12), whole)
    assert acts(run) == whole_acts
    for name, value in shards(run).items():
        np.testing.assert_array_equal(value, whole_shards[name], err_msg=name)
    assert (run / "channels" / "regions.json").read_text() == regions


def test_acts_keep_to_their_limits(cli: CLI, tmp_path: Path) -> None:
    run = train(cli, tmp_path, *ACTING, "--intervention.strategy", "scale_reset", "--intervention.start", 5)
    done = acts(run)
    assert done
    at: dict[tuple[str, int], int] = {}
    for act in done:
        assert act["step"] >= 5
        assert len(act["channels"]) <= 5
        for layer, channel, state, _ in act["channels"]:
            assert state in STATES
            assert act["step"] - at.get((layer, channel), -99) >= 4
            at[layer, channel] = act["step"]


def test_a_dry_run_changes_nothing(cli: CLI, tmp_path: Path) -> None:
    more = ["--intervention.strategy", "recycle", "--intervention.dry_run", "true"]
    dry = train(cli, tmp_path / "dry", *ACTING, *more)
    assert all(act["dry_run"] and act["channels"] for act in acts(dry))
    assert acts(dry)
    plain = train(cli, tmp_path / "plain", *ACTING)
    model = {k: v for k, v in tensors(plain, 12).items() if not k.startswith("callbacks/")}
    assert_same({k: v for k, v in tensors(dry, 12).items() if k in model}, model)


def test_two_ranks_are_one(cli: CLI, tmp_path: Path) -> None:
    """Acts and snapshots are those of one process, in float64; every rank ends with the same weights."""
    observer = json.dumps([{"class_path": "tests.observers.RankWeights", "init_args": {"folder": str(tmp_path)}}])
    more = [*ACTING, "--intervention.strategy", "recycle", "--observers", observer]
    two = train(cli, tmp_path / "two", *more, "--world-size", 2)
    hashes = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    one = train(cli, tmp_path / "one", *more)
    assert hashes[0] == hashes[1] != {}
    for a, b in zip(acts(one), acts(two), strict=True):
        assert [row[:3] for row in a["channels"]] == [row[:3] for row in b["channels"]]
        assert a["step"] == b["step"]
    assert len(acts(one)) >= 5
    single, double = shards(one), shards(two)
    assert (double["counts"] == 2).all()
    assert (double["observations"] == 2).all()
    np.testing.assert_array_equal(single["states"], double["states"])
    np.testing.assert_allclose(single["values"].astype(float), double["values"].astype(float), rtol=2e-3, atol=1e-6)
    a, b = tensors(one, 12), tensors(two, 12)
    worst = max(float((a[k] - b[k]).abs().max()) for k in a if k.startswith("model/"))
    assert worst < 1e-9


def test_many_small_shards_become_one(cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqvae.callbacks.channels.storage.SHARD", 4)
    run = train(cli, tmp_path, *ACTING)
    names = sorted(path.name for path in (run / "channels").glob("*.npz"))
    assert names == [
        "steps_000000002_000000008.npz", "steps_000000010_000000010.npz", "steps_000000012_000000012.npz"
    ]  # fmt: skip
    assert shards(run)["step"].tolist() == [2, 4, 6, 8, 10, 12]


def test_final_model_is_read_by_diffusers(cli: CLI, tmp_path: Path) -> None:
    """The same reconstruction as ours, from the weights that a run evaluates."""
    from diffusers import AutoencoderKL

    from rqvae import api

    run = train(cli, tmp_path, "--train.steps", 3, "--online_eval.every", "null", "--checkpoint.final_model", "true")
    theirs = AutoencoderKL.from_pretrained(run / "final_model" / "vae").eval()
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        latent = theirs.encode(2 * images - 1).latent_dist.mode()
        expected = ((theirs.decode(latent).sample + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(api.load(run).reconstruct(images), expected, atol=1e-6, rtol=0)


def test_evaluate_scores_the_final_model_as_diffusers_computes_it(cli: CLI, tmp_path: Path) -> None:
    """CIFAR-10's layout on disk, one epoch of the shipped config at a small size, then the command on its model."""
    from datasets import Dataset
    from diffusers import AutoencoderKL

    config, data = "configs/channels/cifar10_test.yaml", tmp_path / "data"
    data.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    for split, part in (("train", pixels[:16]), ("test", pixels[16:])):
        columns = {"img": [Image.fromarray(image) for image in part], "label": [i % 10 for i in range(len(part))]}
        Dataset.from_dict(columns).to_parquet(data / f"{split}-00000-of-00001.parquet")
    small = [
        "--data.dataset.init_args.dataset_name", data, "--data.dataset.init_args.max_samples", 16,
        "--stage1.init_args.block_out_channels", "[16, 16]", "--backend", "cpu",
    ]  # fmt: skip
    assert cli("train", config, *small, "--save-dir", tmp_path / "s", "--project", "p", "--run-name", "r") == 0
    run = only(tmp_path / "s" / "p")
    assert rows(run)[-1]["step"] == 4
    model = run / "final_model"
    wanted = ["--eval-split", "test", "--num-samples-to-save", 3, "--batch_size", 3]
    assert cli("evaluate", "--config_path", config, "--checkpoint_path", model, *wanted, *small) == 0
    found = json.loads((model / "eval_results_test" / "eval_metrics.json").read_text())
    theirs = AutoencoderKL.from_pretrained(model / "vae").eval()
    images = torch.from_numpy(pixels[16:]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        posterior = theirs.encode(2 * images - 1).latent_dist
        recon = (theirs.decode(posterior.mode()).sample + 1) / 2
    mse = (recon - images).double().square().mean()
    assert (found["n"], found["split"]) == (8, "test")
    assert found["mse"] == pytest.approx(float(mse), rel=1e-5)
    assert found["kl"] == pytest.approx(float(posterior.kl().double().mean()), rel=1e-5)
    reference = found["protocol"]["reference"]
    assert reference["sha256"] == hashlib.sha256(pixels[16:].transpose(0, 3, 1, 2).tobytes()).hexdigest()
    assert (reference["n"], reference["split"], found["protocol"]["n"]) == (8, "test", 8)
    assert "rounded to nearest" in found["protocol"]["uint8_rule"]
    assert found["warnings"] == ["8 images: published values are of 50000"]
    samples = sorted((model / "eval_results_test" / "samples").iterdir())
    assert len(samples) == 3
    with Image.open(samples[0]) as pair:
        assert (pair.width, pair.height) == (66, 32)  # 2 pixels between


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tracking.enabled", "true", "--tracking.layers", "[GroupNorn]"], "tracking.layers: .*did you mean GroupN"),
        (["--intervention.strategy", "recycle"], "expected none without tracking.enabled, got recycle"),
        (["--tracking.thresholds.silent", "-1"], "tracking.thresholds.silent: expected at least 0, got -1"),
        (["--tracking.every", "0"], "tracking.every, tracking.window: expected at least 1, got 0"),
        (["--intervention.strategy", "nudge"], "intervention.strategy: .*nudge"),
        (
            ["--tracking.enabled", "true", "--tracking.layers", "[Conv2d]", "--intervention.strategy", "scale_add"],
            "expected a tracked layer with gamma",
        ),
        (["--num_train_epochs", "3"], "num_train_epochs: expected train.steps or num_train_epochs, not both"),
        (["--report_to", "mlflow"], "report_to: expected one of wandb, tensorboard, all, none, got 'mlflow'"),
    ],
)
def test_bad_input(more: list[str], words: str, cli: CLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(cli, tmp_path, *more, code=2)
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1
    assert __import__("re").search(words, captured), captured
    assert not list(tmp_path.iterdir())


def test_other_layers_cannot_go_on(cli: CLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(cli, tmp_path / "a", *ACTING)
    more = ["--resume-ckpt", run / "checkpoints" / "step_00000006", "--tracking.layers", "[encoder.*norm*]"]
    train(cli, tmp_path / "b", *ACTING, *more, code=2)
    assert "tracking.layers: expected the 24 layers of the checkpoint, got 10; decoder" in capsys.readouterr().err
    assert not list((tmp_path / "b").rglob("config.yaml"))


def test_second_spellings(tmp_path: Path) -> None:
    from rqvae.configuration import read

    text = Path("configs/debug/stage1.yaml").read_text().replace("steps: 20, ", "")
    file = tmp_path / "c.yaml"
    file.write_text(
        text.replace("tensorboard: false, wandb: disabled, ", "") + "num_train_epochs: 3\nreport_to: none\n"
    )
    resolved = read([file]).resolved
    assert (resolved["train"]["steps"], resolved["logging"]["tensorboard"]) == ("3 epochs", False)
    assert resolved["logging"]["wandb"] == "disabled"
    plain = tmp_path / "d.yaml"
    plain.write_text(text)
    assert read([plain], ["--num-train-epochs", "3"]).resolved["train"] == resolved["train"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("more", "ranks"),
    [(["--train.compile", "true"], 1), (["--train.parallel", "sharded", "--world-size", 2], 2)],
    ids=["compile", "sharded"],
)
def test_counts_where_the_model_is_compiled_or_split(more: list, ranks: int, cli: CLI, tmp_path: Path) -> None:
    """A probe pass sees every layer in every observed step on every rank, and changes no weight."""
    short = ["--train.steps", 6, "--checkpoint.every", 6, "--online_eval.every", "null", "--pictures.every", "null"]
    more = [*more, *short]
    run = train(cli, tmp_path / "a", *more, "--tracking.enabled", "true", "--tracking.every", 2)
    found = shards(run)
    assert found["step"].tolist() == [2, 4, 6]
    assert (found["counts"] == ranks).all()
    assert (found["observations"] == ranks).all()
    plain = rows(train(cli, tmp_path / "b", *more))
    losses = [row["train/loss_total"] for row in rows(run)]
    assert losses == [row["train/loss_total"] for row in plain]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch_xla") is None, reason="torch_xla is not installed")
def test_xla_compiles_nothing_more_in_steady_state(tmp_path: Path) -> None:
    from tests.test_xla import steady
    from tests.xla_job import train as train_on

    more = ["--tracking.enabled", "true", "--tracking.every", 2, "--train.precision", "fp64"]
    job, eager = (train_on("stage1_gan", name, tmp_path, *more) for name in ("xla", "cpu"))
    assert steady(job)[0] == 0
    assert not job.fallbacks
    found, expected = shards(job.folder), shards(eager.folder)
    assert (found["counts"] == 1).all()
    np.testing.assert_allclose(found["values"].astype(float), expected["values"].astype(float), rtol=5e-3, atol=1e-5)
