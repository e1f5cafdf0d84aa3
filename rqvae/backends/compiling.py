"""`torch.compile` of one block of a network, in place, with the reason in one line where it cannot be."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import nn

from rqvae.errors import BadInput, RunFailed

RECOMPILE_LIMIT = 128
"""Versions of one class's code. Blocks of one class share them, one for each set of shapes and of modes (training,
evaluation, within the other update of a GAN): a U-Net of four levels has some twenty, the library's limit is 8."""


def check_host_compiler() -> None:
    """That there is a C++ compiler where inductor, on a CPU, will look for one: $CXX, else the platform's own.

    Raises:
        BadInput: there is none.
    """
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise BadInput(f"train.compile: expected a C++ compiler for the CPU (install g++ or set CXX), found no {name}")


def compile_in_place(block: nn.Module, compiler: str | Callable[..., Any]) -> None:
    """Compile a block at its next call, as one graph for each set of shapes; names in its state_dict do not change.

    `fullgraph` makes a graph break an error, so that a run that goes on has none. `dynamic=False`: blocks of one class
    share their code's versions, and the second set of channels would otherwise make a version of unknown sizes.

    Args:
        block: a module that is called as `block(...)`.
        compiler: a `torch.compile` backend or its name.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    # The adaptive weight of a GAN walks the graph backwards before the step does. A backward that was compiled in the
    # steps before the GAN's start would refuse: it has written over the activations that only it needed.
    torch._functorch.config.donated_buffer = False
    call = block._call_impl if not type(block).forward.__module__.startswith("torch.") else _outside(block)
    compiled = torch.compile(call, backend=compiler, fullgraph=True, dynamic=False)
    # the slot of `nn.Module.compile`: calls of the module go to it, a deep copy leaves it behind
    block._compiled_call_impl = _reporting(compiled, type(block).__name__)


def _outside(block: nn.Module) -> Callable[..., Any]:
    """A call of a block whose forward is torch's own, as `nn.Sequential`'s: without a word, torch compiles such a frame
    only where one outside torch calls it."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        return block._call_impl(*arguments, **keywords)

    return call


def _reporting(compiled: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same call, whose failure to compile is one line instead of the compiler's pages."""
    # here: it takes a second to import, a quarter of what a command that compiles nothing takes to begin
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return compiled(*arguments, **keywords)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            reason = " ".join(str(error).split())[:300]
            raise RunFailed(f"train.compile: {name} cannot be compiled as one graph ({reason})") from error

    return call
