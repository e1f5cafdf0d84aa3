"""The compile diagnostic end to end on a tiny Stable Diffusion XL pipeline, against one pipeline call for each unit.

The other procedure is that of optimum-habana's script: for each submodule torch's compiled code is forgotten, the
submodule is compiled, and the whole pipeline runs, denoiser included. It is measured on units drawn at random and
scaled to all of them. The pipeline is diffusers' own with random weights; it needs `transformers` (pip install
'transformers<5').
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from benchmarks.record import save
from benchmarks.vae_diagnostic import Silent
from rqvae.backends.compilers import cpu_seconds
from rqvae.diagnostics.compilers import TorchCompiler
from rqvae.diagnostics.session import Diagnosis
from rqvae.diagnostics.subjects import PipelineSource, Request
from rqvae.diagnostics.units import ROOT

WIDTH, PROMPT = 32, "A picture of a dog in a bucket"


def write_tokenizer(folder: Path) -> Any:
    """A tokenizer whose words are single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(i) for i in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def save_pipeline(folder: Path) -> None:
    """The parts of Stable Diffusion XL at a size that a CPU denoises in seconds, as a folder of diffusers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = write_tokenizer(folder / "words")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=WIDTH, bos_token_id=188, eos_token_id=189, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + WIDTH, cross_attention_dim=2 * WIDTH,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=2, sample_size=64,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet, scheduler=EulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    ).save_pretrained(folder / "pipeline")  # fmt: skip


def ours(folder: Path, compiler: str, steps: int) -> tuple[list[dict[str, Any]], dict[str, Any], float]:
    """Rows of all units, facts and processor seconds, loading included."""
    started = cpu_seconds()
    subject = PipelineSource(str(folder / "pipeline")).subject(Request(steps=steps, prompt=PROMPT))
    with Diagnosis(subject, TorchCompiler(compiler)) as diagnosis:
        paths = [path for path in diagnosis.survey.order if path != ROOT]
        rows = diagnosis.single(paths, {}, "shadow", Silent())
    return rows, subject.facts, cpu_seconds() - started


def one_by_one(folder: Path, compiler: str, steps: int, paths: list[str]) -> float:
    """Processor seconds of a pipeline call for each of these units."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    started = cpu_seconds()
    for path in paths:
        torch._dynamo.reset()
        module = pipeline.vae.decoder.get_submodule(path)
        module.compile(backend=compiler)
        pipeline(PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
        module._compiled_call_impl = None
    return cpu_seconds() - started


def main() -> None:
    """Measure and save."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--compiler", default="inductor")
    options.add_argument("--steps", type=int, default=25)
    options.add_argument("--naive", type=int, default=12, help="units of the other procedure")
    given = options.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_pipeline(folder)
        one_by_one(folder, given.compiler, 1, ["conv_in"])  # the compiler's own warm-up is in neither figure
        rows, facts, seconds = ours(folder, given.compiler, given.steps)
        paths = random.Random(0).sample([row["path"] for row in rows], min(given.naive, len(rows)))
        other = one_by_one(folder, given.compiler, given.steps, paths) * len(rows) / len(paths)
    statuses = [row["status"] for row in rows]
    figures = {
        "units": len(rows),
        "ok": statuses.count("OK"),
        "denoiser_runs": facts["denoiser_runs"],
        "steps": given.steps,
        "cpu_seconds": round(seconds, 1),
        "one_by_one_units_measured": len(paths),
        "one_by_one_cpu_seconds_scaled": round(other, 1),
        "ratio": round(other / seconds, 2),
    }
    save("vae_diagnostic_pipeline", figures)


if __name__ == "__main__":
    main()
