"""Compiled blocks: the same numbers as eager, no graph break, no compilation in the steady state, the EMA evaluated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from rqvae import backends
from rqvae.backends.compiling import compile_in_place
from rqvae.backends.cpu import CpuBackend
from rqvae.errors import BadInput, RunFailed
from rqvae.models.stage1.pixel import PixelStage1
from rqvae.trainers.parts import Parts, check_blocks
from rqvae.trainers.settings import TrainSettings
from tests.conftest import assert_same, largest_difference, only, tensors, without_times
from tests.test_loop import assembled


@pytest.fixture(autouse=True)
def _forget() -> Any:
    """Blocks share their code's versions: those of one test would be found by the next."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Counting:
    """A compiler that counts the calls of what it compiled: inductor without its C++, which takes the seconds."""

    def __init__(self) -> None:
        self.calls, self.graphs = 0, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled = aot_eager(graph, inputs)
        self.graphs += 1

        def call(*arguments: Any) -> Any:
            self.calls += 1
            return compiled(*arguments)

        return call


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr(CpuBackend, "compiler", counting)
    return counting


def after_two_steps(config: str, *overrides: str) -> dict[str, Tensor]:
    """All weights and the averages."""
    _, parts, trainer, steps = assembled(config, *overrides)
    for micros in steps:
        trainer.optimise(micros)
        for ema in trainer.ema:
            ema.update(trainer.clock.step)
        trainer.clock.tick()
    weights = {f"{n}.{k}": v for n, module in parts.modules.items() for k, v in module.state_dict().items()}
    return weights | {f"{ema.name}.{k}": v for ema in parts.ema for k, v in ema.state_dict().items()}


COMPILED = ("--train.compile", "true")
CHECKPOINTED = ("--train.activation_checkpointing", "blocks")
FP64 = ("--train.precision", "fp64")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("stage1_gan", ()),
        ("stage1_gan", ("--gan.weighting", "reconstruction", "--train.channels_last", "true")),
        ("stage1_gan", CHECKPOINTED),
        ("stage2", ("--train.accumulate", "2")),
        ("stage2_unet", ()),
        ("stage2_uvit", (*CHECKPOINTED, "--stage2.init_args.backbone.init_args.dropout", "0")),
    ],
)
def test_compiled_steps_are_those_of_eager(name: str, overrides: tuple[str, ...], counting: Counting) -> None:
    config = f"configs/debug/{name}.yaml"
    eager = after_two_steps(config, *FP64, *overrides)
    assert counting.calls == 0
    compiled = after_two_steps(config, *FP64, *overrides, *COMPILED)
    assert counting.calls > 4
    assert not torch._dynamo.utils.counters["graph_break"]
    assert largest_difference(eager, compiled) < 1e-9


def test_inductor_gives_the_gradients_of_eager() -> None:
    grads = []
    for overrides in ((), COMPILED):
        _, parts, trainer, steps = assembled("configs/debug/stage2.yaml", *overrides)
        update, batch = trainer.updates[0], steps[0][0]
        torch.manual_seed(0)
        for p in update.params:  # not the zeros that hide the blocks at the start
            nn.init.normal_(p, std=0.1)
        update.loss(batch, 0).total.backward()
        grads.append({name: p.grad for name, p in parts.modules["stage2"].named_parameters()})
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "both blocks run one graph"
    eager, compiled = grads
    assert list(compiled) == list(eager), "names stay"
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_inductor_rows_of_a_gan_are_those_of_eager(cli: Any, tmp_path: Path) -> None:
    line = ["train", "configs/debug/stage1_gan.yaml", "--project", "p", "--run-name", "r", "--train.steps", 4]
    line += ["--pictures.every", "null", "--online_eval.every", "2 steps"]
    assert cli(*line, "--save-dir", tmp_path / "eager") == 0
    assert cli(*line, "--save-dir", tmp_path / "compiled", *COMPILED) == 0
    a, b = (without_times(only(tmp_path / which / "p")) for which in ("eager", "compiled"))
    for eager, compiled in zip(a, b, strict=True):
        assert eager.keys() == compiled.keys()
        for key in eager:
            if "per_s" not in key and "logits" not in key:
                assert compiled[key] == pytest.approx(eager[key], rel=5e-3, abs=1e-5), key


@pytest.mark.parametrize("name", ["stage1_gan", "stage2"])
def test_no_compilation_in_the_steady_state(name: str, counting: Counting) -> None:
    """Which parameters require gradients changes twice a step of a GAN, and evaluation swaps the weights' memory."""
    _, parts, trainer, steps = assembled(f"configs/debug/{name}.yaml", *COMPILED)

    def turn() -> None:
        for micros in steps:
            trainer.optimise(micros)
            trainer.clock.tick()
        with parts.evaluated():
            parts.picture[1]()

    turn()
    graphs = counting.graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        turn()
        turn()
    assert counting.graphs == graphs


def evaluated_is_the_average(parts: Parts, compute: Callable[[nn.Module], Tensor]) -> None:
    module = next(iter(parts.modules.values()))
    online = compute(copy.deepcopy(module).eval())
    averaged = copy.deepcopy(module).eval()
    averaged.load_state_dict({**module.state_dict(), **parts.ema[0].state_dict()})
    with parts.evaluated():
        evaluated = compute(module)
    torch.testing.assert_close(evaluated, compute(averaged), rtol=1e-4, atol=1e-5)
    assert float((evaluated - online).abs().max()) > 1e-2, "the online weights were evaluated"


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_ema_is_evaluated_and_differs_from_the_online_weights_under_compile(name: str, counting: Counting) -> None:
    _, parts, trainer, steps = assembled(f"configs/debug/{name}.yaml", *COMPILED)
    trainer.optimise(steps[0])
    batch = steps[0][0]

    def compute(module: nn.Module) -> Tensor:
        with torch.no_grad():
            if name == "stage1":
                return module(batch).xs_recon
            return module.backbone(batch.draws["noise"], batch.draws["t"], batch.condition)  # type: ignore[index, operator]

    module = next(iter(parts.modules.values()))
    compute(module)  # compiled code for evaluation is there already, made with the online weights
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    calls = counting.calls
    evaluated_is_the_average(parts, compute)
    assert counting.calls > calls, "a compiled block computed it"


def test_inductor_evaluates_the_average() -> None:
    _, parts, trainer, steps = assembled("configs/debug/stage2.yaml", *COMPILED)
    trainer.optimise(steps[0])
    batch = steps[0][0]
    with torch.no_grad():
        for p in parts.modules["stage2"].parameters():
            p.add_(torch.randn_like(p), alpha=0.3)

    def compute(module: nn.Module) -> Tensor:
        with torch.no_grad():
            return module.backbone(batch.draws["noise"], batch.draws["t"], batch.condition)  # type: ignore[index, operator]

    evaluated_is_the_average(parts, compute)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_reaches_compiled_blocks(precision: Any, counting: Counting) -> None:
    backend = backends.create("cpu", precision=precision)
    torch.manual_seed(0)
    block, x = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)), torch.randn(4, 32)
    with backend.autocast():
        eager = block(x)
    compiled = copy.deepcopy(block)
    backend.compile(compiled)
    with backend.autocast():
        y = compiled(x)
    assert y.dtype == eager.dtype != torch.float32
    assert torch.equal(y, eager)
    assert counting.calls == 1


def test_gradients_may_be_asked_for_twice() -> None:
    """As the adaptive weight of a GAN does, from its start on, where its layer is behind a compiled block."""
    torch.manual_seed(0)
    block, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(4, 8)
    loss = block(x).square().mean()
    expected = torch.autograd.grad(loss, list(block.parameters()))
    compile_in_place(block, "aot_eager")
    block(x).square().mean().backward()  # the steps before the discriminator's start
    block.zero_grad()
    loss = block(x).square().mean()
    first = torch.autograd.grad(loss, block[0].weight, retain_graph=True)[0]
    loss.backward()
    torch.testing.assert_close(first, expected[0])
    torch.testing.assert_close([p.grad for p in block.parameters()], list(expected))


def test_fp64_on_a_cpu_is_refused(cli: Any, tmp_path: Path, capfd: Any) -> None:
    place = ["--save-dir", tmp_path, "--project", "p", "--run-name", "r"]
    assert cli("train", "configs/debug/stage2.yaml", *place, *COMPILED, *FP64) == 2
    assert "train.precision: expected not fp64 with train.compile on a CPU" in capfd.readouterr().err


class Breaking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + float(x.sum())


def test_a_graph_break_is_one_line() -> None:
    block = Breaking()
    compile_in_place(block, "inductor")
    with pytest.raises(RunFailed, match="train.compile: Breaking cannot be compiled as one graph") as caught:
        block(torch.ones(3))
    assert "\n" not in str(caught.value)


def test_many_shapes_share_one_class(counting: Counting) -> None:
    """A U-Net has more shapes of one class of block than the library compiles unless it is told to."""
    convolutions = [nn.Conv2d(n, n, 1) for n in range(1, 13)]
    for n, block in enumerate(convolutions, start=1):
        backends.create("cpu").compile(block)
        torch.testing.assert_close(block(x := torch.ones(1, n, 2, 2)), block._call_impl(x))
    assert counting.graphs == 12, "also where the class is torch's own"


def test_no_cpp_compiler_is_one_line(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    place = ["--save-dir", tmp_path, "--project", "p", "--run-name", "r"]
    assert cli("train", "configs/debug/stage2.yaml", *place, *COMPILED) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line == (
        "error: train.compile: expected a C++ compiler for the CPU (install g++ or set CXX), found no no-such-compiler"
    )
    assert not list(tmp_path.rglob("config.yaml")), "nothing is left behind"


@pytest.mark.parametrize("key", ["compile", "activation_checkpointing"])
def test_a_model_without_blocks_is_refused(key: str) -> None:
    settings = TrainSettings(**{key: {"compile": True, "activation_checkpointing": "blocks"}[key]})
    with pytest.raises(BadInput, match=f"train.{key}: expected a model with repeated blocks, PixelStage1 has none"):
        check_blocks(PixelStage1(patch=2), settings)


@pytest.mark.slow
def test_two_ranks_and_a_resume_under_compile(cli: Any, tmp_path: Path) -> None:
    line = ["train", "configs/debug/stage2.yaml", "--project", "p", "--run-name", "r", "--pictures.every", "null"]
    line += [*COMPILED, "--train.steps", 10]
    for world in (1, 2):
        assert cli(*line, "--save-dir", tmp_path / str(world), "--world-size", world) == 0
    whole, shared = only(tmp_path / "1" / "p"), only(tmp_path / "2" / "p")
    for one, two in zip(without_times(whole), without_times(shared), strict=True):
        assert two["train/loss_total"] == pytest.approx(one["train/loss_total"], rel=1e-4)
        assert two["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-3)
    resume = ["--resume-ckpt", whole / "checkpoints" / "step_00000005"]
    assert cli(*line, "--save-dir", tmp_path / "half", *resume) == 0
    assert_same(tensors(whole, 10), tensors(only(tmp_path / "half" / "p"), 10))
