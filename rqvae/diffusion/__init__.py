"""Diffusion as pure functions of tensors and callables: paths, laws of training times, solvers, guidance, sampling.

One convention everywhere: t = 0 is data, t = 1 is noise. This room imports no other.
"""

from rqvae.diffusion.denoiser import Denoiser
from rqvae.diffusion.guidance import Autoguidance, ClassifierFree, Guidance, Interval, Predict
from rqvae.diffusion.noise import KeyedNoise
from rqvae.diffusion.paths import LinearFlow, Path, Prediction
from rqvae.diffusion.sampling import Sampler
from rqvae.diffusion.solvers import DDIM, Denoise, EulerMaruyama, dpm_solver_pp_2m, euler, heun, renoise
from rqvae.diffusion.timesteps import LogitNormal, Shifted, TimestepLaw, Uniform, sampling_times
from rqvae.diffusion.vp import VP

__all__ = [
    "DDIM",
    "VP",
    "Autoguidance",
    "ClassifierFree",
    "Denoise",
    "Denoiser",
    "EulerMaruyama",
    "Guidance",
    "Interval",
    "KeyedNoise",
    "LinearFlow",
    "LogitNormal",
    "Path",
    "Predict",
    "Prediction",
    "Sampler",
    "Shifted",
    "TimestepLaw",
    "Uniform",
    "dpm_solver_pp_2m",
    "euler",
    "heun",
    "renoise",
    "sampling_times",
]
