"""`python -m rqvae diagnose`: its options, its files, bad input, and how it goes on after it was interrupted."""

from __future__ import annotations

import argparse
import csv
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rqvae.commands import diagnose
from rqvae.diagnostics import subjects
from rqvae.diagnostics.faults import FaultyCompiler
from rqvae.trainers.vae_diagnostic import without_times
from tests.conftest import ROOT, finish, start
from tests.diagnoses import backend, metrics, options_of, save_vae

DEFAULTS = {
    "output": Path("vae_diagnostic_output"),
    "device": "auto",  # the original's is hpu, everywhere; auto is hpu where that is
    "filter": "all",
    "mode": "single",
    "exclude_path": None,
    "test_paths": None,
    "save_images": False,
    "gaudi_config": "Habana/stable-diffusion",
    "use_tensorboard": False,
    "use_wandb": False,
    "wandb_project": "vae_diagnostic",
    "wandb_run": "run_vae_test",
    "list_submodules": False,
}
FEW = "conv_in,mid_block.resnets.0,mid_block.resnets.0.norm1,mid_block.resnets.0.conv1"


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Options of a diagnosis that takes seconds."""
    return options_of(tmp_path / "out")


def test_the_options_of_the_original() -> None:
    """Names and defaults of its table; model_name's default is applied later, to know whether the user gave it."""
    options = vars(diagnose.parser().parse_args([]))
    assert {name: options[name] for name in DEFAULTS} == DEFAULTS
    assert options["model_name"] is None
    assert diagnose._MODEL == subjects.DEFAULT_MODEL == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (options["prompt"], options["steps"]) == ("A picture of a dog in a bucket", 25)
    assert (options["search"], options["blank_std"]) == ("shadow", 1e-4)
    added = {"batch_size", "seed", "prompt", "steps", "backend", "search", "isolate", "resume", "baseline"}
    assert added <= options.keys()


def test_files_of_a_diagnosis_and_the_retest(
    cli: Callable[..., int], small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = ["--backend", backend("mid_block.resnets.0.norm1:blank")]
    assert cli("diagnose", *small, *fault, "--test_paths", FEW) == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    whole = metrics(out)
    assert whole.keys() == {"results", "summary", "config"}
    rows = {row["path"]: row for row in whole["results"]}
    assert {path: (row["status"], row["role"]) for path, row in rows.items()} == {
        "conv_in": ("OK", None),
        "mid_block.resnets.0": ("MISMATCH", "inherited"),
        "mid_block.resnets.0.norm1": ("BLANK", "culprit"),
        "mid_block.resnets.0.conv1": ("OK", None),
    }
    summary = whole["summary"]
    assert (summary["total"], summary["compiled"], summary["failed"], summary["blank"]) == (4, 2, 1, 1)
    assert summary["success_rate"] == 0.5
    assert "RANDOM WEIGHTS" in whole["config"]["subject"]
    assert "RANDOM WEIGHTS" in said
    assert "RANDOM WEIGHTS" in (out / "report.html").read_text()
    bad = rows["mid_block.resnets.0.norm1"]
    for key in ("file", "error_map", "reference"):
        assert (out / bad["image"][key]).is_file()
    assert rows["conv_in"]["image"]["source"] == "reference"
    table = list(csv.DictReader((out / "metrics" / "metrics.csv").open()))
    assert [(line["path"], line["status"]) for line in table] == [(p, r["status"]) for p, r in rows.items()]
    lines = (out / "bad_paths.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["mid_block.resnets.0.norm1"]
    # the retest: bad_paths.txt is read
    assert cli("diagnose", *small, *fault, "--mode", "compile_except") == 0
    assert metrics(out)["results"] == whole["results"]
    sets = metrics(out)["summary"]["compile_except"]
    assert sets.keys() == {"mid_block.resnets.0.norm1"}
    again = {row["path"]: row for row in sets["mid_block.resnets.0.norm1"]["results"]}
    assert {path: row["status"] for path, row in again.items()} == {
        "combined": "OK",
        "excluded.mid_block.resnets.0.norm1": "MISMATCH",
        "interaction": "MISMATCH",
    }
    assert again["excluded.mid_block.resnets.0.norm1"]["role"] == "culprit"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--test_paths", "conv_inn"], "did you mean conv_in"),
        (["--test_paths", " , "], "at least one path"),
        (["--exclude_path", "conv_in"], "--exclude_path: expected with --mode compile_except only"),
        (["--mode", "compile_except"], "found neither"),
        (["--device", "hpu"], "--device hpu: expected Habana's software"),
        (["--device", "tpu"], "--device: expected one of auto, hpu, cpu, cuda, xla"),
        (["--resume"], "--resume: expected"),
        (["--batch_size", "0"], "--batch_size: expected at least 1"),
        (["--baseline", "nowhere.json"], "--baseline"),
        (["--model_name", "./nowhere"], "which does not exist"),
        (["--root", "dekoder", "--model_name", "VAE"], "expected a submodule of AutoencoderKL"),
        (
            ["--root", "conv_in", "--model_name", "VAE", "--filter", "non-leaf"],
            "--filter non-leaf: expected at least one",
        ),
        (["--modle", "x"], "unrecognized arguments: --modle x"),
        (["--filter", "some"], "invalid choice"),
    ],
)
def test_bad_input(
    options: list[str],
    words: str,
    cli: Callable[..., int],
    small: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "VAE" in options:
        save_vae(tmp_path / "vae")
        options = [str(tmp_path / "vae") if o == "VAE" else o for o in options]
    assert cli("diagnose", *small, "--backend", "eager", *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1]
    assert len([line for line in lines if line.startswith("error:")]) == 1


def test_test_paths_make_the_mode_single_and_the_filter_all(
    cli: Callable[..., int], small: list[str], tmp_path: Path
) -> None:
    chosen = ["--test_paths", "conv_in", "--mode", "compile_except", "--filter", "non-leaf"]
    assert cli("diagnose", *small, "--backend", "eager", *chosen) == 0
    whole = metrics(tmp_path / "out")
    assert [row["path"] for row in whole["results"]] == ["conv_in"]
    assert (whole["config"]["mode"], whole["config"]["filter"]) == ("single", "all")


def test_a_baseline_that_is_none_is_noticed_before_anything_runs(
    cli: Callable[..., int], small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text('{"rows": []}')
    assert cli("diagnose", *small, "--backend", "eager", "--baseline", tmp_path / "other.json") == 2
    assert "expected metrics.json of a diagnosis" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_after_ctrl_c_the_rows_stay_and_the_same_command_goes_on(
    cli: Callable[..., int], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*small, "--backend", "eager", "--test_paths", FEW]

    def stop(_: object, path: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(diagnose._Bar, "show", stop)
        assert cli("diagnose", *options) == 130
    journal = (tmp_path / "out" / "journal.jsonl").read_text()
    assert journal.count('"row"') == 2
    assert cli("diagnose", *options) == 0
    lines = (tmp_path / "out" / "journal.jsonl").read_text()
    assert lines.startswith(journal)
    assert [row["status"] for row in metrics(tmp_path / "out")["results"]] == ["OK"] * 4
    assert len(re.findall(r'"begin": "\w', lines)) == 4  # the two that were known are not compiled again


@pytest.mark.slow
def test_killed_and_resumed_it_ends_as_if_nothing_had_been(small: list[str], tmp_path: Path) -> None:
    """kill -9 in the middle; the metrics are those of an undisturbed diagnosis but for times."""
    options = [*small, "--backend", backend("mid_block.resnets.0.norm1:scale"), "--filter", "leaf"]
    process = start("diagnose", *options)
    journal = tmp_path / "out" / "journal.jsonl"
    limit = time.monotonic() + 100
    while time.monotonic() < limit and (not journal.exists() or journal.read_text().count('"row"') < 8):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    known = journal.read_text().count('"row"')
    code, errors = finish(start("diagnose", *options, "--resume"))
    assert code == 0, errors
    resumed = metrics(tmp_path / "out")
    assert known < len(resumed["results"])
    text = journal.read_text()
    assert text.count('"begin": "conv_in"') == 1  # not tested again
    fresh = [str(tmp_path / "other") if o == str(tmp_path / "out") else o for o in options]
    code, errors = finish(start("diagnose", *fresh))
    assert code == 0, errors
    assert without_times(metrics(tmp_path / "other")) == without_times(resumed)


@pytest.mark.slow
def test_a_crash_and_a_hang_are_rows(small: list[str], tmp_path: Path) -> None:
    faults = backend("mid_block.resnets.0.norm1:crash", "mid_block.resnets.0.conv1:hang")
    paths = "conv_in,mid_block.resnets.0.norm1,mid_block.resnets.0.conv1,conv_out"
    isolated = ["--isolate", "process", "--timeout", "10"]
    code, errors = finish(start("diagnose", *small, "--backend", faults, "--test_paths", paths, *isolated), 250)
    assert code == 0, errors
    statuses = {row["path"]: row["status"] for row in metrics(tmp_path / "out")["results"]}
    assert list(statuses.values()) == ["OK", "CRASHED", "TIMEOUT", "OK"]


def test_a_plan_with_cuts_decodes_correctly_in_recon(
    cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """group_norm and interpolate in one graph go blank; with the emitted plan recon's scores are the eager ones."""
    save_vae(tmp_path / "vae")
    together = backend(together=["group_norm", "interpolate"])
    options = ["--output", tmp_path / "out", "--device", "cpu", "--model_name", tmp_path / "vae", "--latent_size", "8"]
    assert cli("diagnose", *options, "--mode", "find_breaks", "--backend", together) == 0
    summary = metrics(tmp_path / "out")["summary"]
    assert [found["paths"] for found in summary["interactions"]] == [["up_blocks.0"]]
    assert [(cut["path"], cut["before"]) for cut in summary["suggested_graph_breaks"]] == [
        ("up_blocks.0", "upsamplers.0")
    ]
    assert summary["plan"]["status"] == "OK"
    config = tmp_path / "config.yaml"
    config.write_text(
        "stage1:\n  class_path: rqvae.models.stage1.diffusers_vae.AutoencoderKLStage1\n"
        f"  init_args: {{source: {tmp_path / 'vae'}}}\n"
    )
    shown: dict[str, dict[str, float]] = {}
    for name, more in {"eager": [], "plan": ["--compile_plan", tmp_path / "out" / "compile_plan.yaml"]}.items():
        torch._dynamo.reset()
        base = [ROOT / "configs/debug/stage1.yaml", config, "--save-dir", tmp_path / "runs", "--run-name", name]
        assert cli("recon", *base, *more) == 0, capsys.readouterr().err
        shown[name] = json.loads((tmp_path / "runs" / name / "metrics.json").read_text())
    assert shown["plan"]["psnr"] == pytest.approx(shown["eager"]["psnr"], abs=1e-3)


def test_this_file_knows_every_argument() -> None:
    """A new option must be in the tests or in the list of additions."""
    names = {a.dest for a in diagnose.parser()._actions if not isinstance(a, argparse._HelpAction)}
    added = {"model_name", "batch_size", "seed", "prompt", "steps", "backend", "search", "isolate", "timeout"}
    added |= {"resume", "baseline", "dtype", "latent_size", "root", "blank_std"}
    assert names == DEFAULTS.keys() | added
    assert FaultyCompiler().name == "faulty aot_eager"
