"""`python -m rqvae diagnose`: its options, its files, bad input, and how it goes on after it was interrupted."""

from __future__ import annotations

import argparse
import csv
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rqvae.commands import diagnose
from rqvae.diagnostics import subjects
from rqvae.diagnostics.faults import FaultyCompiler
from rqvae.diagnostics.subjects import PipelineSource, Request, find_source
from rqvae.errors import BadInput
from rqvae.trainers.vae_diagnostic import without_times
from tests.conftest import ROOT, finish, start

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


def backend(*faults: str, **options: Any) -> str:
    """--backend with faults."""
    arguments = {"faults": list(faults), "inner": "eager", **options}
    return json.dumps({"class_path": "rqvae.diagnostics.faults.FaultyCompiler", "init_args": arguments})


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Options of a diagnosis that takes seconds."""
    return ["--output", str(tmp_path / "out"), "--device", "cpu", "--model_name", "random-small", "--latent_size", "4"]


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics" / "metrics.json").read_text())


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


EXAMPLES = [
    "--device hpu --filter all --mode single",
    '--device hpu --save_images --model_name "custom/model/path"',
    '--mode compile_except --exclude_path "path.to.submodule" --gaudi_config "path/to/config.json"',
    "--use_tensorboard",
    '--use_wandb --wandb_project "my_project" --wandb_run "test_run"',
    "--list_submodules",
    '--test_paths "path/to/paths.txt"',
    '--test_paths "path1,path2,path3"',
    '--mode compile_except --exclude_path "path1,path2,path3"',
    "--device hpu --filter all --mode single --save_images",
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_original(
    example: str, cli: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, but for the device, and with places that exist in place of `path.to.submodule` and the like."""
    (tmp_path / "paths.txt").write_text("# of an example\nconv_in\n\nmid_block.resnets.0.norm1\n")
    save_vae(tmp_path / "custom")
    known = {
        "hpu": "cpu",
        "custom/model/path": str(tmp_path / "custom"),
        "path.to.submodule": "mid_block.resnets.0",
        "path/to/config.json": "config.json",
        "path/to/paths.txt": str(tmp_path / "paths.txt"),
        "path1,path2,path3": "conv_in,mid_block,conv_out",
    }
    words = [known.get(word, word) for word in shlex.split(example)]
    monkeypatch.setattr(diagnose, "_MODEL", "random-small")
    extra = ["--device", "cpu", "--output", tmp_path / "out", "--backend", "eager", "--latent_size", "4"]
    if "--filter" not in words and "--test_paths" not in words and "compile_except" not in words:
        extra += ["--filter", "leaf"]
    assert cli("diagnose", *extra, *words) == 0
    listed = (tmp_path / "out" / "submodules" / "submodule_list.txt").read_text()
    assert "mid_block.resnets.0: ResnetBlock2D" in listed
    assert (tmp_path / "out" / "metrics" / "metrics.json").exists() != ("--list_submodules" in words)


def save_vae(folder: Path) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae.save_pretrained(folder, safe_serialization=True)
    return vae


def test_files_of_a_diagnosis_and_the_retest(
    cli: Callable[..., int], small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = ["--backend", backend("mid_block.resnets.0.norm1:blank")]
    assert cli("diagnose", *small, *fault, "--test_paths", FEW, "--use_tensorboard") == 0
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
    check_tensorboard(out / "logs" / "tensorboard", rows)
    # the retest: bad_paths.txt is read
    assert cli("diagnose", *small, *fault, "--mode", "compile_except") == 0
    again = {row["path"]: row for row in metrics(out)["results"]}
    assert {path: row["status"] for path, row in again.items()} == {
        "combined": "OK",
        "excluded.mid_block.resnets.0.norm1": "MISMATCH",
        "interaction": "MISMATCH",
    }
    assert again["excluded.mid_block.resnets.0.norm1"]["role"] == "culprit"
    assert metrics(out)["summary"]["compile_except"].keys() == {"mid_block.resnets.0.norm1"}


def check_tensorboard(folder: Path, rows: dict[str, Any]) -> None:
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    for path, row in rows.items():
        (mean,) = events.Scalars(f"{path}/mean")
        assert mean.value == pytest.approx(row["image"]["mean"])
        assert {f"{path}/std", f"{path}/blank", f"{path}/duration", f"{path}/status_code"} <= set(tags["scalars"])
        assert f"{path}/status/text_summary" in tags["tensors"]
    steps = [events.Scalars(f"{path}/mean")[0].step for path in rows]
    assert sorted(steps) == list(range(len(rows)))
    assert "config/text_summary" in tags["tensors"]


def test_a_mirror_that_fails_changes_no_verdict(
    cli: Callable[..., int], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("the original's step was a text")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    assert cli("diagnose", *small, "--backend", "eager", "--test_paths", "conv_in", "--use_tensorboard") == 0
    whole = metrics(tmp_path / "out")
    assert whole["results"][0]["status"] == "OK"
    assert "ValueError" in whole["summary"]["logging_errors"][0]


def test_wandb_offline(
    cli: Callable[..., int], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = ["--use_wandb", "--wandb_project", "p", "--wandb_run", "r"]
    assert cli("diagnose", *small, "--backend", "eager", "--test_paths", "conv_in", *wandb) == 0
    assert metrics(tmp_path / "out")["summary"]["logging_errors"] == []
    (file,) = (tmp_path / "out" / "logs" / "wandb").rglob("*.wandb")
    data = file.read_bytes()
    for text in (b"conv_in/mean", b"conv_in/std", b"conv_in/blank", b"conv_in/status", b"vae_diagnostic_output"[:3]):
        assert text in data or text == b"vae"


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


def test_the_denoiser_runs_once_and_its_latent_is_the_pipelines() -> None:
    """A tiny class-conditional pipeline: what is decoded is, bit for bit, what the pipeline decodes."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    calls: list[int] = []
    transformer.register_forward_hook(lambda *_: calls.append(1))
    pipeline = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    source = PipelineSource("tiny", lambda: pipeline)
    request = Request(steps=3, seed=5)
    subject = source.subject(request)
    assert len(calls) == 3
    expected = pipeline([0], num_inference_steps=3, generator=torch.Generator().manual_seed(5), output_type="np")
    with torch.no_grad():
        image = subject.decode(subject.latent).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert (image == expected.images).all()
    again = source.subject(request, subject.latent)
    assert len(calls) == 6
    assert again.facts["denoiser_runs"] == 0


def test_a_pipeline_without_vae() -> None:
    class Bare:
        pass

    with pytest.raises(BadInput, match="expected a pipeline with a VAE, Bare has none"):
        PipelineSource("bare", Bare).subject(Request())


def test_the_default_gives_way_to_random_weights_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "_unreachable", lambda _: "no network")
    source = find_source(subjects.DEFAULT_MODEL, explicit=False)
    assert isinstance(source, subjects.RandomDecoder)
    assert "no network" in source.reason
    with pytest.raises(BadInput, match="no network"):
        find_source(subjects.DEFAULT_MODEL, explicit=True)


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


def commands_of_the_page() -> Iterator[str]:
    page = ROOT / "docs" / "vae_diagnostic.md"
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        yield from (line for line in block.splitlines() if line.startswith("python -m rqvae diagnose"))


@pytest.mark.parametrize("command", list(commands_of_the_page()) if (ROOT / "docs/vae_diagnostic.md").exists() else [])
def test_the_commands_of_the_page(
    command: str, cli: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights, without a compiler's seconds, in a folder of its own; placeholders get a value."""
    (tmp_path / "bad_paths.txt").write_text("conv_in\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diagnose, "_MODEL", "random-small")
    save_vae(tmp_path / "VAE")
    (tmp_path / "vae_diagnostic_output").mkdir()
    (tmp_path / "vae_diagnostic_output" / "bad_paths.txt").write_text("conv_in\n")
    words = shlex.split(command)[4:]
    for name, value in (("--isolate", None), ("--baseline", None), ("--resume", None)):
        assert value is None
        if name in words:
            pytest.skip(f"{name} has a test of its own")
    extra = ["--backend", "eager", "--device", "cpu", "--latent_size", "4"]
    if not {"--test_paths", "--list_submodules", "compile_except"} & set(words):
        extra += ["--test_paths", "conv_in,mid_block.resnets.0"]
    assert cli("diagnose", *words, *extra) == 0


def test_this_file_knows_every_argument() -> None:
    """A new option must be in the tests or in the list of additions."""
    names = {a.dest for a in diagnose.parser()._actions if not isinstance(a, argparse._HelpAction)}
    added = {"model_name", "batch_size", "seed", "prompt", "steps", "backend", "search", "isolate", "timeout"}
    added |= {"resume", "baseline", "dtype", "latent_size", "root", "blank_std"}
    assert names == DEFAULTS.keys() | added
    assert FaultyCompiler().name == "faulty aot_eager"
