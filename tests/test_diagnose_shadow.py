"""The compile diagnostic on small decoders: what it calls bad, what it does not, and what it leaves as it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from rqvae.diagnostics.compilers import TorchCompiler, find_compiler
from rqvae.diagnostics.faults import FaultyCompiler
from rqvae.diagnostics.ledger import GraphCompiler
from rqvae.diagnostics.rows import Row
from rqvae.diagnostics.session import Diagnosis
from rqvae.diagnostics.subjects import RandomDecoder, Request, Subject
from rqvae.diagnostics.units import ROOT
from rqvae.errors import BadInput
from tests.diagnoses import Silent, diagnose, flagged, small


def test_a_healthy_compiler_is_called_healthy_and_really_ran() -> None:
    subject = small()
    rows = diagnose(subject, TorchCompiler("eager"))
    assert not flagged(rows)
    assert {row["status"] for row in rows.values()} == {"OK", "CONTAINER"}
    for path, row in rows.items():
        if row["status"] == "OK":
            assert row["backend_calls"] >= row["calls"] >= 1, path
        else:
            assert row["type"] == "ModuleList", path
    assert rows["mid_block.resnets.0.nonlinearity"]["calls"] == 2
    made = sum(row["timing"]["fresh_graphs"] or 0 for row in rows.values())
    assert made < sum(row["status"] == "OK" for row in rows.values())  # equal class and shape share a graph


def test_what_silently_runs_eager_is_not_ok() -> None:
    """Beyond torch's limit of versions: the eager fallback that the original tool reports as success."""
    with torch._dynamo.config.patch(recompile_limit=1):
        rows = diagnose(small(), TorchCompiler("eager"), versions=None)
    fallen = [row for row in rows.values() if row["status"] == "EAGER_FALLBACK"]
    assert len(fallen) > 2
    assert all(row["backend_calls"] == 0 and "NO_COMPILED_CODE_RAN" in row["notes"] for row in fallen)
    assert all(row["backend_calls"] >= 1 for row in rows.values() if row["status"] == "OK")


def test_the_decoder_is_left_as_it_was() -> None:
    subject = small()
    before = {
        name: (type(m), dict(m.__dict__["_forward_hooks"]), m.training) for name, m in subject.root.named_modules()
    }
    subject.root.get_submodule("mid_block").train()
    weights = {name: value.clone() for name, value in subject.root.state_dict().items()}
    image = subject.decode(subject.latent)
    rows = diagnose(subject, FaultyCompiler(["conv_in:nan"], inner="eager"))
    assert flagged(rows)
    for name, module in subject.root.named_modules():
        assert (type(module), dict(module._forward_hooks), not module._forward_pre_hooks) == (*before[name][:2], True)
        assert module._compiled_call_impl is None
    assert subject.root.get_submodule("mid_block").training
    assert not subject.root.conv_in.training
    assert all(torch.equal(weights[name], value) for name, value in subject.root.state_dict().items())
    subject.root.eval()
    assert torch.equal(subject.decode(subject.latent), image)


def test_group_norm_and_interpolate_in_one_graph() -> None:
    """The case of optimum-habana's pull request 2000: blank only where both are in one graph; a cut heals it."""
    compiler = FaultyCompiler(together=["group_norm", "interpolate"], inner="eager")
    subject = small(widths=(8, 16, 16, 16))
    with Diagnosis(subject, compiler) as diagnosis:
        rows = diagnosis.single(list(diagnosis.units), {}, "shadow", Silent())
        assert {r["path"] for r in rows if r["role"] == "interaction"} == {f"up_blocks.{i}" for i in range(3)}
        assert {r["path"] for r in rows if r["role"] == "inherited"} == {ROOT}
        cuts, tried = diagnosis.find_breaks(rows)
    assert {(cut.path, cut.before) for cut in cuts} == {(f"up_blocks.{i}", "upsamplers.0") for i in range(3)}
    assert len(tried) == 3


class Pair(TorchCompiler):
    """Right unless two modules' compiled code runs in one decode: then the later one's output is wrong."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__("eager")
        self._paths, self.ran = (first, second), False
        self._made: dict[str, GraphCompiler] = {}

    def graph_compiler(self, path: str) -> GraphCompiler:
        if path not in self._paths:
            return super().graph_compiler(path)
        return self._made.setdefault(path, lambda graph, _: self._watched(path, graph))

    def _watched(self, path: str, graph: torch.fx.GraphModule) -> Any:
        def call(*arguments: Any) -> Any:
            output = graph.forward(*arguments)
            first = path == self._paths[0]
            self.ran = self.ran or first
            return tuple(o * 0 for o in output) if self.ran and not first else output

        return call


def test_two_modules_that_fail_together_are_found_without_compiling_again() -> None:
    compiler = Pair("mid_block.resnets.0.conv1", "up_blocks.1.resnets.0.conv2")
    subject = small()
    decode = subject.decode

    def fresh(z: Tensor) -> Tensor:
        compiler.ran = False
        return decode(z)

    subject.decode = fresh
    with Diagnosis(subject, compiler) as diagnosis:
        leaves = [path for path, unit in diagnosis.units.items() if unit.leaf]
        assert not diagnosis.decode_with(["mid_block.resnets.0.conv1"]).is_bad
        assert not diagnosis.decode_with(["up_blocks.1.resnets.0.conv2"]).is_bad
        rows = diagnosis.single(leaves, {}, "shadow", Silent())
        for row in rows:
            row["status"] = "OK"  # the shadow decode runs both, too
        assert diagnosis.decode_with(leaves).is_bad
        graphs, decodes = len(diagnosis.ledger.graphs), diagnosis.decodes
        found = diagnosis.interactions(rows)
        assert found == [["mid_block.resnets.0.conv1", "up_blocks.1.resnets.0.conv2"]]
        assert len(diagnosis.ledger.graphs) == graphs
        assert diagnosis.decodes - decodes <= 19  # 18, and one more that finds the rest healthy


def test_top_down_and_auto_look_only_where_it_is_bad() -> None:
    compiler = FaultyCompiler(["up_blocks.0.resnets.1.norm2:scale"], inner="eager")
    rows = diagnose(small(), compiler, "top_down")
    assert flagged(rows, "culprit") == {"up_blocks.0.resnets.1.norm2"}
    skipped = [row for row in rows.values() if "SKIPPED_BY_TOP_DOWN" in row["notes"]]
    assert len(skipped) > 20
    healthy = diagnose(small(), TorchCompiler("eager"), "auto")
    assert healthy[ROOT]["status"] == "OK"
    assert sum("SKIPPED_BY_AUTO" in row["notes"] for row in healthy.values()) > 20


def test_overflow_is_named_at_the_first_module_and_blamed_on_no_compiler() -> None:
    subject = small(torch.float16)
    conv: nn.Conv2d = subject.root.get_submodule("up_blocks.0.resnets.1.conv2")  # type: ignore[assignment]
    conv.weight.mul_(1e6)
    rows = diagnose(subject, TorchCompiler("eager"))
    over = {path: row["role"] for path, row in rows.items() if row["status"] == "EAGER_NONFINITE"}
    assert [path for path, role in over.items() if role == "culprit"] == ["up_blocks.0.resnets.1.conv2"]
    assert over[ROOT] == "inherited"
    assert not flagged(rows)
    wide = small()
    wide.root.get_submodule("up_blocks.0.resnets.1.conv2").weight.mul_(1e6)  # type: ignore[operator, union-attr]
    assert {row["status"] for row in diagnose(wide, TorchCompiler("eager")).values()} == {"OK", "CONTAINER"}


def test_a_layer_near_the_end_of_its_type_is_a_risk() -> None:
    """Within a factor of 4 of 65504 in fp16."""
    root = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Identity()).eval().half()
    latent = torch.ones(1, 4, 4, 4, dtype=torch.float16)
    for value, notes in ((4000.0, []), (4200.0, ["OVERFLOW_RISK"])):  # four of them are summed
        nn.init.constant_(root[0].weight, value)
        nn.init.zeros_(root[0].bias)
        rows = diagnose(Subject(root, "decoder", latent, root, "odd"), TorchCompiler("eager"), paths=["0"])
        assert rows["0"]["notes"] == notes, value


def test_code_that_is_slower_compiled_is_noted() -> None:
    class Slow(TorchCompiler):
        def __init__(self) -> None:
            super().__init__("eager")
            self._slow: GraphCompiler = lambda graph, _: lambda *inputs: (time.sleep(0.05), graph.forward(*inputs))[1]

        def graph_compiler(self, path: str) -> GraphCompiler:
            return self._slow if path == "conv_in" else super().graph_compiler(path)

    rows = diagnose(small(), Slow(), paths=["conv_in", "conv_out"])
    assert (rows["conv_in"]["notes"], rows["conv_out"]["notes"]) == (["SLOWER"], [])
    assert rows["conv_in"]["timing"]["speed_up"] < 1


class Odd(nn.Module):
    """What decoders may have: an in-place activation, an identity, an unused module, a list, a print in the way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.same = nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Identity()
        self.unused, self.held = nn.Linear(2, 2), nn.Sequential(nn.SiLU())
        self.named = nn.ModuleDict({"act": nn.SiLU()})

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h = self.act(h)
        torch._dynamo.graph_break()
        self.named["act"](h[..., :2])  # a second shape of a module that is called twice
        return self.same(self.held[0](h) + self.named["act"](h))


def test_odd_modules() -> None:
    torch.manual_seed(0)
    root = Odd().eval()
    latent = torch.randn(1, 4, 6, 6)
    rows = diagnose(Subject(root, "decoder", latent, lambda z: root(z), "odd"), TorchCompiler("eager"))
    statuses = {path: row["status"] for path, row in rows.items()}
    assert statuses["act"] == "OK"  # compared on a copy of its input, which eager had changed
    assert statuses["unused"] == "NOT_EXERCISED"
    assert statuses["held"] == statuses["named"] == "CONTAINER"
    assert rows["named.act"]["notes"] == ["RECOMPILES"]
    assert rows["named.act"]["signatures"] == ["(float32 (1, 3, 6, 2))", "(float32 (1, 3, 6, 6))"]
    assert statuses["same"] == "EAGER_FALLBACK"  # there is nothing in it to compile, and no OK without compiled code
    assert statuses[ROOT] == "OK"
    assert "GRAPH_BREAKS" in rows[ROOT]["notes"]
    assert any("test_diagnose_shadow.py" in line for line in rows[ROOT]["graph_breaks"][0]["lines"])


def test_a_module_without_operations_does_not_make_the_next_ones_eager() -> None:
    """dynamo skips a code object for good once it held nothing to compile; leaves do not share an identity's."""
    torch.manual_seed(0)
    root = nn.Sequential(nn.Identity(), nn.Conv2d(4, 3, 1), nn.SiLU(), nn.Conv2d(3, 3, 1), nn.Identity()).eval()
    rows = diagnose(Subject(root, "decoder", torch.randn(1, 4, 4, 4), root, "odd"), TorchCompiler("eager"))
    assert [rows[path]["status"] for path in "01234"] == ["EAGER_FALLBACK", "OK", "OK", "OK", "EAGER_FALLBACK"]


def peak_bytes(call: Callable[[], object]) -> int:
    """Most memory that torch's CPU allocator had given out at a time within the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


def test_beside_the_decode_it_takes_two_activations_and_5_mb() -> None:
    """All units of a decode whose activations together are 30 times the largest one."""
    subject = RandomDecoder("random-small").subject(Request(latent_size=16))
    sizes: list[int] = []
    handles = [m.register_forward_hook(lambda *call: sizes.append(call[-1].nbytes)) for m in subject.root.modules()]
    with torch.no_grad():
        subject.decode(subject.latent)
        for handle in handles:
            handle.remove()
        plain = peak_bytes(lambda: subject.decode(subject.latent))
    assert sum(sizes) > 30 * max(sizes)
    extra = peak_bytes(lambda: diagnose(subject, TorchCompiler("eager"))) - plain
    assert 0 < extra <= 2 * max(sizes) + 5e6


def bytes_at_marks(call: Callable[[], object]) -> dict[str, int]:
    """Memory that torch's CPU allocator has given out at each `record_function("at ...")`, the last of each name."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    marks, given_out = {}, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            given_out += event.nbytes()
        elif event.name().startswith("at "):
            marks[event.name()] = given_out
    return marks


def mark(path: str) -> None:
    with record_function(f"at {path}"):
        pass


class MarksRows(Silent):
    def row(self, row: Row) -> None:
        mark(row["path"])


def test_memory_is_back_after_each_unit() -> None:
    """When a unit's row is known, the process holds what a plain decode holds after that module: nothing of the unit's
    compiled call is left, up to the few numbers of its figures."""
    subject = RandomDecoder("random-small").subject(Request(latent_size=16))
    begin = subject.root.register_forward_pre_hook(lambda *_: mark("the start"))
    after = [
        module.register_forward_hook(lambda *_, path=path: mark(path)) for path, module in subject.root.named_modules()
    ]
    with torch.no_grad():
        plain = bytes_at_marks(lambda: subject.decode(subject.latent))
    for handle in after:
        handle.remove()
    with Diagnosis(subject, TorchCompiler("eager")) as diagnosis:
        paths = list(diagnosis.units)[::4]
        found = bytes_at_marks(lambda: diagnosis.single(paths, {}, "shadow", MarksRows()))
    begin.remove()
    tested = [f"at {path}" for path in paths if f"at {path}" in plain]
    assert len(tested) > 15
    left = {name: found[name] - found["at the start"] - plain[name] + plain["at the start"] for name in tested}
    assert max(left.values()) < 64 * 1024, max(left.items(), key=lambda item: item[1])


def test_same_seed_same_verdicts() -> None:
    compiler = FaultyCompiler(["conv_in:round"], inner="eager")
    first, second = (diagnose(small(), compiler, paths=["conv_in", "conv_out", "mid_block"]) for _ in range(2))
    for path, row in first.items():
        assert {k: v for k, v in row.items() if k not in ("timing", "notes")} == {
            k: v for k, v in second[path].items() if k not in ("timing", "notes")
        }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere.Compiler", "expected the path of a class"),
        ("rqvae.diagnostics.faults.KINDS", "expected a rqvae.diagnostics.compilers.Compiler"),
        ("{", "expected JSON"),
        ('{"class_path": "rqvae.diagnostics.faults.FaultyCompiler", "init_args": {"a": 1}}', "unexpected keyword"),
        ('{"class_path": "rqvae.diagnostics.faults.FaultyCompiler", "init_args": {"faults": ["a:b"]}}', "got a:b"),
    ],
)
def test_compilers_that_cannot_be(text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        find_compiler(text)


def test_an_unknown_compiler_and_one_without_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="--backend: expected one of .*inductor"):
        TorchCompiler("inductr").check("cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BadInput, match="no-such-compiler") as error:
        TorchCompiler("inductor").check("cpu")
    assert "\n" not in str(error.value)
