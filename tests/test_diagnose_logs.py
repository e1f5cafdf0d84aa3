"""What a diagnosis leaves besides its metrics: pictures, TensorBoard and Weights & Biases, read back; and its page."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from rqvae.diagnostics.subjects import Request, VaeFolder
from rqvae.trainers.diagnostic_files import DiagnosticFiles
from rqvae.trainers.vae_diagnostic import without_times
from tests.diagnoses import backend, metrics, options_of, save_vae

FEW = "conv_in,mid_block.resnets.0,mid_block.resnets.0.norm1"


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Options of a diagnosis that takes seconds."""
    save_vae(tmp_path / "vae")
    return options_of(tmp_path / "out", tmp_path / "vae")


def test_tensorboard_has_a_step_for_each_module(cli: Callable[..., int], small: list[str], tmp_path: Path) -> None:
    fault = ["--backend", backend("mid_block.resnets.0.norm1:blank")]
    assert cli("diagnose", *small, *fault, "--test_paths", FEW, "--use_tensorboard") == 0
    rows = {row["path"]: row for row in metrics(tmp_path / "out")["results"]}
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    for path, row in rows.items():
        (mean,) = events.Scalars(f"{path}/mean")
        assert mean.value == pytest.approx(row["image"]["mean"])
        assert {f"{path}/std", f"{path}/blank", f"{path}/duration", f"{path}/status_code"} <= set(tags["scalars"])
        assert f"{path}/status/text_summary" in tags["tensors"]
    steps = [events.Scalars(f"{path}/mean")[0].step for path in rows]
    assert sorted(steps) == list(range(len(rows)))
    (config,) = events.Tensors("config/text_summary")
    assert b"AutoencoderKL in" in config.tensor_proto.string_val[0]


def test_a_mirror_that_fails_changes_no_verdict(
    cli: Callable[..., int], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("the original's step was a text")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    monkeypatch.setattr("wandb.init", fail)
    both = ["--use_tensorboard", "--use_wandb"]
    assert cli("diagnose", *small, "--backend", "eager", "--test_paths", "conv_in", *both) == 0
    whole = metrics(tmp_path / "out")
    assert whole["results"][0]["status"] == "OK"
    assert [error.partition(":")[0] for error in whole["summary"]["logging_errors"]] == ["ValueError"] * 2


def wandb_records(file: Path) -> Iterator[Record]:
    """The records of an offline run: seven bytes, then LevelDB's log format (github.com/google/leveldb,
    doc/log_format.md): blocks of 32 KiB, in which a record is a checksum, a length, a kind (whole, first, middle, last
    part) and data."""
    data, at, parts = file.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def test_wandb_offline(
    cli: Callable[..., int], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = ["--use_wandb", "--wandb_project", "p", "--wandb_run", "r"]
    fault = ["--backend", backend("mid_block.resnets.0.norm1:blank")]
    assert cli("diagnose", *small, *fault, "--test_paths", FEW, *wandb) == 0
    whole = metrics(tmp_path / "out")
    assert whole["summary"]["logging_errors"] == []
    (file,) = (tmp_path / "out" / "logs" / "wandb").rglob("*.wandb")
    records = list(wandb_records(file))
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.project, run.display_name) == ("p", "r")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["subject"], config["seed"]) == (whole["config"]["subject"], 0)
    logged: dict[str, Any] = {}
    for record in (record for record in records if record.HasField("history")):
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        (path,) = {key.rpartition("/")[0] for key in items if not key.startswith("_")}
        values = {key.rpartition("/")[2]: value for key, value in items.items()}
        # a bad unit's picture is decoded afterwards: its values come at a later step
        logged[path] = values | logged.get(path, {"step": record.history.step.num})
    assert logged.keys() == {row["path"] for row in whole["results"]}
    for row in whole["results"]:
        values = logged[row["path"]]
        assert (values["status"], values["blank"]) == (row["status"], float(row["image"]["blank"]))
        assert (values["mean"], values["std"]) == pytest.approx((row["image"]["mean"], row["image"]["std"]))
        assert values["duration"] > 0
    assert sorted(values["step"] for values in logged.values()) == [0, 1, 2]


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path)).astype(int)


def test_pictures_of_every_module(cli: Callable[..., int], small: list[str], tmp_path: Path) -> None:
    """Each with exactly one module compiled, without compiling it again; what is right looks like the reference."""
    fault = ["--backend", backend("mid_block.resnets.0.norm1:blank"), "--test_paths", FEW]
    assert cli("diagnose", *small, *fault) == 0
    graphs = metrics(tmp_path / "out")["summary"]["compiled_graphs"]
    assert cli("diagnose", *small, *fault, "--save_images") == 0
    whole, out = metrics(tmp_path / "out"), tmp_path / "out"
    assert whole["summary"]["compiled_graphs"] == graphs
    rows = {row["path"]: row for row in whole["results"]}
    files = [row["image"][key] for row in rows.values() for key in ("file", "error_map")]
    assert len(set(files)) == 2 * len(rows)
    assert rows["conv_in"]["image"]["file"].endswith("_OK.png")
    reference = pixels(out / whole["config"]["reference"]["file"])
    for path, row in rows.items():
        assert row["image"]["reference"] == whole["config"]["reference"]["file"]
        shown, error = pixels(out / row["image"]["file"]), pixels(out / row["image"]["error_map"])
        off = abs(shown - reference)
        assert (off.max() > 0) == (path != "conv_in"), path
        visible = (error < 255) & (shown > 0) & (shown < 255) & (reference > 0) & (reference < 255)
        assert abs(error - 10 * off)[visible].max() <= 11, path  # both pictures are rounded to 1/255


def test_names_of_pictures_that_differ_in_a_dot_only(tmp_path: Path) -> None:
    """`a.b` and `a_b` are two files."""
    files = DiagnosticFiles(tmp_path)
    image = torch.rand(1, 3, 4, 4)
    named = [
        files.unit_pictures({"index": i, "path": p, "status": "OK"}, image, image) for i, p in enumerate(["a.b", "a_b"])
    ]
    assert len({name for one in named for name in one.values()}) == 4


def test_the_same_seed_gives_the_same_verdicts_and_images(cli: Callable[..., int], tmp_path: Path) -> None:
    save_vae(tmp_path / "vae")
    seen = []
    for name in ("one", "two"):
        fault = ["--backend", backend("mid_block.resnets.0.norm1:noise"), "--test_paths", FEW, "--save_images"]
        assert cli("diagnose", *options_of(tmp_path / name, tmp_path / "vae"), *fault, "--seed", 3) == 0
        images = {file.name: file.read_bytes() for file in (tmp_path / name / "images").iterdir()}
        seen.append((without_times(metrics(tmp_path / name)), images))
    assert len(seen[0][1]) == 7
    assert seen[0] == seen[1]
    used = load_file(tmp_path / "one" / "latent.safetensors")["latent"]
    source = VaeFolder(tmp_path / "vae")
    assert torch.equal(used, source.subject(Request(seed=3, latent_size=4)).latent)
    assert not torch.equal(used, source.subject(Request(seed=4, latent_size=4)).latent)


def test_the_page(cli: Callable[..., int], small: list[str], tmp_path: Path) -> None:
    """Answer, tree, gallery, table, plots, and the difference to another diagnosis."""
    fault = ["--backend", backend("mid_block.resnets.0.norm1:blank"), "--test_paths", FEW]
    assert cli("diagnose", *small, "--backend", "eager", "--test_paths", FEW) == 0
    healthy = tmp_path / "healthy.json"
    (tmp_path / "out" / "metrics" / "metrics.json").rename(healthy)
    assert cli("diagnose", *small, *fault, "--baseline", healthy) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))
    for expected in (
        "what where and how Wrong by themselves mid_block.resnets.0.norm1",
        "Test again without them python -m rqvae diagnose --mode compile_except",
        "units compiled in compile_plan.yaml; the image with it: OK",
        f"Statuses that differ from {healthy}.",
        "mid_block.resnets.0.norm1 compiled",
        "mid_block.resnets.0.norm1 error x10",
        "Cost and gain",
    ):
        assert expected in words, expected
    assert text.count("<img") == 3  # eager, compiled, error map; what inherits the fault is left out
    assert len(re.findall(r'src="(?!data:)', text)) == 0
