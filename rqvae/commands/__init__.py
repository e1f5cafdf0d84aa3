"""The commands: one a file, with `parser()`, its options, and `run(arguments) -> exit code`.

A module is imported when its command is asked for: `python -m rqvae --help` loads neither torch nor a model.
"""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "train": "train a Stage1 autoencoder, or a Stage2 generator on its latents",
    "recon": "reconstruct the test split: images, grids, scores",
    "evaluate": "score a trained autoencoder on a split: MSE, KL, PSNR, SSIM, samples",
    "sample": "generate images with a trained Stage2 run",
    "ema": "put together an average of another length from a run's snapshots",
    "cache-latents": "write Stage1's latents of a split to disk, for training Stage2 on them",
    "make-reference": "write the reference of FID from a config's own data",
    "export": "write a trained model as a folder that loads anywhere, or that diffusers loads",
    "consolidate": "write a checkpoint of sharded training as one of whole safetensors files",
    "report": "one page on one or several runs: curves, values, pictures, differences",
    "report-channels": "one page on the channels of tracked runs; also `report channels`",
    "health": "judge a training run from its log, of any usual format",
    "diagnose": "find the submodule of a VAE decoder, or the combination, that a compiler breaks",
    "collect": "record game frames with a scripted policy",
    "rollout": "evaluate a world model: one step, rollouts, control, persistence",
    "canvas": "sample an image of any size from a mask of any size, tile by tile",
    "layout": "judge whether a generator on masks puts each class where its mask says",
    "convert-config": "turn a config of DiffInfinite's image model into one of ours",
    "selfcheck": "check that a backend works on this machine",
    "play": "play inside a world model in the browser",
    "demo": "record, train both stages, sample, score and report in one go",
}
"""Name and one line of each; command `cache-latents` is in `cache_latents.py`."""
