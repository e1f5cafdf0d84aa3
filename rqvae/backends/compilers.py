"""Devices and compilers of the compile diagnostic, by the names that its command line takes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import resource
import time
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rqvae.backends import xla_environment
from rqvae.backends.compiling import check_host_compiler
from rqvae.errors import BadInput

DEFAULT_COMPILERS = {"hpu": "hpu_backend", "cpu": "inductor", "cuda": "inductor", "xla": "openxla"}
"""Device -> compiler."""
_PACKAGES = {"hpu": ("habana_frameworks", "Habana's software"), "xla": ("torch_xla", "torch_xla")}
_MODULES = {"hpu": "habana_frameworks.torch.core", "xla": "torch_xla.core.xla_model"}


def device_names() -> tuple[str, ...]:
    """What `--device` takes besides auto."""
    return tuple(DEFAULT_COMPILERS)


def open_device(name: str) -> tuple[str, torch.device]:
    """Name and device; `auto` is Habana's where its software is, else cuda where a GPU is, else the host.

    Raises:
        BadInput: the software or the hardware of an explicit choice is not there.
    """
    if name == "auto":
        has_habana = importlib.util.find_spec("habana_frameworks") is not None
        name = "hpu" if has_habana else "cuda" if torch.cuda.is_available() else "cpu"
    if name in _PACKAGES:
        package, words = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise BadInput(f"--device {name}: expected {words} ({package}), which is not installed; try --device cpu")
        if name == "hpu":
            os.environ.setdefault("PT_HPU_LAZY_MODE", "0")  # torch.compile works in eager mode only; read at import
        if name == "xla":
            xla_environment.prepare()
        module = import_module(_MODULES[name])
        return name, module.xla_device() if name == "xla" else torch.device("hpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: expected a GPU that torch can use, found none; try --device cpu")
    return name, torch.device(name)


def prepare_compiler(compiler: str, device_name: str) -> None:
    """Register a vendor's compiler with torch, and look for what it needs on this machine.

    Raises:
        BadInput: inductor on a CPU without a C++ compiler.
    """
    if compiler == "openxla":
        import_module("torch_xla")
    if compiler == "inductor" and device_name == "cpu":
        try:
            check_host_compiler()
        except BadInput as error:
            words = str(error).removeprefix("train.compile: ")
            raise BadInput(f"--backend inductor: {words}; or try --backend aot_eager") from None


_CODES: dict[str, types.CodeType] = {}
"""Structure of a module (its `repr`) -> the code object through which modules of that structure are called."""


def compiled_call(block: nn.Module, compiler: Callable[..., Any]) -> Callable[..., Any]:
    """A call of a module, compiled at its first use, graph breaks allowed.

    Modules of one structure are called through one code object, so that those with inputs of one shape and with the
    same `compiler` object share compiled graphs; weights are inputs of a graph. Other structures have other code
    objects: where one has nothing to compile (`nn.Identity`), dynamo skips its code object from then on, for all.
    """

    def call(*arguments: Any, **keywords: Any) -> Any:
        return block._call_impl(*arguments, **keywords)

    code = _CODES.setdefault(repr(block), call.__code__.replace(co_name=f"call_{len(_CODES)}"))
    own = types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
    return torch.compile(own, backend=compiler, dynamic=False)


@contextlib.contextmanager
def own_compilations(versions: int | None = None) -> Any:
    """Forget what was compiled before and, at the end, what was compiled within; let one class have many versions.

    Args:
        versions: of one code object; beyond it dynamo is eager without a word. None leaves torch's limit (8).
    """
    config = torch._dynamo.config
    limits: dict[str, Any] = (
        {} if versions is None else {"recompile_limit": versions, "accumulated_recompile_limit": 8 * versions}
    )
    torch._dynamo.reset()
    _CODES.clear()
    try:
        with config.patch(limits) if limits else contextlib.nullcontext():
            yield
    finally:
        torch._dynamo.reset()


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock may be read."""
    module = getattr(torch, device.type, None)
    if device.type == "xla":
        import_module("torch_xla").sync(wait=True)
    elif device.type != "cpu" and module is not None:
        module.synchronize(device)


class MemoryGauge:
    """Peak of memory since it was started, in bytes above the start.

    On an accelerator what its allocator gave; on a Linux host the process's resident memory, whose peak the kernel
    resets on request (/proc/self/clear_refs); elsewhere unknown.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._module = getattr(torch, device.type, None) if device.type in ("cuda", "hpu") else None
        self._device, self._start = device, 0

    def start(self) -> None:
        """Begin anew."""
        if self._module is not None:
            self._module.reset_peak_memory_stats(self._device)
            self._start = self._module.memory_allocated(self._device)
        elif self._device.type == "cpu":
            with contextlib.suppress(OSError):  # a kernel or container that does not allow it
                Path("/proc/self/clear_refs").write_text("5")
            self._start = self._host("VmRSS") or 0

    def peak(self) -> int | None:
        """Bytes above the start; None where the device does not tell."""
        if self._module is not None:
            return int(self._module.max_memory_allocated(self._device)) - self._start
        high = self._host("VmHWM") if self._device.type == "cpu" else None
        return None if high is None else max(0, high - self._start)

    @staticmethod
    def _host(key: str) -> int | None:
        try:
            text = Path("/proc/self/status").read_text()
        except OSError:
            return None
        return int(text.split(f"{key}:")[1].split()[0]) * 1024


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended, the compilers' own processes among them."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def needs_gaudi(device_name: str) -> bool:
    """Whether pipelines come from optimum-habana on this device."""
    return device_name == "hpu"


def gaudi_pipeline(source: str, gaudi_config: str) -> Any:
    """A Stable Diffusion XL pipeline of optimum-habana on a Gaudi device.

    Raises:
        BadInput: optimum-habana is not installed.
    """
    try:
        module = import_module("optimum.habana.diffusers")
    except ImportError:
        raise BadInput("--device hpu: expected optimum-habana for a pipeline, which is not installed") from None
    return module.GaudiStableDiffusionXLPipeline.from_pretrained(
        source, gaudi_config=gaudi_config, use_habana=True, use_hpu_graphs=False
    )


def check_hpu_graphs(device_name: str) -> None:
    """That HPU graphs can be recorded: on a Gaudi device, in lazy mode, the only one that has them.

    Source: "HPU Graphs for Training" of docs.habana.ai.

    Raises:
        BadInput: another device, or eager mode.
    """
    if device_name != "hpu":
        raise BadInput(f"--backend: HPU graphs: expected --device hpu, got {device_name}")
    if os.environ.get("PT_HPU_LAZY_MODE") != "1":
        raise BadInput("--backend: HPU graphs: expected PT_HPU_LAZY_MODE=1 in the environment, eager mode records none")


def hpu_graph(module: nn.Module) -> Callable[..., Any]:
    """A module recorded as an HPU graph at its first call, replayed afterwards."""
    return import_module("habana_frameworks.torch").hpu.wrap_in_hpu_graph(module)
