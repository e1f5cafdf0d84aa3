"""How the processes of a run share a model: each holds all of it, or its part (`train.parallel`)."""

from __future__ import annotations

from torch import nn

from rqvae.backends import Backend
from rqvae.backends.sharded import shard
from rqvae.errors import BadInput
from rqvae.models.interfaces import Stage1Model, Stage2Model
from rqvae.run import AnyRun, Stage1Run
from rqvae.trainers.settings import TrainSettings


def wrap(module: nn.Module, train: TrainSettings, backend: Backend) -> nn.Module:
    """The module whose backward averages gradients over ranks; with `sharded` the same module, split in place.

    Only models name the blocks that are gathered one by one; another module, a discriminator, is gathered as one.
    """
    if train.parallel == "data":
        return backend.wrap(module)
    blocks = module.repeated_blocks() if isinstance(module, Stage1Model | Stage2Model) else []
    return shard(backend, module, blocks, train.precision)


def check_parallel(run: AnyRun) -> None:
    """Raise BadInput where a run asks for something that split weights do not have."""
    if run.train.parallel == "data":
        return
    what = "with train.parallel sharded"
    if run.train.channels_last:
        raise BadInput(f"train.channels_last: expected false {what} (a weight is split along its memory)")
    if run.checkpoint.asynchronous:
        raise BadInput(f"checkpoint.asynchronous: expected false {what} (all ranks write together)")
    if isinstance(run, Stage1Run) and run.gan and run.gan.weighting == "last_layer":
        raise BadInput(
            f"gan.weighting: expected reconstruction or fixed {what} (its last layer is split), got last_layer"
        )
