"""The HPU backend: one Intel Gaudi card a process, HCCL between processes.

Written from the vendor's documentation and never run on a card; `tests/test_hpu_contract.py` holds it to the order of
calls that these pages give:

- modes: https://docs.habana.ai/en/latest/PyTorch/PyTorch_Gaudi_Theory_of_Operations.html
- what exists in which mode, types: https://docs.habana.ai/en/latest/PyTorch/Reference/PyTorch_Support_Matrix.html
- mark_step: https://docs.habana.ai/en/latest/PyTorch/Reference/mark_step.html
- HCCL: https://docs.habana.ai/en/latest/PyTorch/PyTorch_Scaling_Guide/Distributed_Backend_Initialization.html
- autocast: https://docs.habana.ai/en/latest/PyTorch/PyTorch_Mixed_Precision/index.html
- fused operations: https://docs.habana.ai/en/latest/PyTorch/Model_Optimization_PyTorch/Custom_Ops_PyTorch.html
- graphs: https://docs.habana.ai/en/latest/PyTorch/Model_Optimization_PyTorch/HPU_Graphs_Training.html
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from rqvae.backends.eager import EagerBackend
from rqvae.backends.interfaces import Precision
from rqvae.backends.scaling import LossScaler
from rqvae.errors import BadInput

LAZY_MODE = "PT_HPU_LAZY_MODE"
_ROOT = "habana_frameworks.torch"


class HpuBackend(EagerBackend):
    """Processes on Intel Gaudi cards.

    Operations are eager, and `train.compile` compiles blocks with the vendor's compiler. What else there is, is asked
    for after the name, `--backend hpu:lazy,fused`:

    - `lazy`: operations are gathered into graphs that `mark_step` ends, after each backward, after the optimizer and at
      the end of a step. The vendor no longer develops it, and it needs the vendor's own build of torch.
    - `graphs` (with `lazy` only): `train.compile` records blocks as HPU graphs and replays them.
    - `fused`: the vendor's FusedAdamW and FusedClipNorm.

    Args:
        precision: fp32 or bf16.
        threads: OpenMP threads of this process, 0 to leave torch's choice.
        timeout: seconds after which a collective that a rank never joins is an error.
        options: of those above.
    """

    name = "hpu"
    device_type = "hpu"
    process_group = "hccl"
    compiler = "hpu_backend"
    widest_float = torch.float32  # no float64 on the device (support matrix, data types)
    fused_adamw = False  # torch's fused kernel is not among the documented operations
    bucket_cap_mb = 100  # of the vendor's training scripts (HabanaAI/Model-References, torchvision/utils.py)
    options = ("lazy", "graphs", "fused")

    def __init__(
        self,
        precision: Precision = "fp32",
        threads: int = 0,
        timeout: float = 600.0,
        options: Sequence[str] = (),
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise BadInput(f"train.precision: expected fp32 or bf16 on hpu, got {precision}")
        self.lazy, self.graphs, self.fused = (option in options for option in self.options)
        if self.graphs and not self.lazy:
            raise BadInput("--backend hpu:graphs: expected hpu:lazy,graphs (HPU graphs exist in lazy mode only)")
        self._core = load_bridge(self.lazy)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # registers hccl with torch, and reads the launcher's variables to find this process's card
            import_module(f"{_ROOT}.distributed.hccl").initialize_distributed_hpu()
        self._clippers: dict[float, object] = {}
        super().__init__(precision, threads, timeout)

    @property
    def device_name(self) -> str:
        return import_module(f"{_ROOT}.hpu").get_device_name()

    def profiler_activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU, ProfilerActivity.HPU]

    def choose_device(self, local_rank: int) -> torch.device:
        """The process's one card; which it is was settled by the launcher's variables, so it has no index."""
        hpu = import_module(f"{_ROOT}.hpu")
        if not hpu.is_available():
            raise BadInput("backend hpu: expected an Intel Gaudi card that the driver knows, found none")
        if local_rank >= hpu.device_count():
            raise BadInput(f"--world-size: expected at most {hpu.device_count()} (cards of this host), got more")
        return torch.device("hpu")

    def compile(self, block: nn.Module) -> None:
        if not self.lazy:
            super().compile(block)
        elif self.graphs:
            import_module(f"{_ROOT}.hpu").ModuleCacher()(model=block, inplace=True)
        else:
            raise BadInput("train.compile: expected --backend hpu or hpu:lazy,graphs (lazy mode has no torch.compile)")

    def adamw(
        self,
        params: Sequence[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> torch.optim.Optimizer:
        if not self.fused:
            return super().adamw(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        fused_adamw = import_module(f"{_ROOT}.hpex.optimizers").FusedAdamW
        return keep_steps_in_state(fused_adamw(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def clip_gradients(self, params: Sequence[nn.Parameter], limit: float) -> Tensor:
        if not self.fused:
            return super().clip_gradients(params, limit)
        if limit not in self._clippers:  # it holds the limit on the device
            fused_clip_norm = import_module(f"{_ROOT}.hpex.normalization").FusedClipNorm
            self._clippers[limit] = fused_clip_norm(params, limit)
        return self._clippers[limit].clip_norm(params).reshape(())  # type: ignore[attr-defined]

    def backward(self, loss: Tensor, scaler: LossScaler | None = None) -> None:
        super().backward(loss, scaler)
        self.mark_step()

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        params: Sequence[nn.Parameter],
        *,
        clip: float | None,
        scaler: LossScaler | None = None,
        at_most: Tensor | None = None,
    ) -> Tensor:
        norm = super().step(optimizer, params, clip=clip, scaler=scaler, at_most=at_most)
        self.mark_step()
        return norm

    def mark_step(self) -> None:
        if self.lazy:
            self._core.mark_step()

    def generator(self, seed: int) -> torch.Generator:
        """On the host: no page says that the device has generators."""
        return torch.Generator().manual_seed(seed)


def load_bridge(lazy: bool) -> ModuleType:
    """The vendor's package, in the mode that is asked for; torch knows the device `hpu` from here on.

    The mode is an environment variable that is read when the package is imported, which since release 1.18 `import
    torch` does by itself: a mode that came too late is an error.

    Raises:
        BadInput: the package is missing or does not go with this torch, or the mode is another one.
    """
    wanted, hint = ("1", "hpu:lazy") if lazy else ("0", "hpu")
    if os.environ.setdefault(LAZY_MODE, wanted) != wanted:
        raise BadInput(f"{LAZY_MODE}: expected {wanted} for --backend {hint}, got {os.environ[LAZY_MODE]}")
    try:
        core = import_module(f"{_ROOT}.core")
        loaded_lazy = import_module(f"{_ROOT}.utils.internal").is_lazy()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "habana_frameworks":
            raise
        raise BadInput(
            "backend hpu: expected the package habana-frameworks-torch, which comes with the vendor's image and is on "
            "no package index (https://docs.habana.ai, Installation Guide); found none"
        ) from None
    except (AssertionError, ImportError, OSError) as error:  # another torch than it was built for; no driver
        raise BadInput(
            f"backend hpu: habana-frameworks-torch cannot be imported: {' '.join(str(error).split())}"
        ) from None
    if loaded_lazy != lazy:
        raise BadInput(
            f"{LAZY_MODE}: expected to be set before torch is imported, which imports habana-frameworks-torch: "
            f"export {LAZY_MODE}={wanted}"
        )
    return core


def keep_steps_in_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make the vendor's FusedAdamW keep its count of steps where a checkpoint looks for it.

    It counts in `param_groups`, which hold settings: after a resume it would correct the bias of old moments as if they
    were new. Here each parameter's state has the count too, as torch's AdamW has it: a scalar of the host.
    """

    def read(own: torch.optim.Optimizer, *_: object) -> None:
        for group in own.param_groups:
            for counted in (own.state[p]["step"] for p in group["params"] if "step" in own.state.get(p, {})):
                group["step"] = int(counted)
                break

    def note(own: torch.optim.Optimizer, *_: object) -> None:
        for group in own.param_groups:
            count = torch.tensor(float(group.get("step", 0)))
            for p in group["params"]:
                if p in own.state:
                    own.state[p]["step"] = count.clone()

    optimizer.register_step_pre_hook(read)
    optimizer.register_step_post_hook(note)
    return optimizer
