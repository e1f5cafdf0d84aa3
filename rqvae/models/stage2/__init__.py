"""Generators of latents. A new one is one file and one `class_path`."""

from rqvae.models.stage2.diffusion import LatentDiffusion
from rqvae.models.stage2.dit import DiT

__all__ = ["DiT", "LatentDiffusion"]
