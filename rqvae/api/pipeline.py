"""A trained model as a notebook sees it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from rqvae import backends
from rqvae.api import exported, sources
from rqvae.api.card import write_card
from rqvae.diffusion.guidance import ClassifierFree
from rqvae.diffusion.sampling import Sampler
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import Condition, DataSpec, LabeledImageData, Stage1Encodings
from rqvae.metrics.grids import image_grid
from rqvae.models.interfaces import Stage1Model
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import generator
from rqvae.trainers.evaluation_trainer import as_pictures, reconstruct
from rqvae.trainers.generate import condition_of, noise_of


@dataclass
class Pipeline:
    """A trained model. Images are float (n, 3, H, W) in [0, 1]; results are on the pipeline's device.

    Args:
        spec: shapes and classes of the data it was trained on.
        stage1: the autoencoder.
        two_stage: autoencoder, connector and generator; None for a Stage1 run.
        description: what `save_pretrained` writes besides weights; None where the pipeline was put together by hand.
        device: where the parts are.
        nfe: function evaluations of each image of the last `sample`; None before it.
    """

    spec: DataSpec
    stage1: Stage1Model
    two_stage: TwoStage | None = None
    description: exported.Description | None = None
    device: torch.device = torch.device("cpu")
    nfe: int | None = field(default=None, init=False)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, device: str | None = None) -> Pipeline:
        """The same as `rqvae.load`."""
        from rqvae.api.loading import load  # it makes pipelines

        return load(source, revision=revision, device=device)

    def to(self, backend: str) -> Self:
        """Move the parts to the device of a backend of this process.

        Args:
            backend: cpu, cuda or auto, as the commands' --backend.

        Raises:
            BadInput: no such backend, or no such device here.
        """
        self.device = backends.create(backend).device
        self.stage1.to(self.device)
        if self.two_stage is not None:
            self.two_stage.to(self.device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Stage1's latents (n, C, h, w) of images, without noise."""
        return self.stage1.encode(LabeledImageData(img=images.to(self.device))).zs

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of Stage1's latents (n, C, h, w)."""
        encodings = Stage1Encodings(latents.to(self.device))
        return self.stage1.get_recon_imgs(self.stage1.decode(encodings).xs_recon)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images through Stage1 and back."""
        return reconstruct(self.stage1, images.to(self.device))

    def sample(
        self,
        n: int,
        condition: Condition | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        solver: Any = None,
        seed: int = 0,
    ) -> Tensor:
        """Generate n images; image i is a function of (seed, i). `nfe` is then the function evaluations of each.

        Args:
            n: how many, at least 1.
            condition: of length n; None draws classes or actions from the seed where the model has them.
            steps: solver steps; None is the model's own.
            guidance: scale of the model's own kind of guidance, classifier-free where it has none; None is its own.
            solver: a function of `rqvae.diffusion.solvers`; None is the model's own.
            seed: of noise and labels.

        Raises:
            BadInput: a Stage1 run, which cannot sample; n below 1; a condition of another length.
        """
        if self.two_stage is None:
            raise BadInput("sample: expected a Stage2 run, this one is an autoencoder (encode, decode, reconstruct)")
        if n < 1:
            raise BadInput(f"sample: n: expected at least 1, got {n}")
        count = self.spec.num_classes or self.spec.num_actions
        if condition is None and count:
            draws = [torch.randint(count, (), generator=generator(seed, "label", i)) for i in range(n)]
            condition = condition_of(self.spec, torch.stack(draws))
        noise = noise_of(self.two_stage.latent_shape, seed, 0, n).to(self.device)
        sampler = self.sampler(steps=steps, guidance=guidance, solver=solver)
        placed = condition and condition.to(self.device)
        output = self.two_stage.sample(placed, noise, sampler)
        self.nfe = output.nfe
        return self.two_stage.decode(output)

    def sampler(self, *, steps: int | None = None, guidance: float | None = None, solver: Any = None) -> Sampler:
        """The model's own sampler with what is given changed, see `sample`.

        Raises:
            BadInput: a Stage1 run, which has none.
        """
        if self.two_stage is None:
            raise BadInput("sample: expected a Stage2 run, this one is an autoencoder (encode, decode, reconstruct)")
        return change_sampler(self.two_stage, steps=steps, guidance=guidance, solver=solver)

    def save_pretrained(self, folder: str | Path, *, licence: str = "unknown") -> None:
        """Write a folder that `rqvae.load` takes anywhere: weights, config.json and a model card.

        Args:
            folder: new or empty.
            licence: of the model card, an identifier of the hub such as apache-2.0.

        Raises:
            BadInput: a folder with files in it; a pipeline that was put together by hand.
        """
        if self.description is None:
            raise BadInput("save_pretrained: expected a pipeline from rqvae.load, got one without a description")
        exported.write(Path(folder), self.description, self.stage1, self.two_stage)
        write_card(Path(folder), self.description, self.stage1, self.two_stage, licence)

    def push_to_hub(self, hub_id: str, *, private: bool | None = None, licence: str = "unknown") -> str:
        """Upload what `save_pretrained` writes to a repository of the Hugging Face hub, and return its address.

        Args:
            hub_id: `owner/name`; made where it is not there. The token is HF_TOKEN, or that of `hf auth login`.
            private: of a new repository; None is the owner's default.
            licence: of the model card.

        Raises:
            BadInput: a hub that cannot be reached or refuses, in one line that says what to do.
        """
        sources.check_hub_id(hub_id)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "model")
            self.save_pretrained(folder, licence=licence)
            return sources.upload(folder, hub_id, private)


def change_sampler(
    two_stage: TwoStage, *, steps: int | None = None, guidance: float | None = None, solver: Any = None
) -> Sampler:
    """The model's own sampler with what is given changed.

    A scale is that of the model's own kind of guidance (its interval, or its guide, stays), else of classifier-free
    guidance; 1 is no guidance.
    """
    sampler: Any = two_stage.stage2.sampler
    if guidance is not None:
        own = sampler.guidance
        has_scale = is_dataclass(own) and "scale" in {entry.name for entry in fields(own)}
        scaled = replace(own, scale=guidance) if has_scale else ClassifierFree(guidance)
        sampler = replace(sampler, guidance=None if guidance == 1 else scaled)
    changes = {"steps": steps, "solver": solver}
    return replace(sampler, **{k: v for k, v in changes.items() if v is not None})


def grid(images: Tensor, columns: int = 8, scale: int = 1) -> Image.Image:
    """Images (n, 3, H, W) in [0, 1] as one picture, for a notebook to show.

    Args:
        images: at least one.
        columns: images in a row.
        scale: side of a pixel, so that small images can be seen.
    """
    return Image.fromarray(image_grid(as_pictures(images), columns=columns, scale=scale))
