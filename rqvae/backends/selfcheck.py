"""Whether a backend does on this machine what it promises: `python -m rqvae.backends.selfcheck NAME`, about a minute.

A small network is trained with accumulation, clipping and an average; its losses and gradient norms are compared with
those of one CPU process. Checks that do not apply, such as those of several ranks on one, are left out.
"""

from __future__ import annotations

import importlib
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from rqvae.backends.interfaces import Backend
from rqvae.processes import end
from rqvae.randomness import seeded

STEPS, MICROS, BATCH = 10, 2, 16
"""Of the golden curve: optimizer steps, micro-batches of a step, images of a micro-batch over all ranks."""
CURVE_LIMIT = 5e-3
"""Relative. TF32 and bf16 products stay below it; gradients that were not averaged do not."""
GOLDEN_LOSSES = (
    0.3971689,
    0.2990109,
    0.22709,
    0.1769025,
    0.1361285,
    0.1121656,
    0.1017234,
    0.09952624,
    0.09900358,
    0.09603243,
)
GOLDEN_NORMS = (
    1.114372,
    0.8751864,
    0.7259743,
    0.6099874,
    0.4679916,
    0.3334,
    0.2971658,
    0.3302075,
    0.3544955,
    0.3263041,
)


@dataclass(frozen=True)
class Check:
    """One figure.

    Args:
        name: what was measured, with its unit.
        ok: whether it is within the limit.
        value: the figure.
        limit: largest value that is right; None where the figure is only told.
    """

    name: str
    ok: bool
    value: float
    limit: float | None


def within(name: str, value: float, limit: float) -> Check:
    """A check of an error; a value that is not finite fails."""
    return Check(name, value <= limit, value, limit)


class Net(nn.Module):
    """A convolution, both kinds of norms and linear layers: gradients of these have been lost (see `xla.py`)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.tokens_norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 12)

    def forward(self, images: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.norm(self.first(images)))
        tokens = nn.functional.pixel_unshuffle(hidden, 2).flatten(2).transpose(1, 2)
        tokens = self.down(nn.functional.gelu(self.up(self.tokens_norm(tokens))))
        side = images.shape[-1] // 2
        return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), 2)


@dataclass
class _Batch:
    """A batch that moves itself."""

    images: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> _Batch:
        return _Batch(self.images.to(device, dtype, non_blocking=True))


register_pytree_node(_Batch, lambda batch: ([batch.images], None), lambda images, _: _Batch(*images))


def batches(steps: int, rank: int, world_size: int) -> Iterator[_Batch]:
    """This rank's part of each micro-batch; the images do not depend on the number of ranks."""
    part = BATCH // world_size
    for number in range(steps * MICROS):
        images = torch.rand(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(number))
        yield _Batch(images[rank * part : (rank + 1) * part])


class Training:
    """The network, its optimizer and an average, trained as the trainer does it."""

    def __init__(self, backend: Backend) -> None:
        with seeded("selfcheck"):
            net = Net()
        self.backend, self.net = backend, net.to(backend.device)
        self.wrapped = backend.wrap(self.net)
        self.params = list(self.net.parameters())
        self.optimizer = backend.adamw(self.params, lr=3e-3, weight_decay=0.01)
        self.average = [p.detach().clone() for p in self.params]
        backend.mark_step()

    def step(self, micros: list[_Batch]) -> tuple[Tensor, Tensor]:
        """One optimizer step; this rank's mean loss and the gradients' norm, on the device."""
        total = torch.zeros((), device=self.backend.device)
        for number, micro in enumerate(micros):
            with self.backend.accumulate(self.wrapped, sync=number == len(micros) - 1):
                with self.backend.autocast():
                    loss = (self.wrapped(micro.images) - micro.images).square().mean() / len(micros)
                self.backend.backward(loss)
            total = total + loss.detach()
        self.backend.reduce(self.params)
        norm = self.backend.step(self.optimizer, self.params, clip=0.05)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 0.1)
        self.backend.mark_step()
        return total, norm.detach()

    def train(self, steps: int) -> tuple[Tensor, Tensor]:
        """(steps,) losses and (steps,) norms, on the host."""
        feed = self.backend.feed(batches(steps, self.backend.rank, self.backend.world_size))
        found = [self.step([next(feed) for _ in range(MICROS)]) for _ in range(steps)]
        losses, norms = (torch.stack([pair[i].cpu() for pair in found]).double() for i in (0, 1))
        return losses, norms

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, on the host."""
        state = {f"{i}.{key}": x for i, p in enumerate(self.params) for key, x in self.optimizer.state[p].items()}
        weights = {f"weights.{i}": p.detach() for i, p in enumerate(self.params)}
        return {name: x.cpu().contiguous().clone() for name, x in (state | weights).items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors`."""
        for i, p in enumerate(self.params):
            p.copy_(tensors[f"weights.{i}"].to(p.device))
            names = [name for name in tensors if name.startswith(f"{i}.")]
            self.optimizer.state[p].update({n.partition(".")[2]: tensors[n].to(p.device) for n in names})
        self.backend.mark_step()


def check_curve(backend: Backend) -> list[Check]:
    """Losses and norms against the golden ones, and between the ranks."""
    training = Training(backend)
    losses, norms = training.train(STEPS)
    mean = backend.all_reduce(losses.float(), "mean").double()
    golden_losses, golden_norms = (torch.tensor(x, dtype=torch.float64) for x in (GOLDEN_LOSSES, GOLDEN_NORMS))
    checks = [
        within("loss curve, relative to one CPU process", _relative(mean, golden_losses), CURVE_LIMIT),
        within("gradient norms, relative to one CPU process", _relative(norms, golden_norms), CURVE_LIMIT),
    ]
    if backend.world_size > 1:
        norms_wn = backend.all_gather(norms.float())
        weights_wn = backend.all_gather(torch.cat([p.detach().cpu().flatten() for p in training.params]))
        checks += [
            within("gradient norms after accumulation and clipping, between ranks", _spread(norms_wn), 0.0),
            within("weights after training, between ranks", _spread(weights_wn), 0.0),
        ]
    return checks


def _relative(found: Tensor, golden: Tensor) -> float:
    return float(((found - golden).abs() / golden).max())


def _spread(values_wn: Tensor) -> float:
    return float((values_wn.amax(0) - values_wn.amin(0)).max())


def check_collectives(backend: Backend) -> list[Check]:
    """Sums over ranks of numbers whose sum is known, and an object that only rank 0 has."""
    rank, world = backend.rank, backend.world_size
    own = torch.arange(4.0) + rank
    expected = {
        "sum": world * torch.arange(4.0) + world * (world - 1) / 2,
        "mean": torch.arange(4.0) + (world - 1) / 2,
        "max": torch.arange(4.0) + world - 1,
    }
    errors = [
        float((backend.all_reduce(own.to(place), op).cpu() - right).abs().max())  # type: ignore[arg-type]
        for op, right in expected.items()
        for place in (backend.device, "cpu")
    ]
    gathered = backend.all_gather(own.to(backend.device)).cpu()
    errors.append(float((gathered - (torch.arange(4.0) + torch.arange(float(world))[:, None])).abs().max()))
    told = backend.broadcast({"rank": rank, "text": "x" * 5000})
    errors.append(float(told != {"rank": 0, "text": "x" * 5000}))
    return [within("sums, gathers and broadcasts over ranks, largest error", max(errors), 0.0)]


def check_average(backend: Backend) -> list[Check]:
    """An average of decay 0.999 on its way from 0 to 1; where fp32 is secretly bf16 it stands still at 0.25."""
    average, target = torch.zeros(8, device=backend.device), torch.ones(8, device=backend.device)
    backend.mark_step()
    for _ in range(60):
        for _ in range(50):
            average.lerp_(target, 0.001)
        backend.mark_step()
    return [
        within("fp32 average after 3000 steps, error", float((average.cpu() - (1 - 0.999**3000)).abs().max()), 1e-3)
    ]


def check_checkpoint(backend: Backend) -> list[Check]:
    """Training that goes on from a file against training that goes on."""
    training, other = Training(backend), Training(backend)
    training.train(2)
    with tempfile.TemporaryDirectory() as folder:
        save_file(training.tensors(), Path(folder, "state.safetensors"))
        other.load(load_file(Path(folder, "state.safetensors")))
    difference = (training.train(2)[0] - other.train(2)[0]).abs().max()
    return [within("losses after a checkpoint's round trip, difference", float(difference), 1e-6)]


def check_speed(backend: Backend) -> list[Check]:
    """Images per second of the small network, memory, and what a compiler of whole steps did meanwhile."""
    training = Training(backend)
    training.train(5)
    before, begun = _programs(backend), time.monotonic()
    training.train(15)
    seconds, after = time.monotonic() - begun, _programs(backend)
    checks = [Check("images per second (small network)", True, 15 * MICROS * BATCH / seconds, None)]
    if before is not None and after is not None:
        compiled, run = after[0] - before[0], after[1] - before[1]
        checks += [
            within("programs compiled in steps 5 to 20", float(compiled), 0.0),
            within("programs run in 15 steps, off one a step", float(abs(run - 15 * _replicas(backend))), 0.0),
            within("operations left to the host", float(after[2]), 0.0),
        ]
    return [*checks, Check("peak memory, MiB", True, _peak_bytes(backend) / 2**20, None)]


def _programs(backend: Backend) -> tuple[int, int, int] | None:
    """Programs compiled and run by this process, and kinds of operations that were left to the host."""
    if backend.name != "xla":
        return None
    import torch_xla
    import torch_xla.debug.metrics as metrics

    torch_xla.sync(wait=True)
    names = ("CompileTime", "ExecuteTime", "ExecuteReplicatedTime")

    def counts() -> list[int]:
        return [int((metrics.metric_data(name) or (0,))[0]) for name in names]

    # a program is counted by the thread that ran it, a moment after its results can be read; ranks may be threads
    found: list[int] = []
    while found != (found := counts()):
        time.sleep(0.2)
    compiled, run, split = found
    return compiled, run + split, sum(name.startswith("aten::") for name in metrics.counter_names())


def _replicas(backend: Backend) -> int:
    """Ranks whose programs this process counts: on a host without TPU they are its threads."""
    return backend.world_size if "CPU" in backend.device_name else 1


def _peak_bytes(backend: Backend) -> float:
    """Of the device where it tells, else of the process."""
    if backend.device.type in ("cuda", "hpu"):
        return float(getattr(torch, backend.device.type).max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def check_backend(backend: Backend) -> list[Check]:
    """All checks that apply; every rank calls it and gets those of rank 0, failed where any rank's failed."""
    parts = [check_collectives, check_average, check_checkpoint, check_speed]
    if BATCH % backend.world_size == 0 and backend.world_size <= BATCH:
        parts.insert(0, check_curve)
    checks = [check for part in parts for check in part(backend)]
    failed = backend.all_reduce(torch.tensor([float(not check.ok) for check in checks]), "max").tolist()
    own = [Check(c.name, not bad, c.value, c.limit) for c, bad in zip(checks, failed, strict=True)]
    return backend.broadcast(own)


def as_json(backend: Backend, checks: list[Check]) -> dict[str, object]:
    """What is to be pasted into an issue."""
    return {
        "backend": backend.name,
        "world_size": backend.world_size,
        "device": backend.device_name,
        "torch": torch.__version__,
        "checks": [asdict(check) for check in checks],
    }


if __name__ == "__main__":
    end(importlib.import_module("rqvae.cli").run(["selfcheck", *sys.argv[1:]]))
