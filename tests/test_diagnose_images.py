"""Verdicts on whole images, decoded with chosen modules compiled: in low precision, after overflow, and where nothing
compiled ran."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from rqvae.diagnostics.compare import Status
from rqvae.diagnostics.compilers import TorchCompiler
from rqvae.diagnostics.faults import FaultyCompiler
from rqvae.diagnostics.ledger import GraphCompiler
from rqvae.diagnostics.session import Diagnosis
from rqvae.diagnostics.subjects import RandomDecoder, Request, Subject
from rqvae.diagnostics.units import ROOT
from tests.diagnoses import Silent, diagnose, small

NORMS = ["mid_block.resnets.0.norm1", "mid_block.resnets.0.norm2", "up_blocks.0.resnets.0.norm1", "conv_norm_out"]


class Drawing(TorchCompiler):
    """Rounds up or down at random, the nearer the likelier, as accelerators may (stochastic rounding): healthy."""

    def __init__(self) -> None:
        super().__init__("eager")
        self._made: GraphCompiler = lambda graph, _: lambda *given: tuple(map(self._draw, graph.forward(*given)))
        self._generator = torch.Generator().manual_seed(0)

    def graph_compiler(self, path: str) -> GraphCompiler:
        return self._made

    def _draw(self, output: Tensor) -> Tensor:
        step = torch.finfo(output.dtype).eps * output.float().abs().log2().floor().exp2()
        off = torch.rand(output.shape, generator=self._generator) - 0.5
        return (output.float() + off * step).to(output.dtype)


def rows_of(diagnosis: Diagnosis, paths: Sequence[str]) -> list[dict]:
    return diagnosis.single(paths, {}, "shadow", Silent())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_healthy_code_of_low_precision_makes_no_bad_image(dtype: torch.dtype) -> None:
    """It rounds otherwise than eager code, so that images differ by more than a flat 1e-4; that is no interaction."""
    subject = small(dtype)
    state = {name: value.clone() for name, value in subject.root.state_dict().items()}
    places = {name: value.data_ptr() for name, value in subject.root.state_dict().items()}
    with Diagnosis(subject, Drawing()) as diagnosis:
        rows = rows_of(diagnosis, NORMS)
        assert {row["status"] for row in rows} == {"OK"}
        assert diagnosis.interactions(rows) == []
        decoded = diagnosis.decode_with(NORMS)
        assert decoded.verdict.status is Status.OK
        figures = decoded.verdict.figures
        assert figures is not None
        assert figures.relative_l2 > 1e-4  # what a flat tolerance would have flagged
    after = subject.root.state_dict()
    assert all(torch.equal(after[name], value) and value.dtype == dtype for name, value in state.items())
    assert {name: value.data_ptr() for name, value in after.items()} == places


@pytest.mark.slow
def test_healthy_inductor_code_makes_no_interaction() -> None:
    """Its norms and activations in bf16: each is right, and so is the image with all of them."""
    subject = RandomDecoder("random-small").subject(Request(latent_size=8, dtype=torch.bfloat16))
    with Diagnosis(subject, TorchCompiler("inductor")) as diagnosis:
        kinds = (nn.GroupNorm, nn.SiLU)
        paths = [path for path, unit in diagnosis.units.items() if isinstance(unit.module, kinds)]
        rows = rows_of(diagnosis, paths)
        assert {row["status"] for row in rows} == {"OK"}
        assert diagnosis.interactions(rows) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_is_still_seen_in_the_image(dtype: torch.dtype) -> None:
    subject = small(dtype)
    with Diagnosis(subject, FaultyCompiler(["mid_block.resnets.0.conv1:flip"], inner="eager")) as diagnosis:
        assert diagnosis.decode_with(["mid_block.resnets.0.conv1"]).verdict.status is Status.MISMATCH
        assert diagnosis.decode_with(["mid_block.resnets.0.norm1"]).verdict.status is Status.OK


def test_after_overflow_images_say_nothing_and_nothing_is_searched() -> None:
    subject = small(torch.float16)
    subject.root.get_submodule("up_blocks.0.resnets.1.conv2").weight.mul_(1e6)  # type: ignore[operator, union-attr]
    with Diagnosis(subject, TorchCompiler("eager")) as diagnosis:
        rows = rows_of(diagnosis, list(diagnosis.units))
        assert diagnosis.overflows
        before = diagnosis.decodes
        assert diagnosis.interactions(rows) == []
        assert diagnosis.decodes == before
        assert diagnosis.decode_with(["conv_in"]).verdict.status is Status.EAGER_NONFINITE


def test_the_image_with_nothing_compiled_is_not_ok() -> None:
    with Diagnosis(small(), TorchCompiler("eager")) as diagnosis:
        for name, eager, compiled in diagnosis.exclusions([ROOT]):
            decoded = diagnosis.decode_with(compiled)
            if name == "combined":
                assert (eager, compiled, decoded.notes) == ([ROOT], [], ["NOTHING_COMPILED"])
                assert decoded.verdict.status is Status.NOT_EXERCISED
            else:
                assert decoded.verdict.status is Status.OK
                assert decoded.counts() == {"calls": 1, "backend_calls": 1}


def test_what_silently_runs_eager_in_a_decode_is_not_ok() -> None:
    """Beyond torch's limit of versions, as for units; `nn.Identity`, in which nothing can be compiled, is no such."""
    same, larger = "mid_block.resnets.0.conv1", "up_blocks.0.upsamplers.0.conv"  # of one class, on inputs of two shapes
    with torch._dynamo.config.patch(recompile_limit=1), Diagnosis(small(), TorchCompiler("eager"), versions=None) as d:
        decoded = d.decode_with([same, larger])
        assert decoded.verdict.status is Status.EAGER_FALLBACK
        assert decoded.notes == [f"NO_COMPILED_CODE_RAN {larger}"]
        assert {run.unit.path: run.backend_calls for run in decoded.runs} == {same: 1, larger: 0}
    root = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Identity()).eval()
    with Diagnosis(Subject(root, "decoder", torch.randn(1, 4, 4, 4), root, "odd"), TorchCompiler("eager")) as d:
        assert d.decode_with(["0", "1"]).verdict.status is Status.OK
        assert d.decode_with(["1"]).verdict.status is Status.EAGER_FALLBACK


@pytest.mark.parametrize(("kind", "status"), [("compile_raise", "COMPILE_ERROR"), ("runtime_raise", "RUNTIME_ERROR")])
def test_errors_of_a_decode_are_kept_like_those_of_a_unit(kind: str, status: str) -> None:
    target = "up_blocks.0.resnets.0.conv1"
    compiler = FaultyCompiler([f"{target}:{kind}"], inner="eager")
    naive = diagnose(small(), compiler, "naive", [target])[target]
    with Diagnosis(small(), compiler) as diagnosis:
        decoded = diagnosis.decode_with(["conv_in", target])
    assert (naive["status"], decoded.verdict.status.value) == (status, status)
    for error in (naive["error"], decoded.error):
        assert error is not None
        assert (error["class"], error["kind"], error["path"]) == ("Conv2d", "RuntimeError", target)
        assert error["parents"] == [ROOT, "up_blocks", "up_blocks.0", "up_blocks.0.resnets", "up_blocks.0.resnets.0"]
        assert "float32 (1, 16, 8, 8)" in error["signature"]
        assert error["trace"]
