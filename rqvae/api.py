"""The notebook's face: `rqvae.load(PATH)` gives a `Pipeline`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rqvae.configuration import read
from rqvae.diffusion.guidance import ClassifierFree
from rqvae.diffusion.sampling import Sampler
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import Condition, DataSpec, LabeledImageData, Stage1Encodings
from rqvae.models.interfaces import Stage1Model
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import generator
from rqvae.run import Stage1Run
from rqvae.trainers.evaluation_trainer import load_evaluated, reconstruct
from rqvae.trainers.generate import condition_of, noise_of
from rqvae.trainers.stage2_trainer import load_two_stage


@dataclass
class Pipeline:
    """A trained model. Images are float (n, 3, H, W) in [0, 1].

    Args:
        spec: shapes and classes of the data it was trained on.
        stage1: the autoencoder.
        two_stage: autoencoder, connector and generator; None for a Stage1 run.
    """

    spec: DataSpec
    stage1: Stage1Model
    two_stage: TwoStage | None = None

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Stage1's latents of images, without noise."""
        return self.stage1.encode(LabeledImageData(img=images)).zs

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of Stage1's latents."""
        return self.stage1.get_recon_imgs(self.stage1.decode(Stage1Encodings(latents)).xs_recon)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images through Stage1 and back."""
        return reconstruct(self.stage1, images)

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
        """Generate n images; image i is a function of (seed, i).

        Args:
            n: how many.
            condition: of length n; None draws classes or actions from the seed where the model has them.
            steps: solver steps; None is the model's own.
            guidance: scale of classifier-free guidance; None is the model's own.
            solver: a function of `rqvae.diffusion.solvers`; None is the model's own.
            seed: of noise and labels.

        Raises:
            BadInput: a Stage1 run, which cannot sample.
        """
        if self.two_stage is None:
            raise BadInput("sample: expected a Stage2 run, this one is an autoencoder (encode, decode, reconstruct)")
        count = self.spec.num_classes or self.spec.num_actions
        if condition is None and count:
            draws = [torch.randint(count, (), generator=generator(seed, "label", i)) for i in range(n)]
            condition = condition_of(self.spec, torch.stack(draws))
        noise = noise_of(self.two_stage.latent_shape, seed, 0, n)
        sampler = change_sampler(self.two_stage, steps=steps, guidance=guidance, solver=solver)
        return self.two_stage.decode(self.two_stage.sample(condition, noise, sampler))


def change_sampler(
    two_stage: TwoStage, *, steps: int | None = None, guidance: float | None = None, solver: Any = None
) -> Sampler:
    """The model's own sampler with what is given changed; guidance 1 is none."""
    sampler: Any = two_stage.stage2.sampler
    if guidance is not None:
        sampler = replace(sampler, guidance=None if guidance == 1 else ClassifierFree(guidance))
    changes = {"steps": steps, "solver": solver}
    return replace(sampler, **{k: v for k, v in changes.items() if v is not None})


def load(path: str | Path) -> Pipeline:
    """A run of either stage, with the weights that are evaluated (EMA), on the host.

    Args:
        path: a run folder.

    Raises:
        BadInput: no such run, or one without a complete checkpoint.
    """
    folder = Path(path)
    if not (folder / "config.yaml").exists():
        raise BadInput(f"{folder}: expected a run folder with config.yaml, found none")
    run = read([folder / "config.yaml"], inference=True).instantiate()
    spec = run.data.make("train")[0].spec
    if isinstance(run, Stage1Run):
        load_evaluated(run.stage1, "stage1", folder)
        return Pipeline(spec, run.stage1.eval())
    two_stage = load_two_stage(run, folder)
    return Pipeline(spec, two_stage.stage1, two_stage)
