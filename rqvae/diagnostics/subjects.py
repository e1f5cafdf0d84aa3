"""What is diagnosed: a decoder, a latent, and how the one decodes the other."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rqvae.diagnostics.plan import find_root
from rqvae.diagnostics.survey import Decode
from rqvae.errors import BadInput
from rqvae.randomness import kept

DEFAULT_MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
RANDOM_WIDTHS = {"random-sdxl": (128, 256, 512, 512), "random-small": (8, 8, 16, 16)}
"""Decoders with random weights by name, and their channels at each resolution."""
_SMALL_LATENT = 16


@dataclass(frozen=True)
class Request:
    """How the latent is to be made.

    Args:
        seed: of every random number.
        batch_size: images decoded at once.
        prompt: of a pipeline.
        steps: of a pipeline's denoiser.
        latent_size: height and width of a latent that is drawn at random; 0 takes 16.
        dtype: of the weights; None leaves them as they are.
        device: where to.
        root: name of the decoder within the model.
    """

    seed: int = 0
    batch_size: int = 1
    prompt: str = "A picture of a dog in a bucket"
    steps: int = 25
    latent_size: int = 0
    dtype: torch.dtype | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    root: str = "decoder"


@dataclass
class Subject:
    """A decoder with a latent.

    Args:
        root: the decoder.
        root_name: its path within the model.
        latent: (B, C, h, w), as the model's `decode` takes it.
        decode: latent -> (B, 3, H, W) in [0, 1], not clamped.
        words: what it is, in one line, random weights said plainly.
        facts: what else a reader must know, for the config in metrics.json.
        model: the module whose weights `decode` uses; None is `root`.
    """

    root: nn.Module
    root_name: str
    latent: Tensor
    decode: Callable[[Tensor], Tensor]
    words: str
    facts: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None

    def decoding(self) -> Decode:
        """The decode of the latent, without arguments."""
        return lambda: self.decode(self.latent)

    def describe(self) -> dict[str, Any]:
        """What it is, with the latent's shape and hash."""
        data = self.latent.detach().float().cpu().contiguous().numpy().tobytes()
        kind = str(next(self.root.parameters()).dtype).removeprefix("torch.")
        latent = {"shape": list(self.latent.shape), "sha256": hashlib.sha256(data).hexdigest()}
        return {"subject": self.words, "root": self.root_name, "dtype": kind, "latent": latent, **self.facts}


class LatentSource(Protocol):
    """Where a subject comes from. `latent` is one of an earlier, interrupted call, to be taken instead of a new one."""

    def subject(self, request: Request, latent: Tensor | None = None) -> Subject:
        """The subject, on the request's device."""
        ...


def draw_latent(request: Request, channels: int) -> Tensor:
    """(B, C, h, w) standard normal numbers, a function of the seed, on the request's device."""
    size = request.latent_size or _SMALL_LATENT
    generator = torch.Generator().manual_seed(request.seed)
    latent = torch.randn(request.batch_size, channels, size, size, generator=generator)
    return latent.to(request.device, request.dtype or torch.float32)


class RandomDecoder:
    """A decoder of the shape of Stable Diffusion XL's, or a small one, with random weights.

    Good for finding what a compiler breaks, not for judging pictures: its images are noise.

    Args:
        name: random-sdxl or random-small.
        reason: why it is used, where nobody asked for it.
    """

    def __init__(self, name: str, reason: str = "") -> None:
        self.name, self.reason = name, reason

    def subject(self, request: Request, latent: Tensor | None = None) -> Subject:
        """A fresh decoder; the weights are a function of the seed."""
        from diffusers.models.autoencoders.vae import Decoder

        widths = RANDOM_WIDTHS[self.name]
        with kept():
            torch.manual_seed(request.seed)
            decoder = Decoder(
                in_channels=4,
                out_channels=3,
                up_block_types=("UpDecoderBlock2D",) * len(widths),
                block_out_channels=widths,
                layers_per_block=2 if self.name == "random-sdxl" else 1,
                norm_num_groups=min(32, widths[0] // 2),
            )
        decoder = decoder.eval().requires_grad_(False).to(request.device, request.dtype)
        latent = draw_latent(request, 4) if latent is None else latent
        words = f"{self.name}: a decoder with RANDOM WEIGHTS{f' ({self.reason})' if self.reason else ''}"
        return Subject(decoder, "decoder", latent, lambda z: (decoder(z) + 1) / 2, words, {"random_weights": True})


class VaeFolder:
    """A folder of a diffusers autoencoder, `AutoencoderKL` or `AutoencoderDC`; its latent is drawn at random.

    Args:
        folder: with config.json and safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def subject(self, request: Request, latent: Tensor | None = None) -> Subject:
        """The model with its latent, at the scale that its config states."""
        from diffusers import AutoencoderDC, AutoencoderKL

        from rqvae.models.stage1.diffusers_source import latent_scale, load_model, read_config

        kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}
        name = read_config(self.folder).get("_class_name")
        if name not in kinds:
            raise BadInput(f"--model_name {self.folder}: expected one of {', '.join(kinds)}, got {name}")
        vae = load_model(kinds[name], self.folder).eval().requires_grad_(False).to(request.device, request.dtype)
        channels = int(vae.config["latent_channels"])
        if latent is None:
            latent = draw_latent(request, channels)
            if (scale := latent_scale(dict(vae.config), channels, str(self.folder))) is not None:
                mean, std = (values.to(latent).reshape(1, -1, 1, 1) for values in scale)
                latent = latent * std + mean
        return _of_vae(vae, latent, f"{name} in {self.folder}, latent drawn at random", request.root)


def _of_vae(vae: Any, latent: Tensor, words: str, root: str, facts: dict[str, Any] | None = None) -> Subject:
    path, decoder = find_root(vae, root)

    def decode(z: Tensor) -> Tensor:
        return (vae.decode(z, return_dict=False)[0] + 1) / 2

    return Subject(decoder, path, latent, decode, words, facts or {}, vae)


class _LatentReached(BaseException):
    """Leaves a pipeline in front of its decode; no `except Exception` of its own may stop it."""


class PipelineSource:
    """A diffusers pipeline with a VAE: its denoiser runs once, and what it gives `vae.decode` is the latent.

    Args:
        source: folder or hub id.
        load: makes the pipeline; None is `DiffusionPipeline.from_pretrained`.
    """

    def __init__(self, source: str, load: Callable[[], Any] | None = None) -> None:
        self.source, self._load = source, load

    def subject(self, request: Request, latent: Tensor | None = None) -> Subject:
        """The pipeline's VAE with the latent of the prompt.

        Raises:
            BadInput: a pipeline that cannot be loaded, or one without VAE.
        """
        pipeline = self._load() if self._load else self._from_pretrained(request)
        vae = getattr(pipeline, "vae", None)
        if vae is None:
            raise BadInput(
                f"--model_name {self.source}: expected a pipeline with a VAE, {type(pipeline).__name__} has none"
            )
        pipeline.to(request.device)
        runs = 0
        if latent is None:
            latent, runs = self._denoise(pipeline, request), 1
        vae.eval().requires_grad_(False)
        words = f"{type(pipeline).__name__} {self.source}, {request.steps} steps"
        return _of_vae(vae, latent.to(request.device), words, request.root, {"denoiser_runs": runs})

    def _from_pretrained(self, request: Request) -> Any:
        from diffusers import DiffusionPipeline

        try:
            return DiffusionPipeline.from_pretrained(self.source, torch_dtype=request.dtype or torch.float32)
        except Exception as error:  # noqa: BLE001  (whatever a foreign pipeline's constructor raises)
            reason = " ".join(str(error).split())[:300]
            raise BadInput(
                f"--model_name {self.source}: expected a pipeline diffusers can load, got: {reason}"
            ) from None

    def _denoise(self, pipeline: Any, request: Request) -> Tensor:
        """The latent as the pipeline hands it to its decoder: scale, shift and type are the pipeline's own business."""
        kept: list[Tensor] = []

        def stop(z: Tensor, *_: Any, **__: Any) -> Any:
            kept.append(z.detach())
            raise _LatentReached

        generator = torch.Generator().manual_seed(request.seed)
        given: dict[str, Any] = {"num_inference_steps": request.steps, "generator": generator}
        accepted = inspect.signature(pipeline.__call__).parameters
        if "prompt" in accepted:
            given |= {"prompt": request.prompt, "num_images_per_prompt": request.batch_size}
        elif "class_labels" in accepted:
            given["class_labels"] = [0] * request.batch_size
        elif "batch_size" in accepted:
            given["batch_size"] = request.batch_size
        pipeline.vae.decode = stop
        try:
            pipeline(**given)
        except _LatentReached:
            pass
        finally:
            del pipeline.vae.decode
        if not kept:
            raise BadInput(f"--model_name {self.source}: expected a pipeline that calls its VAE's decode, it did not")
        return kept[0]


def find_source(name: str, explicit: bool, load: Callable[[], Any] | None = None) -> LatentSource | Path:
    """What `--model_name` names; a run of ours is returned as its folder.

    Args:
        name: random-sdxl, random-small, a folder (run, diffusers autoencoder or pipeline), or a hub id of a pipeline.
        explicit: the user gave it; the default gives way to random weights where it cannot be had.
        load: makes a pipeline, see `PipelineSource`.

    Raises:
        BadInput: nothing there.
    """
    if name in RANDOM_WIDTHS:
        return RandomDecoder(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.yaml").exists() or (folder / "meta.json").exists():
            return folder
        if (folder / "model_index.json").exists():
            return PipelineSource(str(folder), load)
        if (folder / "config.json").exists():
            return VaeFolder(folder)
        raise BadInput(
            f"--model_name {name}: expected a run, a diffusers autoencoder or a pipeline, got another folder"
        )
    if folder.is_absolute() or name.startswith((".", "~")):
        raise BadInput(f"--model_name: expected a folder or a hub id, got {name}, which does not exist")
    if (problem := _unreachable(name)) is None:
        return PipelineSource(name, load)
    if explicit:
        raise BadInput(f"--model_name: expected a folder or a hub id that can be had, got {name}: {problem}")
    return RandomDecoder("random-sdxl", f"{name} cannot be had: {problem}")


def _unreachable(name: str) -> str | None:
    """Why a pipeline of the hub cannot be loaded here; None where it can."""
    from huggingface_hub import hf_hub_download

    try:
        index = json.loads(Path(hf_hub_download(name, "model_index.json")).read_text())
    except Exception as error:  # noqa: BLE001  (requests', httpx' and the hub's own errors have no common base)
        return type(error).__name__
    needs = any("transformers" in part for part in index.values() if isinstance(part, list))
    if needs and importlib.util.find_spec("transformers") is None:
        return "the package transformers is not installed"
    return None
