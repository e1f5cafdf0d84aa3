"""Random weights for the FID network, as a file with the names of the published one."""

from __future__ import annotations

from pathlib import Path

import torch

from rqvae.metrics.inception import FIDInception


def write_random_inception(path: Path) -> Path:
    """Of a scale that keeps activations alive, with the statistics of batch norm drawn, too."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in FIDInception().state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        if key.endswith(("running_var", "bn.weight")):
            state[key] = torch.rand(value.shape, generator=generator) + 0.5
        else:
            fan_in = value[0].numel() if value.ndim > 1 else 100
            state[key] = torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5
    torch.save(state, path)
    return path
