"""What is diagnosed: pipelines, autoencoders of diffusers, runs of our own; and the compilers of other devices."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

import rqvae
from rqvae.backends import compilers as devices
from rqvae.commands import diagnose as command
from rqvae.diagnostics import subjects
from rqvae.diagnostics.compilers import TorchCompiler, find_compiler
from rqvae.diagnostics.faults import FaultyCompiler
from rqvae.diagnostics.subjects import PipelineSource, Request, VaeFolder, find_source
from rqvae.errors import BadInput
from rqvae.img_datasets.photos import SkimagePhotos
from rqvae.trainers.vae_diagnostic import DiagnosticSettings, VaeDiagnostic
from tests.conftest import ROOT, finish, only, start
from tests.diagnoses import backend, diagnose, flagged, metrics, save_dc, save_vae, small
from tests.xla_job import environment

needs_xla = pytest.mark.skipif(find_spec("torch_xla") is None, reason="torch_xla is not installed")


# pipelines


def dit_pipeline(calls: list[int]) -> Any:
    """A tiny class-conditional pipeline; `calls` grows with each call of its denoiser."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    transformer.register_forward_hook(lambda *_: calls.append(1))
    pipeline = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_denoiser_runs_once_and_its_latent_is_the_pipelines() -> None:
    """What is decoded is, bit for bit, what the pipeline decodes."""
    calls: list[int] = []
    pipeline = dit_pipeline(calls)
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


def test_a_whole_diagnosis_of_a_pipeline_runs_the_denoiser_once(tmp_path: Path) -> None:
    """So does a second one of the same request, which has the latent; a list of submodules needs none."""
    calls: list[int] = []
    pipeline = dit_pipeline(calls)

    def diagnostic(folder: str, **options: Any) -> VaeDiagnostic:
        settings = DiagnosticSettings(tmp_path / folder, model="tiny", **options)
        return VaeDiagnostic(
            PipelineSource("tiny", lambda: pipeline), Request(steps=2), TorchCompiler("eager"), settings
        )

    units, _, _ = diagnostic("list").list_submodules()
    assert calls == []
    whole = diagnostic("out").execute()
    assert len(calls) == 2
    assert whole["config"]["denoiser_runs"] == 1
    assert len(whole["results"]) == len(units)
    assert {row["status"] for row in whole["results"]} == {"OK", "CONTAINER"}
    diagnostic("out", mode="compile_except", exclude_path="conv_in").execute()
    assert len(calls) == 2


def test_a_folder_of_a_pipeline(cli: Callable[..., int], tmp_path: Path) -> None:
    dit_pipeline([]).save_pretrained(tmp_path / "pipeline", safe_serialization=True)
    options = ["--output", tmp_path / "out", "--device", "cpu", "--backend", "eager", "--test_paths", "conv_in"]
    assert cli("diagnose", *options, "--model_name", tmp_path / "pipeline", "--steps", 2) == 0
    assert metrics(tmp_path / "out")["config"]["subject"] == f"DiTPipeline {tmp_path / 'pipeline'}, 2 steps"


class Prompted:
    """Takes what a pipeline of Stable Diffusion takes, and keeps it."""

    def __init__(self) -> None:
        self.vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
        self.given: dict[str, Any] = {}

    def to(self, _: Any) -> None: ...

    def __call__(
        self, prompt: str, num_inference_steps: int, generator: torch.Generator, num_images_per_prompt: int
    ) -> None:
        self.given = {"prompt": prompt, "steps": num_inference_steps, "images": num_images_per_prompt}
        latent = torch.randn(num_images_per_prompt, 4, 4, 4, generator=generator)
        try:
            self.vae.decode(latent / 0.18215, return_dict=False)
        except Exception:  # noqa: BLE001  (as pipelines do that fall back to tiles)
            raise AssertionError("the decode was reached, and what leaves it was caught") from None


def test_a_pipeline_is_given_the_originals_prompt_and_steps() -> None:
    pipeline = Prompted()
    options = command.parser().parse_args([])
    request = Request(prompt=options.prompt, steps=options.steps, batch_size=2, seed=7)
    subject = PipelineSource("prompted", lambda: pipeline).subject(request)
    assert pipeline.given == {"prompt": "A picture of a dog in a bucket", "steps": 25, "images": 2}
    expected = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(7)) / 0.18215
    assert torch.equal(subject.latent, expected)


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


# autoencoders


def test_an_autoencoder_dc_of_diffusers(tmp_path: Path) -> None:
    """Its blocks are not those of `AutoencoderKL`: each is called and compiled, what is faulty is found in them."""
    save_dc(tmp_path)
    subject = VaeFolder(tmp_path).subject(Request(latent_size=4))
    with torch.no_grad():
        assert subject.decode(subject.latent).shape == (1, 3, 8, 8)
    rows = diagnose(subject, TorchCompiler("eager"))
    compiled = {row["type"] for row in rows.values() if row["status"] == "OK"}
    assert compiled == {
        *("Decoder", "Sequential", "DCUpBlock2d", "ResBlock", "EfficientViTBlock", "GLUMBConv", "RMSNorm"),
        *("SanaMultiscaleLinearAttention", "SanaMultiscaleAttentionProjection", "Conv2d", "Linear", "SiLU", "ReLU"),
    }
    others = {path for path, row in rows.items() if row["status"] != "OK"}
    assert others == {"up_blocks", "up_blocks.1.0.attn.to_qkv_multiscale"}
    assert all(rows[path]["status"] == "CONTAINER" for path in others)
    target = "up_blocks.1.0.attn.to_qkv_multiscale.0.proj_in"
    attention = [path for path in rows if path.startswith("up_blocks.1.0.attn")]
    rows = diagnose(subject, FaultyCompiler([f"{target}:flip"], inner="eager"), paths=attention)
    assert flagged(rows, "culprit") == {target}
    assert rows["up_blocks.1.0.attn"]["role"] == "inherited"


def test_a_run_of_ours_with_its_test_split(cli: Callable[..., int], tmp_path: Path) -> None:
    """The latents are the encodings of the split's first images, and the image is the model's reconstruction."""
    config = ROOT / "configs/debug/stage1.yaml"
    few = ["--train.steps", 1, "--pictures.every", "null", "--online_eval.every", "null", "--checkpoint.every", 1]
    assert cli("train", config, *few, "--save-dir", tmp_path / "runs", "--run-name", "one") == 0
    run = only(tmp_path / "runs" / "rqvae")
    options = ["--output", tmp_path / "out", "--device", "cpu", "--backend", "eager"]
    paths = "mid.0,mid.1,stages.1.1.shortcut"
    assert cli("diagnose", *options, "--model_name", run, "--batch_size", 2, "--test_paths", paths) == 0
    whole = metrics(tmp_path / "out")
    assert [(row["type"], row["status"]) for row in whole["results"]] == [
        ("ResBlock", "OK"),
        ("SpatialAttention", "OK"),
        ("Identity", "EAGER_FALLBACK"),
    ]
    picture = whole["results"][-1]["image"]
    assert picture["status"] == "EAGER_FALLBACK"
    pixels = [(tmp_path / "out" / picture[name]).read_bytes() for name in ("file", "reference")]
    assert pixels[0] == pixels[1], "its decode is the eager one"
    dataset = SkimagePhotos(size=16, patches_per_photo=16, split="test")
    dataset.open()
    images = torch.stack([dataset[i].require_img() for i in range(2)]) / 255
    latent = rqvae.load(run).encode(images)
    found = whole["config"]["latent"]
    assert found["shape"] == list(latent.shape)
    assert found["sha256"] == hashlib.sha256(latent.numpy().tobytes()).hexdigest()


# other devices


class Replayed:
    """In place of Habana's package: notes what was recorded, and wraps `forward` as it does."""

    def __init__(self) -> None:
        self.hpu, self.recorded = self, []

    def wrap_in_hpu_graph(self, module: nn.Module) -> nn.Module:
        self.recorded.append(type(module).__name__)
        return module


def test_hpu_graphs_are_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in: Any = Replayed()
    monkeypatch.setitem(sys.modules, "habana_frameworks.torch", stand_in)
    compiler = find_compiler("rqvae.diagnostics.compilers.HpuGraphCompiler")
    rows = diagnose(small(), compiler)
    assert {row["status"] for row in rows.values()} == {"OK", "CONTAINER"}
    assert all(row["backend_calls"] >= row["calls"] >= 1 for row in rows.values() if row["status"] == "OK")
    assert len(stand_in.recorded) == sum(row["status"] == "OK" for row in rows.values())
    monkeypatch.delenv("PT_HPU_LAZY_MODE", raising=False)
    with pytest.raises(BadInput, match="PT_HPU_LAZY_MODE=1"):
        compiler.check("hpu")
    with pytest.raises(BadInput, match="--device hpu, got cpu"):
        compiler.check("cpu")
    with pytest.raises(BadInput, match="--mode find_breaks: expected a compiler of FX graphs"):
        VaeDiagnostic(
            subjects.RandomDecoder("random-small"),
            Request(),
            compiler,
            DiagnosticSettings(tmp_path, mode="find_breaks"),
        )


def test_on_a_gaudi_device_pipelines_are_those_of_optimum_habana(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Gaudi:
        @staticmethod
        def from_pretrained(source: str, **options: Any) -> str:
            given.update(options, source=source)
            return "a pipeline"

    module: Any = ModuleType("optimum.habana.diffusers")
    module.GaudiStableDiffusionXLPipeline = Gaudi
    monkeypatch.setitem(sys.modules, "optimum.habana.diffusers", module)
    assert devices.needs_gaudi("hpu")
    assert devices.gaudi_pipeline("some/model", "path/to/config.json") == "a pipeline"
    assert (given["source"], given["gaudi_config"], given["use_habana"]) == ("some/model", "path/to/config.json", True)


def test_each_device_has_its_compiler_and_auto_prefers_habanas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original knows hpu_backend alone, on every device."""
    assert devices.DEFAULT_COMPILERS == {"hpu": "hpu_backend", "cpu": "inductor", "cuda": "inductor", "xla": "openxla"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.open_device("auto") == ("cpu", torch.device("cpu"))
    monkeypatch.delenv("PT_HPU_LAZY_MODE", raising=False)
    for name in ("habana_frameworks", "habana_frameworks.torch", "habana_frameworks.torch.core"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    assert devices.open_device("auto") == ("hpu", torch.device("hpu"))
    assert os.environ.pop("PT_HPU_LAZY_MODE") == "0"


@needs_xla
@pytest.mark.slow
def test_openxla_compiles_and_runs_every_module(tmp_path: Path) -> None:
    """On the host's cores: what is called is compiled, run, and right."""
    save_vae(tmp_path / "vae")
    options = ["--device", "xla", "--model_name", tmp_path / "vae", "--latent_size", 4]
    code, errors = finish(start("diagnose", "--output", tmp_path / "out", *options, env=environment()), 250)
    assert code == 0, errors
    whole = metrics(tmp_path / "out")
    assert (whole["config"]["compiler"], whole["config"]["device"]) == ("openxla", "xla:0")
    assert {row["status"] for row in whole["results"]} == {"OK", "CONTAINER"}
    assert all(row["backend_calls"] >= 1 for row in whole["results"] if row["status"] == "OK")
    assert whole["summary"]["plan"]["status"] == "OK"


@needs_xla
@pytest.mark.slow
def test_a_fault_in_front_of_openxla_is_found(tmp_path: Path) -> None:
    save_dc(tmp_path / "vae")
    options = ["--device", "xla", "--model_name", tmp_path / "vae", "--latent_size", 4]
    faulty = ["--backend", backend("up_blocks.1.0.attn.to_out:flip", inner="openxla")]
    paths = ["--test_paths", "up_blocks.1.0.attn,up_blocks.1.0.attn.to_q,up_blocks.1.0.attn.to_out"]
    command = ["diagnose", "--output", tmp_path / "out", *options, *faulty, *paths]
    code, errors = finish(start(*command, env=environment()), 250)
    assert code == 0, errors
    roles = {row["path"]: (row["status"], row["role"]) for row in metrics(tmp_path / "out")["results"]}
    assert list(roles.values()) == [("MISMATCH", "inherited"), ("OK", None), ("MISMATCH", "culprit")]
