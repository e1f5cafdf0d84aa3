"""MAE-DiT: train, evaluate and diagnose two-stage generative vision models on CPU, CUDA, TPU and HPU.

import rqvae
pipeline = rqvae.load("runs/demo/train/stage2_...")
images = pipeline.sample(16)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rqvae.api import Pipeline, Run, grid, load

__version__ = "0.1.0"
__all__ = ["Pipeline", "Run", "grid", "load"]


def __getattr__(name: str) -> Any:
    """Loaded when asked for: some commands must not import torch."""
    if name in __all__:
        from rqvae import api

        return getattr(api, name)
    raise AttributeError(f"module 'rqvae' has no attribute {name!r}")
