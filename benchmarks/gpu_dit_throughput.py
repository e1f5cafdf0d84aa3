"""Training steps of DiT-B/2 and DiT-XL/2 on a GPU (256 px: latents 4 x 32 x 32; bf16): ours and two peers, in turn.

Images a second and MFU (dense bf16 peak of `rqvae/backends/peaks.py`; 3 x forward, 2 operations a multiply-add; what is
computed again counts nothing). Each model has the same step: labels and noise on the device, forward under autocast,
mean squared error, backward, clipping to 1, fused AdamW, an average of decay 0.9999. Ours is compiled block by block,
and eager; the peers are their own files as they are published, eager, and compiled whole:

    git clone https://github.com/facebookresearch/DiT && git clone https://github.com/hustvl/LightningDiT
    pip install timm fairscale
    python -m benchmarks.gpu_dit_throughput --dit DiT --lightning LightningDiT --batch 64

Without a GPU it says so and ends with exit code 1, as there is nothing to compare.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.record import save
from rqvae import backends
from rqvae.backends import Backend
from rqvae.img_datasets.interfaces import ClassCondition, DataSpec
from rqvae.models.blocks import listed_blocks
from rqvae.models.ema import EMA
from rqvae.models.stage2.dit import DiT

CLASSES, LATENT = 1000, (4, 32, 32)
MULTIPLY_ADDS = {"B": 23.0e9, "XL": 118.6e9}
"""Of one image's forward: depth x (12 N d^2 + 2 N^2 d + 6 d^2) with N = 256 tokens; the paper's table has the same."""
Predict = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def step_of(model: nn.Module, predict: Predict, batch: int, backend: Backend) -> Callable[[], None]:
    """One optimizer step, as the trainer does it; nothing is read from the device."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, average = backend.adamw(params, lr=1e-4), EMA(model, 0.9999, warmup=False)
    x = torch.randn(batch, *LATENT, device=backend.device)
    t, y = torch.rand(batch, device=backend.device), torch.randint(0, CLASSES, (batch,), device=backend.device)

    def step() -> None:
        noise = torch.randn_like(x)
        noisy = torch.lerp(x, noise, t.view(-1, 1, 1, 1))
        with backend.autocast():
            predicted = predict(model, noisy, t, y)
        backend.backward((predicted.float() - (noise - x)).square().mean())
        backend.step(optimizer, params, clip=1.0)
        average.update(0)

    return step


def our_model(size: str, backend: Backend, compiled: bool) -> nn.Module:
    model = DiT(LATENT, DataSpec((3, 256, 256), num_classes=CLASSES), size=size, patch=2)  # type: ignore[arg-type]
    model = model.train().to(backend.device)
    for block in listed_blocks(model) if compiled else ():
        backend.compile(block)
    return model


def peer_model(folder: Path, module: str, table: str, size: str, backend: Backend) -> nn.Module:
    """A model of a checkout, by its own table of names."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        models = getattr(importlib.import_module(module), table)
    finally:
        sys.path.pop(0)
    name = next(key for key in models if key.endswith(f"-{size}/2"))
    if table == "DiT_models" and module == "models":
        return models[name](input_size=32, num_classes=CLASSES, learn_sigma=False).train().to(backend.device)
    # LightningDiT's own options for latents of 4 channels; its head predicts as many channels as it is given
    extra: dict[str, Any] = {"in_channels": 4, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
    return models[name](input_size=32, num_classes=CLASSES, learn_sigma=False, **extra).train().to(backend.device)


def images_per_second(steps: dict[str, Callable[[], None]], batch: int, rounds: int, inner: int) -> dict[str, float]:
    """Median over rounds; in each round every model has `inner` steps, and the order turns."""
    names, rates = list(steps), {name: np.empty(rounds) for name in steps}
    for i in range(-1, rounds):  # the first round warms up and is overwritten
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(inner):
                steps[name]()
            torch.cuda.synchronize()
            rates[name][i] = inner * batch / (time.perf_counter() - started)
    return {name: float(np.median(rate)) for name, rate in rates.items()}


def candidates(size: str, options: argparse.Namespace, backend: Backend) -> dict[str, Callable[[], None]]:
    """The steps that are compared; a peer whose checkout was not named is left out."""

    def ours(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t, ClassCondition(y, CLASSES))

    def theirs(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, 1000 * t, y)

    made: dict[str, tuple[nn.Module, Predict]] = {
        "ours": (our_model(size, backend, compiled=True), ours),
        "ours, eager": (our_model(size, backend, compiled=False), ours),
    }
    peers = {"DiT": (options.dit, "models", "DiT_models"), "LightningDiT": (options.lightning, "models.lightningdit",
             "LightningDiT_models")}  # fmt: skip
    for name, (folder, module, table) in peers.items():
        if folder:
            for forgotten in [key for key in sys.modules if key == "models" or key.startswith("models.")]:
                del sys.modules[forgotten]
            made[name] = (peer_model(folder, module, table, size, backend), theirs)
            made[f"{name}, compiled"] = (torch.compile(peer_model(folder, module, table, size, backend)), theirs)  # type: ignore[assignment]
    return {name: step_of(model, predict, options.batch, backend) for name, (model, predict) in made.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit", type=Path, help="checkout of facebookresearch/DiT")
    parser.add_argument("--lightning", type=Path, help="checkout of hustvl/LightningDiT")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_dit_throughput: needs an NVIDIA GPU and a CUDA build of torch; found none, nothing was measured")
        return 1
    backend = backends.create("cuda", precision="bf16")
    peak = backend.peak_tflops()
    figures: dict[str, Any] = {"device": backend.device_name, "batch": options.batch}
    for size, multiply_adds in MULTIPLY_ADDS.items():
        rates = images_per_second(candidates(size, options, backend), options.batch, options.rounds, options.steps)
        figures[f"DiT-{size}/2"] = {
            name: {
                "images_per_s": round(rate, 1),
                "mfu": round(rate * 6 * multiply_adds / (peak * 1e12), 4) if peak else None,
            }
            for name, rate in rates.items()
        }
        torch.cuda.empty_cache()
    save("gpu_dit_throughput", figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
