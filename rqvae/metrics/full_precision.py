"""Networks of scores compute in float32 as it is, whatever precision the training around them has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 in convolutions (cuDNN's default) or products (the CUDA backend's setting for training).

    TF32 has 10 bits: it changes features in the third digit, and pixels while they are resized by a tenth of a level.
    """
    cudnn, products = torch.backends.cudnn, torch.get_float32_matmul_precision()
    flags = cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, allow_tf32=False)
    with flags, torch.autocast(device.type, enabled=False):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(products)
