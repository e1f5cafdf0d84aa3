"""The HPU backend against a stand-in for the vendor's package: the documented order of calls, and faults that break it.

No Gaudi card was ever at hand. What is shown here is that the real training of both stages calls the vendor's package,
and torch, in the order that `tests/hpu_stub/contract.py` writes down from the vendor's pages, and that the contract
notices each fault of `tests/hpu_stub/mutations.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rqvae import backends
from rqvae.backends import hpu
from rqvae.errors import BadInput
from tests.conftest import ROOT, free_ports, only, rows, start, tensors
from tests.hpu_stub.contract import broken_rules
from tests.hpu_stub.journal import EVENTS

SITE = str(ROOT / "tests" / "hpu_stub" / "site")
STEPS, ACCUMULATE = 2, 2


@dataclass(frozen=True)
class Scenario:
    """A run on the stand-in: options of the backend, a config, and a fault where `mutation` names one."""

    backend: str
    config: str
    mutation: str | None = None
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.mutation or self.config}-{self.backend.replace(':', '-').replace(',', '-')}{'-'.join(self.more)}"

    def words(self, save_dir: Path) -> list[str]:
        return [
            f"configs/debug/{self.config}.yaml", "--save-dir", str(save_dir), "--project", self.name, "--run-name", "r",
            "--train.steps", str(STEPS), "--train.accumulate", str(ACCUMULATE), "--train.precision", "bf16",
            "--data.workers", "0", "--pictures.every", "null", "--online_eval.every", "null", "--world-size", "2",
            *self.more,
        ]  # fmt: skip

    def broken(self, events: list[str]) -> list[str]:
        return broken_rules(
            events,
            lazy="lazy" in self.backend,
            fused="fused" in self.backend,
            compiled="--train.compile" in self.more and "lazy" not in self.backend,
            accumulate=ACCUMULATE,
            of=STEPS,
        )


COMPILE = ("--train.compile", "true")
KEPT = (
    Scenario("hpu", "stage1_gan"),
    Scenario("hpu:lazy", "stage1_gan"),
    Scenario("hpu:lazy,fused", "stage2"),
    Scenario("hpu:fused", "stage2"),
    Scenario("hpu", "stage2", more=COMPILE),
    Scenario("hpu:lazy,graphs", "stage2", more=COMPILE),
)
BROKEN = {
    Scenario("hpu", "stage2", "clip_before_reduce"): "clip: not once",
    Scenario("hpu", "stage2", "optimizer_before_clip"): "clip: not once",
    Scenario("hpu:lazy", "stage2", "no_mark_step_after_backward"): "mark_step: none after backward",
    Scenario("hpu:lazy", "stage2", "no_mark_step_after_the_optimizer"): "mark_step: none after optimizer",
    Scenario("hpu:lazy", "stage2", "no_mark_step_at_the_end"): "mark_step: none after ema",
    Scenario("hpu", "stage2", "mark_step_in_eager_mode"): "mark_step: in eager mode",
    Scenario("hpu", "stage2", "synchronize_each_step"): "waits: synchronize",
    Scenario("hpu", "stage2", "reduce_at_each_micro_batch"): "reduce: before the last backward",
    Scenario("hpu", "stage2", "never_reduce"): "reduce: never",
    Scenario("hpu:lazy", "stage2", "import_before_the_mode"): "setup: no import core, mode 1",
    Scenario("hpu", "stage2", "group_before_the_card_is_known"): "setup: no initialize_distributed_hpu",
    Scenario("hpu", "stage2", "gloo"): "setup: no init_process_group hccl",
    Scenario("hpu", "stage2", "no_autocast"): "setup: no autocast",
    Scenario("hpu", "stage2", "autocast_of_the_host"): "autocast: not around",
    Scenario("hpu", "stage2", "backward_under_autocast"): "autocast: not around",
    Scenario("hpu", "stage2", "values_read_in_float64"): "float64 on the device",
    Scenario("hpu", "stage2", "norm_read_in_the_step"): "waits: host_read",
    Scenario("hpu", "stage2", "inductor", COMPILE): "setup: no compile hpu_backend",
    Scenario("hpu:fused", "stage2", "plain_operations"): "fused: optimizer",
}


@dataclass(frozen=True)
class Journals:
    """What both ranks of every scenario left."""

    save_dir: Path
    ranks: list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def journals(tmp_path_factory: pytest.TempPathFactory) -> Journals:
    """All scenarios, one after the other in two processes: importing torch once takes longer than a dozen of them."""
    folder = tmp_path_factory.mktemp("hpu")
    runs = (*KEPT, *BROKEN)
    scenarios = [
        {"name": s.name, "backend": s.backend, "mutation": s.mutation, "port": port, "words": s.words(folder)}
        for s, port in zip(runs, free_ports(len(runs)), strict=True)
    ]
    (folder / "in.json").write_text(json.dumps(scenarios))
    facts = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.hpu_stub.driver", str(folder / "in.json"), str(folder / f"{rank}.json")],
            env={**os.environ, **facts, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"{rank}.txt").open("w"),
        )
        for rank in (0, 1)
    ]
    try:
        end = time.monotonic() + 200
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(0.1)
            if any(process.poll() for process in processes):
                break
        errors = {rank: (folder / f"{rank}.txt").read_text()[-3000:] for rank in (0, 1)}
        assert [process.poll() for process in processes] == [0, 0], errors
    finally:
        for process in processes:
            process.kill()
    return Journals(folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The vendor's package can be imported in this process, until the end of the test."""
    monkeypatch.delenv("PT_HPU_LAZY_MODE", raising=False)
    monkeypatch.syspath_prepend(SITE)
    yield
    torch._dynamo.reset()
    for name in [name for name in sys.modules if name.partition(".")[0] == "habana_frameworks"]:
        del sys.modules[name]
    if hasattr(torch, "hpu"):
        del torch.hpu
        del sys.modules["torch.hpu"]


@pytest.mark.parametrize("scenario", KEPT, ids=lambda s: s.name)
def test_the_contract_is_kept(scenario: Scenario, journals: Journals) -> None:
    for rank in journals.ranks:
        journal = rank[scenario.name]
        assert journal["code"] == 0, journal["events"][-5:]
        assert scenario.broken(journal["events"]) == []


@pytest.mark.parametrize("scenario", BROKEN, ids=lambda s: s.name)
def test_each_fault_breaks_it(scenario: Scenario, journals: Journals) -> None:
    for rank in journals.ranks:
        broken = scenario.broken(rank[scenario.name]["events"])
        assert any(rule.startswith(BROKEN[scenario]) for rule in broken), broken


def test_every_fault_is_tried() -> None:
    sys.path.insert(0, SITE)
    try:
        from tests.hpu_stub.mutations import MUTATIONS
    finally:
        sys.path.remove(SITE)
    assert {scenario.mutation for scenario in BROKEN} == set(MUTATIONS)


def test_blocks_become_graphs_in_lazy_mode_and_only_there(journals: Journals) -> None:
    for scenario in KEPT:
        events = journals.ranks[0][scenario.name]["events"]
        assert ("ModuleCacher" in events) == ("graphs" in scenario.backend)
        assert ("compile hpu_backend" in events) == (scenario.backend == "hpu" and bool(scenario.more))


def host_as_card(monkeypatch: pytest.MonkeyPatch, *options: str) -> hpu.HpuBackend:
    monkeypatch.setattr(hpu.HpuBackend, "choose_device", lambda self, local_rank: torch.device("cpu"))
    return hpu.HpuBackend(options=options)


def test_vendor_compiler_gets_the_graph_of_a_block(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
    expected = block(x)
    host_as_card(monkeypatch).compile(block)
    EVENTS.clear()
    torch.testing.assert_close(block(x), expected)
    assert EVENTS == ["compiled a graph"]


def test_lazy_mode_has_no_compiler(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"train\.compile: expected --backend hpu or hpu:lazy,graphs"):
        host_as_card(monkeypatch, "lazy").compile(torch.nn.Linear(3, 2))


def test_fused_clipping_is_clipping(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's own; the norm is a scalar as everywhere, where the vendor's has one element."""
    norms, clipped = [], []
    for options in ((), ("fused",)):
        p = torch.nn.Parameter(torch.zeros(4))
        p.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
        backend = host_as_card(monkeypatch, *options)
        norms.append(backend.step(backend.adamw([p], lr=0.0), [p], clip=0.5))
        p.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
        backend.clip_gradients([p], 0.5)
        clipped.append(p.grad)
    assert norms[1].shape == ()
    torch.testing.assert_close(norms[1], norms[0])
    torch.testing.assert_close(clipped[1], clipped[0])


@pytest.mark.parametrize("scenario", [KEPT[1], KEPT[2]], ids=lambda s: s.name)
def test_numbers_are_those_of_the_cpu_backend(scenario: Scenario, journals: Journals, tmp_path: Path, cli: Any) -> None:
    """Options change the order of calls, not what is computed. The vendor's stand-in has no bf16: both are fp32.

    In the GAN the sums of two processes differ in their last bits, which its adaptive weight carries on.
    """
    words = scenario.words(tmp_path)
    words[words.index("bf16")], words[words.index("--world-size") + 1] = "fp32", "1"
    assert cli("train", *words, "--backend", "cpu") == 0
    ours, theirs = (rows(only(folder / scenario.name)) for folder in (journals.save_dir, tmp_path))
    assert len(ours) == len(theirs) == STEPS
    for a, b in zip(ours, theirs, strict=True):
        for key in ("train/loss_total", "train/grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3 if scenario.config == "stage1_gan" else 1e-5), key


def test_fused_optimizer_counts_its_steps_in_the_checkpoint(journals: Journals) -> None:
    """The vendor's counts in its settings, which no checkpoint has."""
    saved = tensors(only(journals.save_dir / KEPT[2].name), STEPS)
    counts = [value for key, value in saved.items() if key.endswith(".step")]
    assert counts
    assert all(float(count) == STEPS for count in counts)


def test_fused_optimizer_goes_on_as_if_it_had_never_stopped(stand_in: None) -> None:
    """Four steps against two, a new optimizer with the state of those, and two more; and torch's own AdamW."""
    from habana_frameworks.torch.hpex.optimizers import FusedAdamW  # type: ignore[import-not-found]

    def steps(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, numbers: range) -> None:
        for k in numbers:
            weight.grad = torch.linspace(-1, 1, 5) * (k + 1)
            optimizer.step()

    def make(weight: torch.nn.Parameter) -> torch.optim.Optimizer:
        return hpu.keep_steps_in_state(FusedAdamW([weight], lr=0.1, eps=1e-8))

    whole, parted, reference = (torch.nn.Parameter(torch.ones(5)) for _ in range(3))
    steps(make(whole), whole, range(4))
    steps(torch.optim.AdamW([reference], lr=0.1, weight_decay=0.0), reference, range(4))
    before, after = make(parted), make(parted)
    steps(before, parted, range(2))
    after.state[parted].update(before.state[parted])
    steps(after, parted, range(2, 4))
    assert torch.equal(whole, parted)
    torch.testing.assert_close(whole, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("hpu", "habana-frameworks-torch, which comes with the vendor's image"),
        ("hpu:fast", "expected options of hpu among lazy, graphs, fused, got fast"),
        ("cpu:lazy", "expected no option for cpu, got lazy"),
        ("hpu:graphs", "expected hpu:lazy,graphs"),
        ("gaudi", "expected one of auto, cpu, cuda, hpu, xla"),
    ],
)
def test_mistakes_are_one_line_and_nothing_else_is_tried(backend: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        backends.create(backend)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_command_says_where_the_package_comes_from(tmp_path: Path) -> None:
    process = start("train", "configs/debug/stage2.yaml", "--save-dir", tmp_path, "--backend", "hpu")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("error:") == 1
    assert "vendor's image" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp64", "fp16"])
def test_precision_that_the_device_lacks(precision: Any) -> None:
    with pytest.raises(BadInput, match=r"train\.precision: expected fp32 or bf16 on hpu"):
        backends.create("hpu", precision=precision)


@pytest.mark.parametrize(("backend", "mode"), [("hpu", "1"), ("hpu:lazy", "0")])
def test_mode_of_the_environment_is_not_overruled(backend: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PT_HPU_LAZY_MODE", mode)
    expected = f"PT_HPU_LAZY_MODE: expected {1 - int(mode)} for --backend {backend}, got {mode}"
    with pytest.raises(BadInput, match=expected):
        backends.create(backend)


def test_package_that_was_loaded_in_the_other_mode_before(stand_in: None) -> None:
    """Since release 1.18 `import torch` loads it, before anyone could choose."""
    import habana_frameworks.torch.utils.internal  # type: ignore[import-not-found]  # noqa: F401

    with pytest.raises(BadInput, match="export PT_HPU_LAZY_MODE=1"):
        hpu.load_bridge(lazy=True)


def test_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RQVAE_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.choose() == "cpu"
    monkeypatch.syspath_prepend(SITE)
    assert backends.choose() == "hpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.choose() == "cuda"
    monkeypatch.setenv("RQVAE_BACKEND", "hpu:lazy")
    assert backends.choose() == "hpu:lazy"
