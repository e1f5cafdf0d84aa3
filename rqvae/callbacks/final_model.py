"""What a finished autoencoder is for others: `RUN/final_model/vae`, a folder that diffusers loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from rqvae.callbacks.interfaces import Observer, RunView
from rqvae.errors import BadInput
from rqvae.models.interfaces import Stage1Model
from rqvae.models.stage1.kl_vae import KLVAE

FOLDER = Path("final_model") / "vae"


class FinalModel(Observer):
    """Writes the evaluated weights (EMA where there is one) after the last step, in diffusers' format.

    Args:
        stage1: a KLVAE, or a wrapper of a model of diffusers.
        weights: context in which the model has the evaluated weights.

    Raises:
        BadInput: a model without a form in diffusers.
    """

    def __init__(self, stage1: Stage1Model, weights: Callable[[], AbstractContextManager[Any]]) -> None:
        check_has_form(stage1)
        self._stage1, self._weights = stage1, weights

    def after_step(self, run: RunView, losses: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        if run.clock.step == run.clock.total_steps:
            with self._weights():
                if run.is_main:
                    write(self._stage1, run.folder / FOLDER)


def check_has_form(stage1: Stage1Model) -> None:
    """Raise BadInput for a model that cannot be written for diffusers."""
    if type(stage1) is not KLVAE and not hasattr(stage1, "save_source"):
        raise BadInput(f"checkpoint.final_model: expected a KLVAE or a model of diffusers, got {type(stage1).__name__}")


def write(stage1: Stage1Model, folder: Path) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors; what an earlier end of the run left goes."""
    from rqvae.models.stage1.kl_vae_export import to_diffusers  # diffusers takes seconds to import

    shutil.rmtree(folder, ignore_errors=True)
    if isinstance(stage1, KLVAE):
        to_diffusers(stage1, folder)
    else:
        stage1.save_source(folder)  # type: ignore[operator]
