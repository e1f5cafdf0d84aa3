"""Diffusion as pure functions of tensors and callables: paths, laws of training times, solvers, guidance, sampling.

One convention everywhere: t = 0 is data, t = 1 is noise. This room imports no other.
"""

from rqvae.diffusion.guidance import ClassifierFree, Guidance, Velocity
from rqvae.diffusion.paths import LinearFlow, Path, Prediction
from rqvae.diffusion.sampling import Sampler
from rqvae.diffusion.solvers import Denoise, euler, heun
from rqvae.diffusion.timesteps import LogitNormal, Shifted, TimestepLaw, Uniform, sampling_times

__all__ = [
    "ClassifierFree",
    "Denoise",
    "Guidance",
    "LinearFlow",
    "LogitNormal",
    "Path",
    "Prediction",
    "Sampler",
    "Shifted",
    "TimestepLaw",
    "Uniform",
    "Velocity",
    "euler",
    "heun",
    "sampling_times",
]
