"""Weights split over processes: the numbers of one process, checkpoints for any number, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rqvae
from rqvae.backends import shard_files
from rqvae.backends.sharded import _policy, check_parameters, gathered
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import LabeledImageData
from rqvae.models.ema import EMA
from rqvae.models.layers.conv import ResBlock
from rqvae.models.layers.transformer import AdaLNZeroBlock
from rqvae.models.stage1.kl_vae import KLVAE
from rqvae.shards import own_part
from rqvae.trainers import checkpoint
from tests.conftest import assert_same, finish, largest_difference, only, rows, start, tensors

STEPS = 6
SHARDED = ["--train.parallel", "sharded"]
GAN = ["--gan.weighting", "reconstruction"]
EVALUATED = ["--online_eval.every", "3 steps", "--pictures.every", "3 steps", "--train.accumulate", 4]


def command(name: str, save_dir: Path, *more: object) -> list[object]:
    return [
        "train", f"configs/debug/{name}.yaml", "--save-dir", save_dir, "--project", "p", "--run-name", "r",
        "--train.precision", "fp64", "--train.steps", STEPS, "--checkpoint.every", 3, "--data.workers", 0,
        *(GAN if name == "stage1_gan" else []), *more,
    ]  # fmt: skip


def observers(folder: Path) -> list[str]:
    ranks = {"class_path": "tests.observers.RankState", "init_args": {"folder": str(folder)}}
    return ["--observers", json.dumps([ranks])]


def of_ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank_*.json"))]


def whole(run: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, split or not."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    checkpoint.verify(folder)
    return {f"{group}:{k}": v for group in checkpoint.groups(folder) for k, v in checkpoint.read(folder, group).items()}


def trained_split(name: str, folder: Path, world_size: int, *more: object) -> Path:
    code, errors = finish(start(*command(name, folder, "--world-size", world_size, *SHARDED, *more)), timeout=280)
    assert code == 0, errors
    return only(folder / "p")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GAN trained by one process."""
    from rqvae.cli import run

    folder = tmp_path_factory.mktemp("one")
    torch.set_num_threads(1)
    assert run([str(a) for a in command("stage1_gan", folder, *EVALUATED)]) == 0
    return only(folder / "p")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by two processes, each with its part of the weights."""
    folder = tmp_path_factory.mktemp("split")
    return trained_split("stage1_gan", folder, 2, *EVALUATED, *observers(folder / "ranks"))


def test_two_processes_with_split_weights_equal_one(one: Path, split: Path) -> None:
    a, b = whole(one, STEPS), whole(split, STEPS)
    assert_same(a, tensors(one, STEPS))
    assert sum(key.startswith("optimizer/discriminator") for key in a) > 10
    assert largest_difference(a, b) < 1e-9
    compared = 0
    for x, y in zip(rows(one), rows(split), strict=True):
        for key in ("train/loss_total", "train/grad_norm", "train/gan_weight", "val/psnr"):  # val/: of the average
            if key in x:
                assert x[key] == pytest.approx(y[key], rel=1e-9), key
                compared += key == "val/psnr"
    assert compared == 2


def test_each_process_holds_its_part_of_each_block(split: Path) -> None:
    ranks = of_ranks(split.parent.parent / "ranks")
    assert len(ranks) == 2
    assert ranks[0]["whole"] == ranks[1]["whole"], "what the parts make up differs between ranks"
    assert {"module/stage1", "module/discriminator", "ema_0.9", "ema_0.99", "optimizer/autoencoder"} <= set(
        ranks[0]["whole"]
    )
    assert len(ranks[0]["blocks"]) > 5
    for name, total in ranks[0]["total"].items():
        parts = [rank["blocks"][name] for rank in ranks]
        assert sum(parts) == total
        # the discriminator's last layer has one channel, which cannot be split
        limit = 0.51 if name.startswith("stage1") else 0.55
        assert max(parts) <= limit * total, f"{name}: {parts} of {total}"


def test_one_process_goes_on_from_the_parts_of_two(one: Path, split: Path, tmp_path: Path, cli) -> None:
    at = split / "checkpoints" / "step_00000003"
    assert (at / "shards" / "__1_0.distcp").exists(), "rank 1 writes its own part"
    assert not list(at.rglob("model/*")), "no rank held the whole model"
    line = command("stage1_gan", tmp_path, "--train.accumulate", 4, "--pictures.every", "null")
    assert cli(*line, "--online_eval.every", "null", "--resume-ckpt", at) == 0
    assert largest_difference(whole(one, STEPS), whole(only(tmp_path / "p"), STEPS)) < 1e-9


@pytest.mark.slow
def test_two_processes_go_on_from_one(one: Path, tmp_path: Path) -> None:
    at = one / "checkpoints" / "step_00000003"
    run = trained_split("stage1_gan", tmp_path, 2, "--train.accumulate", 4, "--resume-ckpt", at)
    assert largest_difference(whole(one, STEPS), whole(run, STEPS)) < 1e-9


@pytest.mark.slow
def test_two_processes_go_on_from_the_parts_of_four(tmp_path: Path, cli) -> None:
    assert cli(*command("stage2", tmp_path / "one")) == 0
    four = trained_split("stage2", tmp_path / "four", 4)
    at = four / "checkpoints" / "step_00000003"
    assert len(list(at.rglob("*.distcp"))) == 4
    run = trained_split("stage2", tmp_path / "two", 2, "--resume-ckpt", at)
    one = whole(only(tmp_path / "one" / "p"), STEPS)
    assert max(largest_difference(one, whole(other, STEPS)) for other in (four, run)) < 1e-9


def test_the_run_itself_goes_on_with_or_without_parts(split: Path, tmp_path: Path, cli, capfd) -> None:
    """How processes share the weights is not part of what is computed."""
    mine = tmp_path / "p" / split.name
    shutil.copytree(split, mine)
    (mine / "FINISHED").unlink()
    assert "parallel: sharded" in (mine / "config.yaml").read_text()
    assert cli(*command("stage1_gan", tmp_path, *EVALUATED, *observers(split.parent.parent / "ranks"))) == 0
    assert f"going on with {mine}, from step_00000006" in capfd.readouterr().err
    assert (mine / "FINISHED").exists()


@pytest.mark.parametrize(
    ("name", "accumulate"),
    [
        ("stage2", 1),
        pytest.param("stage2", 4, marks=pytest.mark.slow),
        pytest.param("stage1_gan", 1, marks=pytest.mark.slow),
    ],
)
def test_both_stages_equal_one_process(name: str, accumulate: int, tmp_path: Path, cli) -> None:
    more = ["--train.accumulate", accumulate, "--pictures.every", "3 steps"]
    more += ["--ema.power", "[0.1]", "--ema.snapshot_every", "3 steps", "--ema.snapshot_dtype", "fp32"]
    assert cli(*command(name, tmp_path / "one", *more)) == 0
    one, two = only(tmp_path / "one" / "p"), trained_split(name, tmp_path / "two", 2, *more)
    assert largest_difference(whole(one, STEPS), whole(two, STEPS)) < 1e-9
    for picture in sorted((one / "samples").rglob("*.png")):  # with the average's weights
        assert picture.read_bytes() == (two / picture.relative_to(one)).read_bytes()
    for file in sorted((one / "ema_snapshots").rglob("*.safetensors")):
        folder = file.parent.parent
        a, b = (checkpoint.read(f, f"{file.parent.name}/{file.stem}") for f in (folder, two / folder.relative_to(one)))
        assert largest_difference(a, b) < 1e-6


def test_consolidated_checkpoint_is_the_same_and_whole(split: Path, tmp_path: Path, cli, capsys) -> None:
    out = tmp_path / "whole"
    assert cli("consolidate", split, out) == 0
    made = out / "checkpoints" / f"step_{STEPS:08d}"
    assert str(made) in capsys.readouterr().out
    assert not (made / "shards").exists()
    assert_same(tensors(out, STEPS), whole(split, STEPS))
    x = torch.rand(2, 3, 16, 16)
    recon = [rqvae.load(source).reconstruct(x) for source in (split, out)]
    assert torch.equal(*recon)
    assert cli("consolidate", split, out) == 2


def test_damaged_parts_are_noticed(split: Path, tmp_path: Path, cli, capfd) -> None:
    shutil.copytree(split, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}"
    part = newest / "shards" / "__1_0.distcp"
    whole_bytes = bytearray(part.read_bytes())
    whole_bytes[len(whole_bytes) // 2] ^= 1
    part.write_bytes(whole_bytes)
    assert cli("consolidate", tmp_path / "run", tmp_path / "out") == 2
    assert "__1_0.distcp: expected sha256" in capfd.readouterr().err
    part.unlink()
    assert not checkpoint.is_good(newest)
    assert checkpoint.find(tmp_path / "run").name == "step_00000003"


def test_an_index_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "was here"),)

    for content, words in ((pickle.dumps(Evil()), "it names"), (b"", "expected the index"), (pickle.dumps({}), "dict")):
        (tmp_path / shard_files.INDEX).write_bytes(content)
        with pytest.raises(BadInput, match=words):
            shard_files.entries(tmp_path)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gan.weighting", "last_layer"], "gan.weighting: expected reconstruction or fixed with train."),
        (["--train.channels_last", "true"], "train.channels_last: expected false"),
        (["--checkpoint.asynchronous", "true"], "checkpoint.asynchronous: expected false"),
    ],
)
def test_what_split_weights_do_not_have_is_refused_by_name(more: list[str], message: str, tmp_path, cli, capfd) -> None:
    assert cli(*command("stage1_gan", tmp_path, *SHARDED, *more)) == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_single_process_holds_all(tmp_path: Path, cli) -> None:
    for parallel in ("data", "sharded"):
        assert cli(*command("stage2", tmp_path / parallel, "--train.parallel", parallel)) == 0
    assert_same(*(tensors(only(tmp_path / parallel / "p"), STEPS) for parallel in ("data", "sharded")))


def test_scalar_parameter_is_named() -> None:
    module = nn.Module()
    module.register_parameter("temperature", nn.Parameter(torch.ones(())))
    with pytest.raises(BadInput, match="temperature is a scalar"):
        check_parameters(module, 2)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A job of one process: FSDP2 as with several, but for the sums."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["linear layers alone", "norms too"])
def test_gathering_in_bf16_changes_no_number(kind: str, mesh: Any) -> None:
    """Only what autocast rounds to bf16 in any case is gathered in bf16."""
    linear = kind == "linear layers alone"
    grads = []
    for sharded in (False, True):
        torch.manual_seed(0)
        block = AdaLNZeroBlock(16, 2) if linear else ResBlock(8, 16, 4)
        for p in block.parameters():
            nn.init.normal_(p, std=0.3)
        if sharded:
            policy = _policy(block, "bf16")
            assert (policy.param_dtype == torch.bfloat16) == linear
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        inputs = (torch.randn(3, 4, 16), torch.randn(3, 16)) if linear else (torch.randn(2, 8, 4, 4),)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = block(*inputs)
        out.float().square().mean().backward()
        grads.append({"out": out.detach(), **{n: own_part(p.grad) for n, p in block.named_parameters()}})  # type: ignore[arg-type]
    assert_same(*grads)


def test_average_is_swapped_in_and_out_and_methods_compute(mesh: Any) -> None:
    torch.manual_seed(0)
    model = KLVAE(latent_channels=2, width=8, multipliers=[1, 2], blocks=1, norm_groups=4).eval()
    plain = KLVAE(latent_channels=2, width=8, multipliers=[1, 2], blocks=1, norm_groups=4).eval()
    for block in model.repeated_blocks():
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    ema = EMA(model, 0.5, warmup=False)
    first = {k: own_part(v).clone() for k, v in model.state_dict().items()}
    images = LabeledImageData(img=torch.rand(2, 3, 8, 8))
    with torch.no_grad():
        model(images)
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    ema.update(0)
    last = {k: own_part(v).clone() for k, v in model.state_dict().items()}
    plain.load_state_dict({k: torch.lerp(first[k], last[k], 0.5) for k in first})
    with torch.no_grad():
        online = model(images).xs_recon
    for _ in range(2):
        with ema.applied(), gathered(model), torch.no_grad():
            torch.testing.assert_close(model.encode(images).zs, plain.encode(images).zs)
            torch.testing.assert_close(model(images).xs_recon, plain(images).xs_recon)
            torch.testing.assert_close(model.encode(images).zs, plain.encode(images).zs)
        with torch.no_grad():
            assert torch.equal(model(images).xs_recon, online), "the average stayed gathered"
        assert_same({k: own_part(v) for k, v in model.state_dict().items()}, last)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_with_faults_compiled_and_recomputed(precision: str, tmp_path: Path) -> None:
    """Order recompute, compile, shard; rank 1's fault is left out on all ranks; rows as with whole weights.

    In fp16 the scaler takes the decisions, and a fault of the images would stop the run.
    """
    fault = {"class_path": "tests.test_nonfinite.PoisonImages", "init_args": {"steps": [3], "rank": 1}}
    ranks = {"class_path": "tests.observers.RankState", "init_args": {"folder": str(tmp_path / "ranks")}}
    watching = [fault, ranks] if precision == "bf16" else [ranks]
    more = ["--train.precision", precision, "--train.activation_checkpointing", "blocks"]
    more += ["--observers", json.dumps(watching), "--pictures.every", "3 steps"]
    more += ["--train.skip_nonfinite", 1] if precision == "bf16" else []
    split = trained_split("stage2", tmp_path / "split", 2, *more, "--train.compile", "true")
    a, b = of_ranks(tmp_path / "ranks")
    assert a["whole"] == b["whole"]
    code, errors = finish(start(*command("stage2", tmp_path / "data", "--world-size", 2, *more)), timeout=280)
    assert code == 0, errors
    decided = "train/skipped_steps" if precision == "bf16" else "train/loss_scale"
    assert sum(row.get("train/skipped_steps", 0) for row in rows(split)) == (precision == "bf16")
    for x, y in zip(rows(only(tmp_path / "data" / "p")), rows(split), strict=True):
        assert x[decided] == y[decided]
        if x["train/loss_total"] is not None:
            assert y["train/loss_total"] == pytest.approx(x["train/loss_total"], rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["data", "sharded"])
def test_ranks_are_bit_identical_after_fifty_steps(parallel: str, tmp_path: Path) -> None:
    """GAN, two averages, accumulation; parts are compared by what they make up."""
    line = command("stage1_gan", tmp_path, "--train.parallel", parallel, "--train.precision", "fp32")
    line += ["--train.steps", 50, "--world-size", 2, "--checkpoint.every", 50, *observers(tmp_path / "ranks")]
    code, errors = finish(start(*line), timeout=280)
    assert code == 0, errors
    a, b = of_ranks(tmp_path / "ranks")
    assert a["whole"] == b["whole"]
    assert len(a["whole"]) == 6, sorted(a["whole"])
