"""Exponential moving averages of weights, in fp32 (fp64 where the weights are), kept beside the uncompiled module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.shards import is_sharded, own_part


class EMA:
    """One running average of a module's weights: `average = lerp(average, weights, 1 - decay)` after each step.

    With `warmup` the decay of step n is min(decay, (1 + n) / (10 + n)), as `tf.train.ExponentialMovingAverage` with
    `num_updates`: without it, a run shorter than 1 / (1 - decay) steps evaluates mostly its random start.

    Args:
        module: the uncompiled module; its parameters and floating-point buffers are followed.
        decay: in [0, 1).
        warmup: see above.
        every: steps between two updates; the decay, and n of the warm-up, count updates.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = True, every: int = 1) -> None:
        if not 0 <= decay < 1:
            raise BadInput(f"ema.decays: expected numbers in [0, 1), got {decay}")
        self.decay, self.warmup, self.every = decay, warmup, every
        self.followed = {k: v for k, v in module.state_dict(keep_vars=True).items() if v.is_floating_point()}
        # fp32 whatever the weights are computed in: in bf16 an average of decay 0.999 stalls at 0.25, not 0.95.
        self.average = {
            k: v.detach().to(torch.promote_types(v.dtype, torch.float32)).clone() for k, v in self.followed.items()
        }

    @property
    def name(self) -> str:
        """The name in checkpoints and logs, for example `ema_0.999`."""
        return f"ema_{self.decay:g}"

    def share(self, step: int) -> float:
        """What the weights after optimizer step `step` (0 is the first) count in the average, in (0, 1]."""
        update = step // self.every
        return 1 - (min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay)

    @torch.no_grad()
    def update(self, step: int, applied: Tensor | None = None) -> None:
        """Follow the weights after optimizer step `step`.

        Args:
            step: 0 is the first.
            applied: scalar bool on the device: whether the step changed the weights; where not, the average stays too.
        """
        if (step + 1) % self.every:
            return
        # of split weights each process averages its own part
        averages = [own_part(a) for a in self.average.values()]
        weights = [own_part(v) for v in self.followed.values()]
        if any(a.dtype != w.dtype for a, w in zip(averages, weights, strict=True)):
            weights = [w.to(a.dtype) for a, w in zip(averages, weights, strict=True)]
        if applied is not None:
            # lerp from a to a is a, bit for bit; a share of 0 would need it on the host
            weights = [torch.where(applied, w, a) for a, w in zip(averages, weights, strict=True)]
        torch._foreach_lerp_(averages, weights, self.share(step))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The module computes with the average inside this context, and with its own weights again after it."""
        split = {k: own_part(v) for k, v in self.followed.items() if is_sharded(v)}
        plain = {k: v for k, v in self.followed.items() if k not in split}
        own, own_parts = {k: v.data for k, v in plain.items()}, {k: v.clone() for k, v in split.items()}
        for key, value in plain.items():
            value.data = self.average[key].to(value.dtype)
        for key, part in split.items():  # the memory from which they are gathered, which `data` does not replace
            part.copy_(own_part(self.average[key]))
        try:
            yield
        finally:
            for key, value in plain.items():
                value.data = own[key]
            for key, part in split.items():
                part.copy_(own_parts[key])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, by the module's own names."""
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the averages of a checkpoint."""
        for key, value in self.average.items():
            value.copy_(state[key])
