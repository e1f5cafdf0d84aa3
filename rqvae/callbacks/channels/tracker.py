"""Statistics of a network's channels while it trains: sums on the device, read as one tensor.

tracker = ChannelTracker(model, layers=["GroupNorm"], every=10)
for batch in batches:
    loss(model(batch)).backward()
    optimizer.step()
    tracker.step()
    optimizer.zero_grad()
tracker.regions()   # layer, channel, state, birth, death, score
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rqvae.callbacks.channels.classifier import Classifier, Region
from rqvae.callbacks.channels.layers import find_layers
from rqvae.callbacks.channels.readings import Readings
from rqvae.callbacks.channels.settings import Thresholds
from rqvae.callbacks.channels.snapshot import Snapshot
from rqvae.callbacks.channels.statistics import (
    Scratch,
    activation_sums,
    as_rows,
    latent_sums,
    pair_sums,
    parameter_table,
)
from rqvae.callbacks.channels.wiring import Discovery, Layer, Wire, in_backward
from rqvae.errors import BadInput, RunFailed

_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[ChannelTracker]] = weakref.WeakKeyDictionary()


class ChannelTracker:
    """Watches the channels of any network; it changes nothing.

    Forward hooks see the training forwards (training mode, gradients on) of every k-th step. The first such forward
    also shows which activation follows a layer, so that its statistics are of the activation's result, and which layers
    feed it and are fed by it. Nothing is read from the device before `snapshot` or `regions`.

    Hooks cannot see into compiled code. Where part of the model is compiled, or split over processes, give the batch to
    `probe` before the step: the same forward, without gradients and uncompiled.

    Args:
        model: the network, not wrapped (not DistributedDataParallel).
        layers: globs over module names, or names of module classes.
        every: steps from one observation to the next.
        thresholds: of the states.
        latent: module whose output (B, 2C, ...) has a posterior's means and log-variances; auto finds `quant_conv`.
        pairs: sum products of all pairs of channels.
        probing: True where `probe` is called; None finds out.
        dtype: of the sums; float64 where the device has it.
        reduce: sums a tensor over ranks; None for one rank.
        world_size: ranks.
        whole: gives all of a tensor that is split over processes.

    Raises:
        BadInput: a pattern that names nothing; a model that has a tracker already; `every` below 1; hooks asked for
            in a compiled model.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] = ("GroupNorm",),
        every: int = 1,
        *,
        thresholds: Thresholds | None = None,
        latent: str | None = "auto",
        pairs: bool = False,
        probing: bool | None = None,
        dtype: torch.dtype = torch.float64,
        reduce: Callable[[Tensor], Tensor] | None = None,
        world_size: int = 1,
        whole: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        if every < 1:
            raise BadInput(f"ChannelTracker: every: expected at least 1, got {every}")
        attached = _ATTACHED.get(model)
        if attached is not None and attached() is not None:
            raise BadInput(f"ChannelTracker: expected a {type(model).__name__} without a tracker, it has one already")
        self.model, self.every, self.pairs = model, every, pairs
        self.layers = find_layers(model, layers)
        self.thresholds = thresholds or Thresholds()
        self.probing = is_compiled(model) if probing is None else probing
        if is_compiled(model) and not self.probing:
            raise BadInput("ChannelTracker: probing: expected True, as parts of the model are compiled, got False")
        self.latent = _find_latent(model, latent)
        self.steps = 0
        self.wires: dict[str, Wire] | None = None
        self.classifier = Classifier(self.layers, self.thresholds)
        self._dtype, self._reduce, self._world_size, self._whole = dtype, reduce, world_size, whole
        self._readings = Readings(self.layers, dtype)
        self._scratch = Scratch()
        self._discovery: Discovery | None = None
        self._handles: list[Any] = []
        self._live, self._has_parameters = False, False
        self._last: Snapshot | None = None
        _ATTACHED[model] = weakref.ref(self)
        self._begin_step()

    def close(self) -> None:
        """Leave the model as it was."""
        self._unhook()
        if self._discovery is not None:
            self._discovery.end()
            self._discovery = None
        _ATTACHED.pop(self.model, None)

    @property
    def armed(self) -> bool:
        """Whether the step that is being done is observed."""
        return (self.steps + 1) % self.every == 0

    @property
    def watching(self) -> bool:
        """Whether the step is observed, or its forward is needed to find the layers' neighbours."""
        return self.armed or self.wires is None

    def after_backward(self) -> None:
        """Take weights and gradients as they are now: before clipping and before the optimizer. Optional.

        From the first step on `wires` is known here: an intervention that goes on after a checkpoint needs it at once.
        """
        self._end_discovery()
        if self.armed and not self._has_parameters:
            for layer in self.layers:
                self._readings.add_parameters(
                    layer, parameter_table(layer, (self.wires or {}).get(layer.name, Wire()), self._whole, self._dtype)
                )
            self._has_parameters = True

    def step(self) -> None:
        """An optimizer step is done; its gradients are still there, or `after_backward` was called.

        Raises:
            RunFailed: the step was to be observed, and a tracked layer was not seen in it.
        """
        self.after_backward()
        if self.armed and (unseen := self._readings.end_step()):
            how = "probe(...) was not called before it" if self.probing else "no training forward reached it"
            raise RunFailed(
                f"channel tracking: step {self.steps + 1}: layer {unseen[0]} ({len(unseen)} of {len(self.layers)}) "
                f"was not observed: {how}"
            )
        self.steps += 1
        self._begin_step()

    def go_on_at(self, step: int) -> None:
        """Count steps from here on: a resumed run."""
        self.steps = step
        self._begin_step()

    @contextlib.contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Within this context the model computes without gradients and uncompiled, its buffers stay, and it is seen.

        Raises:
            BadInput: the model is not in training mode, or the tracker works by hooks.
        """
        if not self.probing:
            raise BadInput("ChannelTracker.probe: expected probing=True, got a tracker that works by hooks")
        slots = [(m, m._compiled_call_impl) for m in self.model.modules() if m._compiled_call_impl is not None]
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        for module, _ in slots:
            module._compiled_call_impl = None
        self._hook()
        self._live = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._live = False
            self._end_discovery()
            self._unhook()
            for module, call in slots:
                module._compiled_call_impl = call
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def probe(self, forward: Callable[[], object]) -> None:
        """Observe `forward()`, which calls the model with the batch of this step, before the step; see `uncompiled`."""
        if self.watching:
            with self.uncompiled():
                forward()

    def take(self) -> tuple[Tensor, Callable[[Tensor], Snapshot]] | None:
        """End a window: all its sums as one tensor on the device, reduced over ranks, and what reads its copy.

        Every rank calls it. None where nothing was observed since the last call.
        """
        if not self._readings.steps:
            return None
        flat, read = self._readings.take(self.steps, self._world_size)
        return flat if self._reduce is None else self._reduce(flat), read

    def snapshot(self) -> Snapshot | None:
        """Statistics since the last snapshot, classified; the last one where nothing was observed since."""
        if (taken := self.take()) is not None:
            flat, read = taken
            self._last = read(flat.cpu())
            self.classifier.observe(self._last)
        return self._last

    def regions(self) -> list[Region]:
        """Stretches of time that channels spent in a state other than active; those that go on have death None."""
        self.snapshot()
        return self.classifier.regions()

    def _begin_step(self) -> None:
        self._has_parameters = False
        if self.armed and self._handles and self.wires is not None and not self.probing:
            return  # every step is observed: the hooks stay
        self._unhook()
        if self.watching and not self.probing:
            self._hook()

    def _hook(self) -> None:
        for layer in self.layers:
            self._handles.append(layer.module.register_forward_hook(self._hook_of(layer)))
        if self.latent is not None:
            self._handles.append(self.latent.register_forward_hook(self._see_latent))
        if self.wires is None:
            self._discovery = Discovery(self.model, self.layers, self._observe)
            self._discovery.begin()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _end_discovery(self) -> None:
        if self._discovery is not None:
            found = self._discovery.end()
            self.wires = found if self._discovery.wires else None  # a step without a forward shows nothing
            self._discovery = None

    def _is_training(self, module: nn.Module) -> bool:
        """Whether a call counts: not in evaluation, not a second forward without gradients, not recomputation."""
        return self._live or (torch.is_grad_enabled() and module.training and not in_backward())

    def _hook_of(self, layer: Layer) -> Callable[..., None]:
        def see(module: nn.Module, arguments: Any, output: Tensor) -> None:  # noqa: ARG001
            if not self._is_training(module):
                return
            if self._discovery is not None:
                self._discovery.give(layer, output)
            else:
                self._observe(layer, output, (self.wires or {})[layer.name])

        return see

    def _observe(self, layer: Layer, output: Tensor, wire: Wire) -> None:
        if not self.armed:  # a forward that was watched for the layers' neighbours alone
            return
        rows_bcn = as_rows(output, layer)
        sums = activation_sums(rows_bcn, wire, self.thresholds.near_zero, self._dtype, self._scratch)
        self._readings.add(layer, sums, len(rows_bcn))
        if self.pairs:
            h_bcn = rows_bcn if wire.activation is None else wire.activation(rows_bcn)
            self._readings.add_pairs(layer, pair_sums(h_bcn, self._dtype))

    def _see_latent(self, module: nn.Module, arguments: Any, output: Tensor) -> None:  # noqa: ARG002
        if self.armed and self._is_training(module):
            with torch._C.DisableTorchFunction():
                self._readings.add_latent(*latent_sums(output, self._dtype), len(output))


def is_compiled(model: nn.Module) -> bool:
    """Whether a part of the model is compiled, so that hooks inside it are not called."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def _find_latent(model: nn.Module, name: str | None) -> nn.Module | None:
    modules = dict(model.named_modules())
    if name == "auto":
        found = [module for key, module in modules.items() if key.rpartition(".")[2] == "quant_conv"]
        return found[0] if found else None
    if name is not None and name not in modules:
        raise BadInput(f"latent: expected the name of a module of {type(model).__name__} or auto, got {name!r}")
    return None if name is None else modules[name]
