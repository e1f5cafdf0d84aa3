"""What tracking every convolution and norm of an autoencoder costs: CPU time in the tracker, and whole steps paired.

In the tracker: the CPU time of its hooks, and of these with reading weights and gradients and classifying a snapshot,
over the CPU time of the rest of the steps. Whole steps: one with hooks and one without in turn, median ratio with its
95 % interval; it also has what hooks cost outside of themselves, and the noise of the machine. A probe pass is a
forward more. What imports left is kept from Python's garbage collector, which otherwise charges a walk over it to
whoever makes the next object.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.record import alternate, save
from rqvae.callbacks.channels import ChannelTracker
from rqvae.img_datasets.interfaces import LabeledImageData
from rqvae.models.stage1.untrained_autoencoder_kl import UntrainedAutoencoderKL

LAYERS = ["GroupNorm", "Conv2d"]
HOOKS, REST = ("_observe", "_see_latent"), ("step", "snapshot")


class Training:
    """Steps of an AutoencoderKL of 64, 128 and 128 channels on 4 images of 64 px."""

    def __init__(self, every: int | None, layers: list[str]) -> None:
        torch.manual_seed(0)
        self.model = UntrainedAutoencoderKL(block_out_channels=(64, 128, 128)).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batch = LabeledImageData(img=torch.rand(4, 3, 64, 64))
        self.inside = dict.fromkeys((*HOOKS, *REST), 0.0)
        self.tracker = ChannelTracker(self.model, layers, every) if every else None
        if self.tracker is not None:
            for name in self.inside:
                setattr(self.tracker, name, self._timed(name, getattr(self.tracker, name)))

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.process_time()
            try:
                return call(*arguments)
            finally:
                self.inside[name] += time.process_time() - started

        return timed

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model.compute_loss(self.model(self.batch), self.batch).loss_total.backward()
        self.optimizer.step()
        if self.tracker is not None:
            self.tracker.step()
            if self.tracker.steps % self.tracker.every == 0:
                self.tracker.snapshot()


def cpu_seconds(training: Training, steps: int) -> float:
    """Of `steps` steps."""
    started = time.process_time()
    for _ in range(steps):
        training.step()
    return time.process_time() - started


def shares(every: int, steps: int, layers: list[str]) -> dict[str, float]:
    """CPU time in hooks, and in all of the tracker, over that of the rest of the steps."""
    training = Training(every, layers)
    cpu_seconds(training, 2 * every)  # the first step also looks for what is behind each layer
    training.inside = dict.fromkeys(training.inside, 0.0)
    total = cpu_seconds(training, steps)
    assert training.tracker is not None
    within = sum(training.inside.values())
    hooks = sum(training.inside[name] for name in HOOKS)
    return {
        "layers": len(training.tracker.layers),
        "hooks": round(hooks / (total - within), 4),
        "tracker": round(within / (total - within), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of a share; a multiple of 10")
    parser.add_argument("--pairs", type=int, default=40)
    options = parser.parse_args()
    gc.freeze()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for every in (1, 10):
        figures[f"all_every_{every}"] = shares(every, options.steps, LAYERS)
    figures["norms_every_1"] = shares(1, options.steps, ["GroupNorm"])
    tracked, plain = Training(1, LAYERS), Training(None, LAYERS)
    figures["whole_steps_every_1"] = alternate(tracked.step, plain.step, options.pairs)
    save("channel_tracking", figures)


if __name__ == "__main__":
    main()
