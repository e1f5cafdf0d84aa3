"""Faults of the kind that a change to our code could bring, each put in by replacing a method.

`MUTATIONS[name]` changes the classes through `replace(owner, attribute, value)`, which undoes it after the run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from rqvae.backends import hpu
from rqvae.backends.eager import EagerBackend
from rqvae.backends.hpu import HpuBackend
from tests.hpu_stub.journal import note

Replace = Callable[[Any, str, Any], None]


def clip_before_reduce(replace: Replace) -> None:
    """Clips what this rank has, before the last backward adds to it and averages."""
    mine: list[nn.Parameter] = []
    accumulate = HpuBackend.accumulate

    def early(self: HpuBackend, module: nn.Module, *, sync: bool) -> Any:
        mine[:] = [p for p in module.parameters() if p.grad is not None]
        if sync:
            nn.utils.clip_grad_norm_(mine, 1.0)
        return accumulate(self, module, sync=sync)

    replace(HpuBackend, "accumulate", early)
    replace(HpuBackend, "clip_gradients", lambda _, params, limit: nn.utils.get_total_norm([p.grad for p in params]))


def optimizer_before_clip(replace: Replace) -> None:
    def step(self: HpuBackend, optimizer: torch.optim.Optimizer, params: Any, *, clip: float, **_: Any) -> Any:
        optimizer.step()
        norm = self.clip_gradients(params, clip)
        optimizer.zero_grad()
        self.mark_step()
        return norm

    replace(HpuBackend, "step", step)


def no_mark_step_after_backward(replace: Replace) -> None:
    replace(HpuBackend, "backward", EagerBackend.backward)


def no_mark_step_after_the_optimizer(replace: Replace) -> None:
    replace(HpuBackend, "step", EagerBackend.step)


def no_mark_step_at_the_end(replace: Replace) -> None:
    backward, step = EagerBackend.backward, EagerBackend.step

    def marked(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: HpuBackend, *arguments: Any, **keywords: Any) -> Any:
            result = method(self, *arguments, **keywords)
            self._core.mark_step()
            return result

        return call

    replace(HpuBackend, "backward", marked(backward))
    replace(HpuBackend, "step", marked(step))
    replace(HpuBackend, "mark_step", lambda self: None)


def mark_step_in_eager_mode(replace: Replace) -> None:
    replace(HpuBackend, "mark_step", lambda self: self._core.mark_step())


def synchronize_each_step(replace: Replace) -> None:
    replace(HpuBackend, "mark_step", lambda self: import_module("habana_frameworks.torch.hpu").synchronize())


def reduce_at_each_micro_batch(replace: Replace) -> None:
    replace(HpuBackend, "accumulate", lambda self, module, *, sync: contextlib.nullcontext())


def never_reduce(replace: Replace) -> None:
    replace(HpuBackend, "accumulate", lambda self, module, *, sync: module.no_sync())


def import_before_the_mode(replace: Replace) -> None:
    def load(lazy: bool) -> Any:
        core = import_module("habana_frameworks.torch.core")
        os.environ["PT_HPU_LAZY_MODE"] = str(int(lazy))
        return core

    replace(hpu, "load_bridge", load)


def group_before_the_card_is_known(replace: Replace) -> None:
    def module(name: str) -> Any:
        real = import_module(name)
        return SimpleNamespace(initialize_distributed_hpu=lambda: None) if name.endswith("hccl") else real

    replace(hpu, "import_module", module)


def gloo(replace: Replace) -> None:
    replace(HpuBackend, "process_group", "gloo")


def no_autocast(replace: Replace) -> None:
    replace(HpuBackend, "autocast", lambda self: contextlib.nullcontext())


def autocast_of_the_host(replace: Replace) -> None:
    replace(HpuBackend, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))


def backward_under_autocast(replace: Replace) -> None:
    backward = HpuBackend.backward

    def call(self: HpuBackend, loss: torch.Tensor, scaler: Any = None) -> None:
        with self.autocast():
            backward(self, loss, scaler)

    replace(HpuBackend, "backward", call)


def values_read_in_float64(replace: Replace) -> None:
    replace(HpuBackend, "widest_float", torch.float64)


def norm_read_in_the_step(replace: Replace) -> None:
    step = HpuBackend.step

    def call(self: HpuBackend, *arguments: Any, **keywords: Any) -> torch.Tensor:
        norm = step(self, *arguments, **keywords)
        norm.item()
        return norm

    replace(HpuBackend, "step", call)


def inductor(replace: Replace) -> None:
    """The default compiler; compiled eagerly here, as only its name matters."""

    def compile_(self: HpuBackend, block: nn.Module) -> None:
        note("compile inductor")

    replace(HpuBackend, "compile", compile_)


def plain_operations(replace: Replace) -> None:
    """Those of torch although the vendor's were asked for."""
    replace(HpuBackend, "adamw", lambda self, params, **settings: torch.optim.AdamW(params, **settings))
    replace(HpuBackend, "clip_gradients", EagerBackend.clip_gradients)


MUTATIONS: dict[str, Callable[[Replace], None]] = {
    function.__name__: function
    for function in (
        clip_before_reduce, optimizer_before_clip, no_mark_step_after_backward, no_mark_step_after_the_optimizer,
        no_mark_step_at_the_end, mark_step_in_eager_mode, synchronize_each_step, reduce_at_each_micro_batch,
        never_reduce, import_before_the_mode, group_before_the_card_is_known, gloo, no_autocast, autocast_of_the_host,
        backward_under_autocast, values_read_in_float64, norm_read_in_the_step, inductor, plain_operations,
    )
}  # fmt: skip
