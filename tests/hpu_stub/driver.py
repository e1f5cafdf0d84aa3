"""One rank of several training runs on the stand-in, each with its journal: `python -m tests.hpu_stub.driver IN OUT`.

IN is JSON, a list of {"name", "backend", "mutation", "port", "words"}; OUT gets {name: {"code", "events"}}. Runs follow
each other in one process, as torch takes seconds to import; the vendor's package is imported anew in each.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent / "site"))

from rqvae.backends.hpu import HpuBackend
from rqvae.cli import run
from rqvae.models.ema import EMA
from rqvae.trainers.trainer import Trainer
from tests.hpu_stub.journal import EVENTS, note
from tests.hpu_stub.mutations import MUTATIONS

CARD = torch.device("cpu")
"""What stands in for the card; told from the host's other tensors by being this object."""


class Watch(TorchDispatchMode):
    """Notes float64 results and values that are read. An optimizer may read its own counters: they are the host's."""

    in_optimizer = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        result = func(*args, **(kwargs or {}))
        if not Watch.in_optimizer:
            if name == "_local_scalar_dense":
                note("host_read")
            if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(result)):
                note(f"float64 on the device: {name}")
        return result


class NotedAutocast(torch.autocast):
    """The outermost ones are noted. It has no effect on the host's tensors, so that numbers are those of fp32."""

    depth = 0

    def __enter__(self) -> Any:
        if NotedAutocast.depth == 0:
            note(f"autocast {self.device} {self.fast_dtype} {self._enabled}")
        NotedAutocast.depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        NotedAutocast.depth -= 1
        if NotedAutocast.depth == 0:
            note("left autocast")
        return super().__exit__(*error)


class NotedDDP(DistributedDataParallel):
    """Each bucket that is reduced is noted."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        note("ddp")
        super().__init__(*arguments, **keywords)

        def hook(group, bucket):  # no annotations: torch compares them with classes, not with their names
            note("reduce")
            return allreduce_hook(group, bucket)

        self.register_comm_hook(None, hook)


def noted(function: Callable[..., Any], *, before: str = "", after: str = "") -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        if before:
            note(before)
        result = function(*arguments, **keywords)
        if after:
            note(after)
        return result

    return call


def watched(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        with Watch():
            return function(*arguments, **keywords)

    return call


def instrument(replace: Callable[[Any, str, Any], None]) -> None:
    """Note what torch and the trainer are told to do, and let the card be the host."""
    original_to, original_group, original_compile = nn.Module.to, dist.init_process_group, torch.compile
    choose, read = HpuBackend.choose_device, HpuBackend.when_ready

    def to(self: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
        if arguments and arguments[0] is CARD:
            note("to device")
        return original_to(self, *arguments, **keywords)

    def choose_device(self: HpuBackend, local_rank: int) -> torch.device:
        device = choose(self, local_rank)
        assert str(device) == "hpu", device
        return CARD

    def group_of(self: HpuBackend, x: torch.Tensor) -> Any:
        return self._host_group if x.dtype == torch.float64 else None

    def when_ready(self: HpuBackend, fn: Callable[..., None], **tensors: torch.Tensor) -> None:
        values: dict[str, float] = {}
        with Watch():
            read(self, values.update, **tensors)
        fn(**values)

    def compile_(*arguments: Any, backend: str = "inductor", **keywords: Any) -> Any:
        note(f"compile {backend}")
        return original_compile(*arguments, backend=backend, **keywords)

    def init_process_group(name: str, *arguments: Any, **keywords: Any) -> None:
        note(f"init_process_group {name}")
        original_group(name, *arguments, **keywords)

    replace(HpuBackend, "choose_device", choose_device)
    replace(HpuBackend, "_group_of", group_of)
    replace(HpuBackend, "when_ready", when_ready)
    replace(nn.Module, "to", to)
    replace(dist, "init_process_group", init_process_group)
    replace(torch, "autocast", NotedAutocast)
    replace(torch, "compile", compile_)
    replace(torch.Tensor, "backward", noted(torch.Tensor.backward, after="backward"))
    replace(nn.utils, "clip_grad_norm_", noted(nn.utils.clip_grad_norm_, before="clip"))
    replace(sys.modules["rqvae.backends.eager"], "DistributedDataParallel", NotedDDP)
    replace(EMA, "update", watched(noted(EMA.update, after="ema")))
    replace(Trainer, "optimise", noted(watched(Trainer.optimise), before="step"))
    replace(Trainer, "notify", _notify(Trainer.notify))


def _notify(notify: Callable[..., None]) -> Callable[..., None]:
    def call(self: Trainer, event: str, *values: object) -> None:
        if event == "after_step":
            note("end")  # of the training graph: what observers do is another
        notify(self, event, *values)

    return call


@contextlib.contextmanager
def replacing() -> Iterator[Callable[[Any, str, Any], None]]:
    """Replacements of attributes, undone in the opposite order."""
    undo = contextlib.ExitStack()

    def replace(owner: Any, name: str, value: Any) -> None:
        own = name in vars(owner)
        undo.callback(setattr, owner, name, vars(owner)[name]) if own else undo.callback(delattr, owner, name)
        setattr(owner, name, value)

    with undo:
        yield replace


def train(scenario: dict[str, Any]) -> dict[str, Any]:
    """One run; 4 where it ended in an error that the command line does not know."""
    EVENTS.clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "habana_frameworks"]:
        del sys.modules[name]
    os.environ.pop("PT_HPU_LAZY_MODE", None)
    os.environ["MASTER_PORT"] = str(scenario["port"])
    torch._dynamo.reset()
    with replacing() as replace:
        instrument(replace)
        if scenario["mutation"]:
            MUTATIONS[scenario["mutation"]](replace)
        try:
            code = run(["train", *scenario["words"], "--backend", scenario["backend"]])
        except Exception as error:  # noqa: BLE001  (a mutation may break anything)
            code, _ = 4, note(f"error {type(error).__name__}: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return {"code": code, "events": list(EVENTS)}


def main() -> None:
    scenarios, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    register_optimizer_step_pre_hook(lambda *_: setattr(Watch, "in_optimizer", True))
    register_optimizer_step_post_hook(lambda *_: (setattr(Watch, "in_optimizer", False), note("optimizer")))
    out.write_text(json.dumps({scenario["name"]: train(scenario) for scenario in scenarios}))


if __name__ == "__main__":
    main()
