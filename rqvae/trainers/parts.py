"""What a stage brings to a training run: its models, updates, random numbers, pictures and scores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rqvae.backends import Backend, Precision
from rqvae.backends.sharded import gathered
from rqvae.callbacks.interfaces import Intervention, Observer, RunView, Stateful
from rqvae.diagnostics.plan import apply_plan, read_plan
from rqvae.errors import BadInput, RunFailed
from rqvae.img_datasets.latent_cache import LatentCache
from rqvae.models.blocks import recompute_activations
from rqvae.models.ema import EMA
from rqvae.models.interfaces import Stage1Model, Stage2Model
from rqvae.models.power_ema import PowerEMA
from rqvae.randomness import Draw
from rqvae.run import AnyRun
from rqvae.trainers.settings import EmaSettings, TrainSettings
from rqvae.trainers.updates import Update


@dataclass
class Parts:
    """One stage, assembled for training.

    Args:
        modules: bare modules to save, by name; the first one is averaged and evaluated.
        updates: in the order of a step.
        ema: averages of the first module.
        draws: random numbers needed per sample.
        counted: modules whose parameters the start banner counts, by name.
        picture: name of the grid and the function that makes it.
        evaluate: scores by name, where they are asked for.
        facts: goes into every checkpoint's meta.json.
        must_match: facts that a resumed run must share.
        before_start: done once, on a run that starts at step 0.
        companions: observers and interventions that the stage brings along.
        extras: those of them that keep a state, by file name.
        latents: cached latents that the train split gives in place of images.
    """

    modules: Mapping[str, nn.Module]
    updates: list[Update]
    ema: list[EMA]
    draws: dict[str, Draw]
    counted: Mapping[str, nn.Module]
    picture: tuple[str, Callable[[], np.ndarray]]
    evaluate: Callable[[RunView], Mapping[str, float]] | None
    facts: dict[str, Any] = field(default_factory=dict)
    must_match: tuple[str, ...] = ()
    before_start: Callable[[], None] | None = None
    latents: LatentCache | None = None
    companions: Sequence[Observer | Intervention] = ()
    extras: Mapping[str, Stateful] = field(default_factory=dict)

    def join(self, run: AnyRun) -> AnyRun:
        """The run with the companions among its observers and interventions; one that is both is an intervention."""
        acting = [each for each in self.companions if isinstance(each, Intervention)]
        watching = [each for each in self.companions if not isinstance(each, Intervention)]
        observers = [*run.observers, *watching]
        return replace(run, observers=observers, interventions=[*run.interventions, *acting])

    def evaluated(self) -> AbstractContextManager[None]:
        """The first module computes with its first average, in eval mode, without gradients."""
        return evaluated(next(iter(self.modules.values())), self.ema)


@contextlib.contextmanager
def evaluated(module: nn.Module, ema: Sequence[EMA]) -> Iterator[None]:
    """The module computes with its first average, in eval mode, without gradients."""
    average = ema[0].applied() if ema else contextlib.nullcontext()
    with average, gathered(module), torch.no_grad():
        module.eval()
        try:
            yield
        finally:
            module.train()


def float_type(precision: Precision) -> torch.dtype:
    """The type of weights: fp32 also where compute is bf16."""
    return torch.float64 if precision == "fp64" else torch.float32


def prepare_blocks(model: Stage1Model | Stage2Model, train: TrainSettings, backend: Backend) -> None:
    """Checkpoint and compile the model's repeated blocks as the config asks; in this order, and before `wrap`.

    Weights keep their names and their tensors, so that averages, optimizers and checkpoints need not know.
    """
    blocks = model.repeated_blocks()
    if train.activation_checkpointing == "blocks":
        recompute_activations(blocks)
    for block in blocks if train.compile else ():
        backend.compile(block)


def compile_planned(stage1: Stage1Model, compile_plan: str | Path | None, backend: Backend) -> None:
    """Compile what a plan of `diagnose` lists, in place; None compiles nothing. After moving, before `wrap`."""
    if compile_plan is not None:
        apply_plan(read_plan(Path(compile_plan)), stage1, backend, str(compile_plan))


def check_blocks(model: Stage1Model | Stage2Model, train: TrainSettings) -> None:
    """That the model has blocks where the config asks for something to be done to them."""
    asked = {"compile": train.compile, "activation_checkpointing": train.activation_checkpointing != "none"}
    for key in (key for key, wanted in asked.items() if wanted and not model.repeated_blocks()):
        raise BadInput(f"train.{key}: expected a model with repeated blocks, {type(model).__name__} has none")


def make_ema(module: nn.Module, settings: EmaSettings) -> list[EMA]:
    """One average for each decay and each relative width; the one that is evaluated comes first."""
    averages = [EMA(module, decay, settings.warmup, settings.every) for decay in settings.decays]
    averages += [PowerEMA(module, width) for width in settings.power]
    return sorted(averages, key=lambda average: average.name != settings.evaluate)


def on_main(backend: Backend, action: Callable[[], Any]) -> Any:
    """`action()` on rank 0, its result on every rank; its error is raised on every rank, so that all end alike."""
    result, error = None, None
    if backend.rank == 0:
        try:
            result = action()
        except Exception as problem:  # noqa: BLE001  (told to every rank, then raised again)
            error = problem
    told = backend.broadcast(None if error is None else (isinstance(error, BadInput), str(error)))
    if error is not None:
        raise error
    if told is not None:
        raise BadInput(told[1]) if told[0] else RunFailed(told[1])
    return backend.broadcast(result)
