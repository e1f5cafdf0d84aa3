"""MAE-DiT: train, evaluate and diagnose two-stage generative vision models on CPU, CUDA, TPU and HPU."""

__version__ = "0.1.0"
