"""The commands: one a file, with `parser()`, its options, and `run(arguments) -> exit code`.

A module is imported when its command is asked for: `python -m rqvae --help` loads neither torch nor a model.
"""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "train": "train a Stage1 autoencoder, or a Stage2 generator on its latents",
    "recon": "reconstruct the test split: images, grids, scores",
    "sample": "generate images with a trained Stage2 run",
    "collect": "record game frames with a scripted policy",
    "demo": "record, train both stages, sample, score and report in one go",
}
"""Name and one line of each; command `cache-latents` is in `cache_latents.py`."""
