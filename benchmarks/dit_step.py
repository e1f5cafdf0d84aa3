"""A training step of DiT-S/2 (fp32, batch 8, latents 4 x 32 x 32): ours against facebookresearch/DiT's own models.py.

The peer is read from a checkout that you name; it needs `timm`, which is not a dependency of this project:

    git clone https://github.com/facebookresearch/DiT && pip install timm
    python -m benchmarks.dit_step --peer DiT
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.record import alternate, save
from rqvae.img_datasets.interfaces import ClassCondition, DataSpec
from rqvae.models.stage2.dit import DiT

BATCH, CLASSES = 8, 1000


def step_of(model: nn.Module, predict: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """Forward, mean squared error, backward, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 4, 32, 32, generator=generator)
    t, y = torch.rand(BATCH, generator=generator), torch.randint(0, CLASSES, (BATCH,), generator=generator)

    def step() -> None:
        loss = (predict(x, t, y) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_model(folder: Path) -> nn.Module:
    """DiT-S/2 of the checkout, predicting as many channels as ours."""
    spec = importlib.util.spec_from_file_location("peer_models", folder / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer_models"] = module
    spec.loader.exec_module(module)
    return module.DiT_models["DiT-S/2"](input_size=32, num_classes=CLASSES, learn_sigma=False).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of facebookresearch/DiT")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ours = DiT((4, 32, 32), DataSpec((3, 256, 256), num_classes=CLASSES), size="S", patch=2).train()
    peer = peer_model(options.peer)
    counts = {
        name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in (("ours", ours), ("peer", peer))
    }
    figures = alternate(
        step_of(ours, lambda x, t, y: ours(x, t, ClassCondition(y, CLASSES))),
        # label dropout is part of the peer's training forward, as dropping conditions is of ours outside the backbone
        step_of(peer, lambda x, t, y: peer(x, 1000 * t, y)),
        options.pairs,
    )
    save("dit_step", {**figures, "parameters": counts})


if __name__ == "__main__":
    main()
