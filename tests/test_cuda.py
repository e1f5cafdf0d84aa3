"""The CUDA backend: what it asks of torch, with fakes where there is no GPU; and on one, what only a GPU can show."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rqvae import backends
from rqvae.backends.cuda import CudaBackend
from rqvae.backends.late_values import LateValues
from rqvae.backends.prefetch import one_ahead
from rqvae.errors import BadInput
from tests.conftest import ROOT
from tests.test_loop import NoHostSync, assembled

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")


class LateEvent:
    """A copy that arrives when it is waited for: until then the host's memory holds something else."""

    def __init__(self, log: list[str], host_n: Tensor, values_n: Tensor) -> None:
        self.log, self.host_n, self.values_n = log, host_n, values_n

    def synchronize(self) -> None:
        self.log.append("wait")
        self.host_n.copy_(self.values_n)


def late(log: list[str]) -> LateValues:
    def copy(values_n: Tensor) -> tuple[Tensor, LateEvent]:
        host_n = torch.full_like(values_n, torch.nan)
        return host_n, LateEvent(log, host_n, values_n.clone())

    return LateValues(copy)


def test_values_are_those_of_the_call_and_come_in_its_order() -> None:
    log: list[str] = []
    values, x = late(log), torch.tensor(1.5)
    values.add(lambda **v: log.append(f"first {v}"), {"x": x, "n": torch.tensor(2**40 + 1)})
    x.fill_(7.0)
    values.add(lambda **v: log.append(f"second {v}"), {})
    values.add(lambda **v: log.append(f"third {v}"), {"x": x})
    assert log == [], "nothing is waited for when values are handed over"
    values.deliver()
    assert log == ["wait", "first {'x': 1.5, 'n': 1099511627777.0}", "second {}", "wait", "third {'x': 7.0}"]
    values.deliver()
    assert len(log) == 5


def test_handing_values_over_reads_nothing() -> None:
    with NoHostSync():
        late([]).add(lambda **_: None, {"a": torch.tensor(1.0), "b": torch.tensor(True)})


def test_error_of_a_function_comes_out_and_the_next_one_stays() -> None:
    log: list[str] = []
    values = late(log)

    def fail() -> None:
        raise RuntimeError("not finite")

    values.add(lambda **_: fail(), {"x": torch.tensor(1.0)})
    values.add(lambda **_: log.append("next"), {})
    with pytest.raises(RuntimeError, match="not finite"):
        values.deliver()
    values.deliver()
    assert log == ["wait", "next"]


def traced(items: Any, log: list[str]) -> Iterator[int]:
    def begin(item: int) -> int:
        log.append(f"begin {item}")
        return item

    def finish(item: int) -> int:
        log.append(f"finish {item}")
        return item

    return one_ahead(items, begin, finish)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_next_item_begins_before_the_present_one_is_finished(count: int) -> None:
    log: list[str] = []
    assert list(traced(range(count), log)) == list(range(count))
    for k in range(count - 1):
        assert log.index(f"begin {k + 1}") < log.index(f"finish {k}")
    for k in range(count - 2):
        assert log.index(f"finish {k}") < log.index(f"begin {k + 2}"), "one ahead, not two"


def test_error_of_the_source_comes_where_its_item_would_have() -> None:
    def source() -> Iterator[int]:
        yield from (0, 1)
        raise BadInput("image 2 cannot be read")

    items = traced(source(), [])
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(BadInput, match="image 2"):
        next(items)


class FakeStream:
    """Notes who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for all of {other.name}")

    def record_event(self) -> str:
        self.log.append(f"event in {self.name}")
        return self.name

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for the event of {event}")


class FakeBatch:
    """Notes under which stream it is copied."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def to(self, device: Any, dtype: Any = None) -> FakeBatch:
        self.log.append("copy")
        return self


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaBackend]:
    """A CUDA backend whose device is the host."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    monkeypatch.setattr(CudaBackend, "choose_device", lambda self, local_rank: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    yield CudaBackend("bf16")
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


def test_batches_are_copied_beside_the_work_and_never_into_memory_in_use(
    without_gpu: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    work, copies = FakeStream("work", log), FakeStream("copies", log)

    @contextlib.contextmanager
    def within(stream: FakeStream) -> Iterator[None]:
        log.append(f"[{stream.name}")
        yield
        log.append("]")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: work)
    monkeypatch.setattr(torch.cuda, "stream", within)
    for _ in without_gpu.feed([FakeBatch(log), FakeBatch(log)]):
        log.append("step")
    copy = ["copies waits for all of work", "[copies", "copy", "event in copies", "]"]
    arrive = ["work waits for the event of copies", "step"]
    assert log == [*copy, *copy, *arrive, *arrive]


def test_tf32_through_one_door(without_gpu: CudaBackend) -> None:
    """torch 2.9 raises where its settings of fp32 precision and the older flags meet."""
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.benchmark
    for path in (ROOT / "rqvae").rglob("*.py"):
        assert ".fp32_precision" not in path.read_text(), path


def test_rows_wait_for_the_next_step_or_for_settle(without_gpu: CudaBackend) -> None:
    """A run on the host with the late values of the CUDA backend: the same rows, one step later."""
    log: list[str] = []
    without_gpu._late = late(log)
    without_gpu.when_ready(lambda **v: log.append(str(v)), loss=torch.tensor(0.5))
    assert log == []
    without_gpu.mark_step()
    assert log == ["wait", "{'loss': 0.5}"]
    without_gpu.when_ready(lambda **v: log.append(str(v)), loss=torch.tensor(0.25))
    without_gpu.settle()
    assert log[2:] == ["wait", "{'loss': 0.25}"]


def test_optimizer_is_fused_and_autocast_is_of_the_device(without_gpu: CudaBackend) -> None:
    optimizer = without_gpu.adamw([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert optimizer.defaults["fused"]
    context = without_gpu.autocast()
    assert isinstance(context, torch.autocast)
    assert (context.device, context.fast_dtype) == ("cuda", torch.bfloat16)


def test_gpu_without_bf16_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch itself says so in the first step, as an error of the run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100-SXM2-16GB")
    with pytest.raises(
        BadInput, match=r"train\.precision: expected fp16 or fp32 on Tesla V100-SXM2-16GB, which has no"
    ):
        backends.create("cuda", precision="bf16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_one_line() -> None:
    with pytest.raises(BadInput, match="backend cuda: expected an NVIDIA GPU and a CUDA build of torch, found none"):
        backends.create("cuda")


def on_gpu(name: str, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Any:
    """As `assembled`, on the first GPU."""
    create = backends.create
    monkeypatch.setattr(backends, "create", lambda _, **keywords: create("cuda", **keywords))
    return assembled(f"configs/debug/{name}.yaml", *overrides)


@needs_gpu
@pytest.mark.parametrize("overrides", [(), ("--train.precision", "bf16"), ("--train.skip_nonfinite", "2")])
@pytest.mark.parametrize("name", ["stage1_gan", "stage2"])
def test_no_step_waits_for_the_gpu(name: str, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hence a step may be recorded as a CUDA graph."""
    _, _, trainer, steps = on_gpu(name, monkeypatch, *overrides)
    trainer.optimise(steps[0])
    trainer.clock.tick()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.optimise(steps[1])
        for ema in trainer.ema:
            ema.update(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_losses_are_those_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for make in (assembled, lambda config, *o: on_gpu(name, monkeypatch, *o)):
        _, _, trainer, steps = make(f"configs/debug/{name}.yaml", "--train.precision", "fp64")
        for micros in steps:
            losses.append(float(trainer.optimise(micros)["loss_total"]))
            trainer.clock.tick()
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-9)


@needs_gpu
def test_bf16_is_of_the_computation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, parts, trainer, steps = on_gpu("stage2", monkeypatch, "--train.precision", "bf16")
    trainer.optimise(steps[0])
    held = [*parts.modules["stage2"].parameters(), *parts.ema[0].average.values()]
    held += [x for state in parts.updates[0].optimizer.state.values() for x in state.values()]
    assert {x.dtype for x in held} == {torch.float32}


@needs_gpu
def test_fed_batches_are_what_was_sent() -> None:
    """Thousands of small ones, with work on each, so that a copy into memory in use would show."""
    backend, sent = backends.create("cuda"), torch.arange(2000.0).view(-1, 1).expand(-1, 4096)

    class Batch:
        def __init__(self, x: Tensor) -> None:
            self.x = x.contiguous().pin_memory()

        def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
            return self.x.to(device, dtype, non_blocking=True)

    sums = [(batch.sin().mul(0) + batch).mean() for batch in backend.feed(Batch(x) for x in sent)]
    assert torch.equal(torch.stack(sums).cpu(), sent[:, 0])
