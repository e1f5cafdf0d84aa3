"""The compile diagnostic end to end on a tiny Stable Diffusion XL pipeline, against one pipeline call for each unit.

The other procedure is that of the script that the diagnostic follows (utility_diagnostic/vae/vae_diagnostic.py of
kplau1128/helpers-utilities): for each submodule the decoder is copied, that submodule is compiled, the whole pipeline
runs, denoiser included, and mean and standard deviation of its picture are taken. What was compiled before is forgotten
first, without which that script tests eager code from the ninth version of a class on. Ours is the whole command:
loading, denoising, all verdicts, the decode of all leaves together, the compile plan and its decode, files and page.

The pipeline is diffusers' own, with the denoiser of diffusers' tests (tests/pipelines/stable_diffusion_xl), 25 steps, a
decoder of the shape of Stable Diffusion XL's (four resolutions, 104 submodules) and random weights. It needs
`transformers` (pip install 'transformers<5').
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch._inductor.config
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from benchmarks.record import save
from rqvae.backends.compilers import cpu_seconds
from rqvae.diagnostics.compilers import TorchCompiler
from rqvae.diagnostics.subjects import PipelineSource, Request
from rqvae.diagnostics.units import ROOT
from rqvae.reports.diagnostic_report import write_report
from rqvae.trainers.vae_diagnostic import DiagnosticSettings, VaeDiagnostic

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
        block_out_channels=(8, 16, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, sample_size=256,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet, scheduler=EulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    ).save_pretrained(folder / "pipeline")  # fmt: skip


def load(folder: Path) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(folder: Path, compiler: str, steps: int) -> dict[str, Any]:
    """metrics.json of the whole command, with the processor seconds of all of it."""
    started = cpu_seconds()
    with tempfile.TemporaryDirectory() as output:
        settings = DiagnosticSettings(Path(output), model=str(folder))
        source = PipelineSource(str(folder / "pipeline"), lambda: load(folder))
        request = Request(steps=steps, prompt=PROMPT)
        metrics = VaeDiagnostic(source, request, TorchCompiler(compiler), settings).execute()
        write_report(Path(output), metrics, None, "")
    return {**metrics, "seconds": cpu_seconds() - started}


def one_by_one(folder: Path, compiler: str, steps: int, paths: list[str]) -> float:
    """Processor seconds of a pipeline call for each of these units."""
    started = cpu_seconds()
    pipeline = load(folder)
    original = pipeline.vae.decoder
    for path in paths:
        torch._dynamo.reset()
        pipeline.vae.decoder = copy.deepcopy(original)
        pipeline.vae.decoder.get_submodule(path).compile(backend=compiler)
        (image,) = pipeline(PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)).images
        pixels = np.asarray(image) / 255
        assert np.isfinite([pixels.std(), pixels.mean()]).all()
    return cpu_seconds() - started


def share(folder: Path, steps: int) -> dict[str, float]:
    """Seconds of denoising and of decoding."""
    pipeline = load(folder)
    times: list[float] = []
    decode = pipeline.vae.decode

    def timed(*arguments: Any, **keywords: Any) -> Any:
        times.append(time.process_time())
        output = decode(*arguments, **keywords)
        times.append(time.process_time())
        return output

    pipeline.vae.decode = timed
    for _ in range(2):
        times.clear()
        started = time.process_time()
        pipeline(PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    return {"denoise_seconds": round(times[0] - started, 3), "decode_seconds": round(times[1] - times[0], 3)}


def compare(folder: Path, compiler: str, steps: int, naive: int) -> dict[str, Any]:
    """Figures of one compiler."""
    one_by_one(folder, compiler, 1, ["conv_in"])  # the compiler's own warm-up is in neither figure
    metrics = ours(folder, compiler, steps)
    rows = metrics["results"]
    called = [row["path"] for row in rows if row["path"] != ROOT and row["status"] != "CONTAINER"]
    paths = random.Random(0).sample(called, min(naive, len(called))) if naive else called
    other = one_by_one(folder, compiler, steps, paths) * len(called) / len(paths)
    statuses = [row["status"] for row in rows]
    return {
        "submodules": len(rows) - 1,
        "units": len(called),
        "ok": statuses.count("OK"),
        "compiled_graphs": metrics["summary"]["compiled_graphs"],
        "decodes": metrics["summary"]["decodes"],
        "denoiser_runs": metrics["config"]["denoiser_runs"],
        "cpu_seconds": round(metrics["seconds"], 1),
        "one_by_one_units_measured": len(paths),
        "one_by_one_cpu_seconds": round(other, 1),
        "ratio": round(other / metrics["seconds"], 2),
    }


def main() -> None:
    """Measure and save."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--compilers", nargs="+", default=["eager", "inductor"])
    options.add_argument("--steps", type=int, default=25)
    options.add_argument("--naive", type=int, default=0, help="units of the other procedure, drawn; 0 is all of them")
    given = options.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    figures: dict[str, Any] = {"steps": given.steps}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_pipeline(folder)
        figures |= share(folder, given.steps)
        for compiler in given.compilers:
            figures[compiler] = compare(folder, compiler, given.steps, given.naive)
    save("vae_diagnostic_pipeline", figures)


if __name__ == "__main__":
    main()
