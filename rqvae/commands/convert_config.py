"""Turn a config of DiffInfinite's image model (sections `unet` and `dm`) into one of ours."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rqvae.commands.options import Parser
from rqvae.errors import BadInput
from rqvae.files import write_whole

LATENT_CHANNELS, DISCRETE_TIMES = 4, 1000
UNET = {
    "image_size": 512,
    "dim": 256,
    "num_classes": 10,
    "dim_mults": [1, 2, 4],
    "channels": 4,
    "resnet_block_groups": 2,
    "block_per_layer": 2,
}
DM: dict[str, Any] = {
    "data_folder": None,
    "timesteps": 1000,
    "sampling_timesteps": 250,
    "batch_size": 32,
    "lr": 1e-4,
    "train_num_steps": 250_000,
    "save_sample_every": 25_000,
    "gradient_accumulate_every": 1,
    "save_milestone_every": None,
    "save_loss_every": 100,
    "num_samples": 4,
    "num_workers": 32,
    "results_folder": "./results/run_name",
    "milestone": None,
    "extra_data_path": None,
    "debug": False,
}
"""Keys and defaults of the original's `train.py`; of what has no default there, ours."""

NOTE = """\
# Written by `python -m rqvae convert-config` from {source}.
# What differs from the original on purpose: the latent's scale has an inverse, images reach the autoencoder in [-1, 1],
# no mask is dropped but by p_cond, images are in one split only, sampling starts at time 0.999, num_workers is heard.
"""


def parser() -> Parser:
    """The options of this command."""
    own = Parser(
        "rqvae convert-config",
        description=__doc__,
        epilog="A key that is not known, or whose meaning is gone, is refused with what took its place.",
    )
    own.add_argument("source", type=Path, metavar="DM.yaml", help="the original's config")
    own.add_argument("out", type=Path, metavar="OUT.yaml", help="file to write")
    own.add_argument("--legacy", action="store_true", help="as legacy: true in DM.yaml: the original network")
    own.add_argument("--vae", default="stabilityai/sd-vae-ft-mse", help="folder or hub id of the autoencoder")
    return own


def run(arguments: Sequence[str]) -> int:
    """Turn a config of DiffInfinite's image model into one of ours, and say how to train it."""
    options = parser().parse_args(list(arguments))
    unet, dm, legacy = read_original(options.source)
    converted = convert(unet, dm, legacy=legacy or options.legacy, vae=options.vae)
    if options.out.exists():
        raise BadInput(f"{options.out}: expected a new file, got one that exists")
    try:
        text = NOTE.format(source=options.source.name) + yaml.safe_dump(converted, sort_keys=False)
        write_whole(options.out, text)
    except OSError as error:
        raise BadInput(f"{options.out}: expected a place that can be written, got {error.strerror}") from error
    folder = Path(dm["results_folder"])
    command = ["python", "-m", "rqvae", "train", options.out, "--save-dir", folder.parent, "--project", folder.name]
    sys.stdout.write(f"{options.out} is written; results_folder is now an option:\n{shlex.join(map(str, command))}\n")
    return 0


def read_original(path: Path) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Sections `unet` and `dm`, checked, with their defaults filled in, and `legacy`, which may stand beside them.

    Raises:
        BadInput: no such file, not such a config, a key that is not known, or a value that has no meaning here.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{path}: expected a YAML file, got {type(error).__name__}: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(part), dict) for part in ("unet", "dm")):
        raise BadInput(f"{path}: expected the sections unet and dm, got {_short(content)}")
    if others := content.keys() - {"unet", "dm", "legacy"}:
        raise BadInput(f"{path}: expected the sections unet and dm, and legacy, alone, got {sorted(others)[0]}")
    legacy = content.get("legacy", False)
    if not isinstance(legacy, bool):
        raise BadInput(f"{path}: legacy: expected true or false, got {legacy!r}")
    unet, dm = _filled(path, "unet", content["unet"], UNET), _filled(path, "dm", content["dm"], DM)
    if isinstance(unet["dim_mults"], str):
        unet["dim_mults"] = [int(part) if part.isdigit() else part for part in unet["dim_mults"].split()]
    _check(path, {"unet": unet, "dm": dm})
    return unet, dm, legacy


def convert(unet: Mapping[str, Any], dm: Mapping[str, Any], *, legacy: bool, vae: str) -> dict[str, Any]:
    """Our config of a checked one.

    Args:
        unet: of `read_original`.
        dm: the same.
        legacy: with `LegacyUNet` in place of `UNet`.
        vae: `source` of the autoencoder.
    """
    sizes = {"width": unet["dim"], "multipliers": unet["dim_mults"], "blocks": unet["block_per_layer"]}
    sizes["norm_groups"] = unet["resnet_block_groups"]
    levels = list(range(len(unet["dim_mults"])))
    network = (
        _part("rqvae.models.stage2.legacy_unet.LegacyUNet", **sizes)
        if legacy
        else _part("rqvae.models.stage2.unet.UNet", **sizes, attention=levels[1:], dropout=0.05)
    )
    sampler = {
        "solver": _part("rqvae.diffusion.solvers.DDIM", eta=1.0),
        "steps": dm["sampling_timesteps"],
        "start": 0.999,
        "guidance": _part("rqvae.diffusion.guidance.ClassifierFree", scale=3.0),
    }
    return {
        "data": {
            "dataset": _part(
                "rqvae.img_datasets.pathology.Pathology",
                data_folder=dm["data_folder"],
                unlabelled=dm["extra_data_path"],
                size=unet["image_size"],
                num_classes=unet["num_classes"],
                p_cond=0.5,
            ),
            "train_transform": _part("rqvae.img_datasets.transforms.DihedralTransform"),
            "batch_size": dm["batch_size"] * dm["gradient_accumulate_every"],
            "workers": dm["num_workers"],
        },
        "stage1": _part("rqvae.models.stage1.diffusers_vae.AutoencoderKLStage1", source=vae),
        "connector": _part("rqvae.models.connectors.scale_shift.ScaleShift"),
        "stage2": _part(
            "rqvae.models.stage2.diffusion.LatentDiffusion",
            backbone=network,
            path=_part("rqvae.diffusion.vp.VP", law="cosine"),
            prediction="eps",
            weighting=_part("rqvae.diffusion.weighting.P2", gamma=0.0, k=1.0),
            drop_condition=0.0,
            sampler=sampler,
        ),
        **_training(dm),
    }


def _training(dm: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that say how long, how fast and what is written."""
    milestone = dm["save_milestone_every"] or dm["save_sample_every"]
    return {
        "updates": {
            "generator": {
                "lr": dm["lr"],
                "betas": [0.9, 0.99],
                "clip": 1.0,
                "schedule": _part("rqvae.trainers.schedules.OneCycle"),
            }
        },
        "train": {
            "steps": dm["train_num_steps"],
            "accumulate": dm["gradient_accumulate_every"],
            "log_every": dm["save_loss_every"],
        },
        "ema": {"decays": [0.995], "every": 10},
        "checkpoint": {"every": milestone, "keep_every": milestone},
        "pictures": {"every": f"{dm['save_sample_every']} steps", "images": dm["num_samples"]},
        "debug": dm["debug"],
    }


def _part(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, **({"init_args": arguments} if arguments else {})}


def _filled(path: Path, section: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    for key in given:
        if key not in defaults:
            near = difflib.get_close_matches(str(key), defaults, n=1) or sorted(defaults)
            raise BadInput(f"{path}: {section}.{key}: expected a key of the original ({', '.join(near)}), got {key}")
    return {**defaults, **given}


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _check(path: Path, sections: Mapping[str, Mapping[str, Any]]) -> None:
    """That every value is of its kind, and means something here."""
    for section, values in sections.items():
        for key, value in values.items():
            fits, expected = KINDS.get(key, COUNT)
            if not fits(value):
                raise BadInput(f"{path}: {section}.{key}: expected {expected}, got {value!r}")


Kind = tuple[Callable[[Any], bool], str]
COUNT: Kind = (_whole(1), "an integer >= 1")
KINDS: dict[str, Kind] = {
    "dim_mults": (lambda v: isinstance(v, list) and bool(v) and all(map(_whole(1), v)), "integers >= 1"),
    "channels": (lambda v: v == LATENT_CHANNELS, "4 (it is now the latent of stage1)"),
    "data_folder": (lambda v: isinstance(v, str), "a folder"),
    "timesteps": (lambda v: v == DISCRETE_TIMES, "1000 (times are continuous now: stage2.path)"),
    "lr": (_number, "a number > 0"),
    "save_milestone_every": (lambda v: v is None or _whole(1)(v), "an integer >= 1 or null"),
    "num_workers": (_whole(0), "an integer >= 0"),
    "results_folder": (lambda v: isinstance(v, str), "a folder"),
    "milestone": (lambda v: v in (None, 0), "null (it is now `train --resume-ckpt RUN`, of runs of this program)"),
    "extra_data_path": (lambda v: v is None or isinstance(v, str), "a folder or null"),
    "debug": (lambda v: isinstance(v, bool), "true or false"),
}


def _short(content: object) -> str:
    return ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
