"""Latents of zero mean and unit variance per channel: what a path to unit Gaussian noise assumes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.models.connectors.statistics import channel_axis
from rqvae.models.interfaces import LatentShape, Stage1Encodings, Stage2ModelOutput, base_connector


class ScaleShift(base_connector):
    """(z - mean) / std per channel, and back. The statistics are given here, or estimated over the train split.

    They are float32 buffers of the checkpoint (accelerators without float64 hold them too); until they are known they
    are NaN and any use is refused. Estimating, or loading a checkpoint, is a second source of scale where the
    configuration gives the first, and is refused.

    Args:
        mean: one number per channel; None to estimate.
        std: one number > 0 per channel; None to estimate. Both are given or neither.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, *, mean: list[float] | None = None, std: list[float] | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", None)
        self.register_buffer("std", None)
        self._known = False
        if (mean is None) != (std is None):
            raise BadInput("connector: expected mean and std together or neither, got one of them")
        self._given = mean is not None
        if mean is not None and std is not None:
            self._take(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))

    def forward(self, encodings: Stage1Encodings) -> Stage1Encodings:
        """Normalise (B, C, h, w) or (B, L, C).

        Raises:
            BadInput: statistics that are not known yet.
        """
        mean, std = self._statistics(encodings.zs)
        return replace(encodings, zs=(encodings.zs - mean) / std)

    def reverse(self, encodings: Stage1Encodings | Stage2ModelOutput) -> Stage1Encodings:
        """The inverse of `forward`.

        Raises:
            BadInput: statistics that are not known yet.
        """
        latents = super().reverse(encodings)
        mean, std = self._statistics(latents.zs)
        return replace(latents, zs=latents.zs * std + mean)

    def latent_shape(self, stage1_shape: LatentShape) -> LatentShape:
        """`stage1_shape` itself; from here on the buffers have its number of channels.

        Raises:
            BadInput: given statistics of another length.
        """
        channels = stage1_shape[channel_axis(stage1_shape)]
        if self.mean is None:
            self.mean, self.std = torch.full((channels,), torch.nan), torch.full((channels,), torch.nan)
        if len(self.mean) != channels:
            raise BadInput(f"connector.mean: expected {channels} channels as in the latent, got {len(self.mean)}")
        return stage1_shape

    def needs_statistics(self) -> bool:
        """True until statistics were given, set or loaded."""
        return not self._known

    def set_statistics(self, mean_c: Tensor, std_c: Tensor) -> None:
        """Take estimated statistics, each (C,).

        Raises:
            BadInput: statistics are known already; shapes other than (C,); a std that is not > 0; not finite.
        """
        if self._known:
            source = "the configuration" if self._given else "an estimate or a checkpoint"
            raise BadInput(f"connector: expected one source of scale, got statistics although {source} gives them")
        self._take(mean_c, std_c)

    def _take(self, mean_c: Tensor, std_c: Tensor) -> None:
        if (
            mean_c.ndim != 1
            or mean_c.shape != std_c.shape
            or (self.mean is not None and mean_c.shape != self.mean.shape)
        ):
            expected = "(C,)" if self.mean is None else str(tuple(self.mean.shape))
            raise BadInput(
                f"connector: expected mean and std of shape {expected}, got {tuple(mean_c.shape)} and "
                f"{tuple(std_c.shape)}"
            )
        bad = ~(mean_c.isfinite() & std_c.isfinite() & (std_c > 0))
        if bad.any():
            channels = bad.nonzero().flatten().tolist()
            raise BadInput(
                f"connector.std: expected finite numbers > 0 (mean finite), got others in channels {channels}"
            )
        like = torch.zeros((), dtype=torch.float32) if self.mean is None else self.mean
        self.mean, self.std = mean_c.detach().to(like), std_c.detach().to(like)
        self._known = True

    def _statistics(self, zs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std, shaped to act on `zs`."""
        if not self._known or self.mean is None or self.std is None:
            raise BadInput("connector: expected statistics before use (give mean and std, or estimate them), got none")
        axis = channel_axis(zs.shape[1:])
        if zs.shape[axis] != len(self.mean):
            raise BadInput(f"latent: expected {len(self.mean)} channels, got {tuple(zs.shape)}")
        shape = (-1,) + (1,) * (-1 - axis)
        return self.mean.to(zs.dtype).view(shape), self.std.to(zs.dtype).view(shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load also before `latent_shape` was called, and learn from the values whether they are statistics."""
        loaded = {name: state_dict.get(prefix + name) for name in ("mean", "std")}
        if self._given:
            self._check_same(loaded)
        elif self.mean is None and loaded["mean"] is not None and loaded["std"] is not None:
            self.mean, self.std = torch.empty_like(loaded["mean"]), torch.empty_like(loaded["std"])
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.mean is not None and self.std is not None:
            self._known = bool(self.mean.isfinite().all() & self.std.isfinite().all())

    def _check_same(self, loaded: dict[str, Tensor | None]) -> None:
        for name, value in loaded.items():
            own = getattr(self, name)
            if value is not None and (value.shape != own.shape or not torch.allclose(value.to(own), own, rtol=1e-6)):
                raise BadInput(
                    f"connector.{name}: expected one source of scale, got {own.tolist()} in the configuration "
                    f"and {value.tolist()} in the checkpoint"
                )
