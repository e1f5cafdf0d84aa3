"""The notebook's face: `rqvae.load(...)` gives a `Pipeline`, `rqvae.Run.load(...).fit()` trains one."""

from __future__ import annotations

from rqvae.api.experiment import Run
from rqvae.api.loading import load
from rqvae.api.pipeline import Pipeline, change_sampler, grid

__all__ = ["Pipeline", "Run", "change_sampler", "grid", "load"]
