"""The compile diagnostic as its command, with two real compilers on three autoencoders: inductor on the host, and XLA's
compiler on torch_xla's device of the host's cores; `AutoencoderKL` and `AutoencoderDC` of diffusers and our KL-VAE.

Every submodule of the decoder is tested, on one image. The autoencoders are small and their weights random, but for a
training step of ours. Nothing is left in inductor's cache from an earlier run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL

from benchmarks.record import save

COMPILERS = {"inductor": "cpu", "openxla": "xla"}
_QUIET = ("--pictures.every", "null", "--online_eval.every", "null")


def write_kl(folder: Path) -> Path:
    """All kinds of modules of an `AutoencoderKL`, in two resolutions."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def write_dc(folder: Path) -> Path:
    """Both kinds of blocks of an `AutoencoderDC`, linear attention of several scales."""
    torch.manual_seed(0)
    AutoencoderDC(
        latent_channels=8, attention_head_dim=8, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), scaling_factor=0.41407,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def write_ours(folder: Path) -> Path:
    """A run of our KL-VAE, one step long."""
    steps = ("--train.steps", "1", "--checkpoint.every", "1", *_QUIET)
    rqvae("train", "configs/debug/stage1.yaml", *steps, "--save-dir", str(folder), "--run-name", "one")
    return next(file.parent for file in sorted(folder.rglob("config.yaml")))


def rqvae(*arguments: str) -> None:
    """Run `python -m rqvae` with one thread."""
    flags = {"PJRT_DEVICE": "CPU", "XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **flags}
    subprocess.run([sys.executable, "-m", "rqvae", *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)


def cpu_seconds() -> float:
    """Processor seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def diagnose(folder: Path, output: Path, compiler: str) -> dict[str, Any]:
    """What one run of the command found."""
    started, cpu_started = time.perf_counter(), cpu_seconds()
    words = ["--model-name", str(folder), "--output", str(output), "--latent-size", "4"]
    rqvae("diagnose", *words, "--backend", compiler, "--device", COMPILERS[compiler])
    metrics = json.loads((output / "metrics" / "metrics.json").read_text())
    rows, summary = metrics["results"], metrics["summary"]
    tested = [row for row in rows if row["status"] == "OK"]
    return {
        "subject": metrics["config"]["subject"].replace(str(folder), folder.name),
        "submodules": len(rows),
        "statuses": dict(Counter(row["status"] for row in rows)),
        "bad": [row["path"] for row in rows if row["role"]],
        "interactions": summary["interactions"],
        "least_backend_calls_of_ok": min((row["backend_calls"] for row in tested), default=None),
        "largest_relative_error": max((row["error_compiled"] for row in tested), default=None),
        "compiled_graphs": summary["compiled_graphs"],
        "decodes": summary["decodes"],
        "plan": summary["plan"]["status"],
        "report_bytes": (output / "report.html").stat().st_size,
        "cpu_seconds": round(cpu_seconds() - cpu_started, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Run and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder for the six reports, to look at; else they go")
    keep = parser.parse_args().keep
    torch.set_num_threads(1)
    figures: dict[str, Any] = {compiler: {} for compiler in COMPILERS}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "cache")
        subjects = {
            "AutoencoderKL": write_kl(work / "kl"),
            "AutoencoderDC": write_dc(work / "dc"),
            "KLVAE": write_ours(work / "runs"),
        }
        for compiler in COMPILERS:
            for name, folder in subjects.items():
                output = (keep or work) / f"{compiler}_{name}"
                figures[compiler][name] = diagnose(folder, output, compiler)
    save("vae_diagnostic_runs", figures)


if __name__ == "__main__":
    main()
