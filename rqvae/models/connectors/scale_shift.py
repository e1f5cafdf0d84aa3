"""Latents of zero mean and unit variance per channel: what a path to unit Gaussian noise assumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.models.connectors.statistics import channel_axis
from rqvae.models.interfaces import LatentShape, Stage1Encodings, Stage2ModelOutput, base_connector

CONFIGURATION, STAGE1 = "the configuration", "Stage1's own config"


class ScaleShift(base_connector):
    """(z - mean) / std per channel, and back.

    The statistics are given here, or come with Stage1 (`Stage1Model.latent_statistics`, for example the scaling_factor
    of a diffusers autoencoder), or are estimated over the train split. They are float32 buffers of the checkpoint
    (accelerators without float64 hold them too); until they are known they are NaN and any use is refused. There is
    one source of scale: a second one is refused, and so is a checkpoint with other values than the first.

    Args:
        mean: one number per channel; None to take Stage1's, or to estimate.
        std: one number > 0 per channel; None to take Stage1's, or to estimate. Both are given or neither.
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
        # Where the scale is from, if neither from an estimate nor from a checkpoint.
        self._given_by: str | None = None
        if mean is not None and std is not None:
            self._given_by = CONFIGURATION
            # On the host, so that their values are checked also where a configuration is tried on meta tensors.
            mean_c, std_c = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (mean, std))
            self._take(mean_c, std_c)

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
            source = self._given_by or "an estimate or a checkpoint"
            raise BadInput(f"connector: expected one source of scale, got statistics although {source} gives them")
        self._take(mean_c, std_c)

    def use_latent_scale(self, mean_c: Tensor, std_c: Tensor) -> None:
        """Take the statistics (C,) that Stage1 comes with. Taking the same ones again changes nothing.

        Raises:
            BadInput: statistics are given in the configuration, or others are known; and as `set_statistics`.
        """
        if self._given_by == CONFIGURATION:
            raise BadInput(
                f"connector.mean, connector.std: expected null, as {STAGE1} gives the scale, got a second source of it"
            )
        if self._known:
            self._check_same({"mean": mean_c, "std": std_c}, self._given_by or "an estimate or a checkpoint", STAGE1)
        self._take(mean_c, std_c)
        self._given_by = STAGE1

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
        if self._given_by is not None:
            self._check_same(loaded, self._given_by, "the checkpoint")
        elif self.mean is None and loaded["mean"] is not None and loaded["std"] is not None:
            self.mean, self.std = torch.empty_like(loaded["mean"]), torch.empty_like(loaded["std"])
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.mean is not None and self.std is not None:
            self._known = bool(self.mean.isfinite().all() & self.std.isfinite().all())

    def _check_same(self, others: Mapping[str, Tensor | None], own_source: str, other_source: str) -> None:
        for name, value in others.items():
            own = getattr(self, name)
            if (
                own.is_meta
            ):  # a configuration is being tried: there are shapes and no values, and `_take` compares those
                continue
            if value is not None and (value.shape != own.shape or not torch.allclose(value.to(own), own, rtol=1e-6)):
                raise BadInput(
                    f"connector.{name}: expected one source of scale, got {own.tolist()} in {own_source} "
                    f"and {value.tolist()} in {other_source}"
                )
