"""Parts of the compile diagnostic without a compiler: units, paths, blank images, the verdict rule, the searches."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder
from PIL import Image
from torch import nn

from rqvae.diagnostics.blank import is_blank
from rqvae.diagnostics.compare import Status, judge
from rqvae.diagnostics.compiled import sharing_clone
from rqvae.diagnostics.cuts import relative_path
from rqvae.diagnostics.plan import CompilePlan, read_plan
from rqvae.diagnostics.search import all_smallest_failing, delta_debugging, prefix_bisection, smallest_failing
from rqvae.diagnostics.summary import summarise
from rqvae.diagnostics.units import ROOT, Unit, covering, is_inside, parse_paths, select, tree_json, tree_text, walk
from rqvae.errors import BadInput


@pytest.fixture(scope="module")
def sdxl() -> list[Unit]:
    """The decoder of Stable Diffusion XL, without numbers."""
    with torch.device("meta"):
        decoder = Decoder(
            in_channels=4,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    return walk(decoder)


def test_the_decoder_of_sdxl_has_the_known_sizes(sdxl: list[Unit]) -> None:
    inside = [unit for unit in sdxl if unit.path != ROOT]
    assert len(inside) == 133
    assert sum(unit.leaf for unit in inside) == 99
    assert sum(unit.container for unit in inside) == 11
    kinds = [unit.type_name for unit in inside]
    assert (kinds.count("Conv2d"), kinds.count("GroupNorm"), kinds.count("ResnetBlock2D")) == (35, 30, 14)


def test_an_empty_list_among_the_children_makes_no_leaf() -> None:
    root = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ModuleList()))
    assert {unit.path: unit.leaf for unit in walk(root)} == {ROOT: False, "0": True, "1": False, "1.0": True}
    assert [unit.path for unit in select(walk(root), "leaf")] == ["0", "1.0"]


def test_compile_except_covers_all_but_each_testable_path(sdxl: list[Unit]) -> None:
    """Every leaf outside the excluded path lies in exactly one compiled unit, and nothing of the path does."""
    leaves = [unit.path for unit in sdxl if unit.leaf and not unit.container]
    testable = [unit.path for unit in sdxl if not unit.container and unit.path != ROOT]
    assert len(testable) == 122
    for excluded in testable:
        chosen = [unit.path for unit in covering(sdxl, [excluded])]
        for leaf in leaves:
            times = sum(is_inside(leaf, path) for path in chosen)
            assert times == (0 if is_inside(leaf, excluded) else 1), (excluded, leaf)


def test_two_excluded_paths_are_one_set(sdxl: list[Unit]) -> None:
    chosen = {unit.path for unit in covering(sdxl, ["mid_block.resnets.0.conv1", "conv_in"])}
    assert "mid_block.resnets.0.norm1" in chosen
    assert not chosen & {"mid_block", "mid_block.resnets.0", "mid_block.resnets.0.conv1", "conv_in"}
    assert "up_blocks.0" in chosen
    assert "up_blocks.0.resnets.0" not in chosen


def test_paths_from_a_file_and_from_a_list(sdxl: list[Unit], tmp_path: Path) -> None:
    file = tmp_path / "paths.txt"
    file.write_text("# what is bad\n\n  mid_block \nconv_in  # the first\nmid_block\n")
    assert parse_paths(str(file), sdxl, "--test_paths") == ["mid_block", "conv_in"]
    assert parse_paths(" mid_block, ,conv_in ,", sdxl, "--test_paths") == ["mid_block", "conv_in"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("mid_blok", "did you mean mid_block"), (" , ", "at least one path"), ("nowhere.txt", "no file nowhere.txt")],
)
def test_paths_that_cannot_be(sdxl: list[Unit], text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        parse_paths(text, sdxl, "--test_paths")


def test_the_lists_of_submodules(sdxl: list[Unit]) -> None:
    assert len(tree_text(sdxl).splitlines()) == 134
    listed = {entry["path"]: entry for entry in tree_json(sdxl)}
    assert listed["up_blocks"]["compilable"] is False
    assert listed["conv_in"]["parameters"] == 4 * 512 * 9 + 512
    twice = nn.Sequential(act := nn.SiLU(), act)
    assert tree_json(walk(twice))[1]["also_at"] == ["1"]


def test_clones_share_weights_and_nothing_else() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    clone = sharing_clone(module)
    pointers = [t.data_ptr() for t in (*module.parameters(), *module.buffers())]
    assert [t.data_ptr() for t in (*clone.parameters(), *clone.buffers())] == pointers
    assert clone[0] is not module[0]


GREY = torch.full((3, 8, 8), 0.5)
NOISE = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("image", "options", "blank"),
    [
        (GREY, {}, True),
        (NOISE, {}, False),
        (NOISE[:1], {}, False),
        (torch.stack([NOISE, GREY]), {}, True),
        (torch.zeros(1, 3, 4, 4), {}, True),
        (NOISE * 1e-5, {"std_threshold": 0}, False),
        (torch.cat([NOISE, -NOISE], 2), {}, True),  # a mean of zero
        (GREY.clone().index_fill_(2, torch.tensor([0]), 0.9), {"outlier_tolerance": 0.2}, True),
        (GREY.clone().index_fill_(2, torch.tensor([0]), 0.9), {}, False),
        (GREY.clone().index_fill_(2, torch.tensor([0]), 0.9), {"constant_value": 0.5, "outlier_tolerance": 0.2}, True),
        (GREY.clone().index_fill_(2, torch.tensor([0]), 0.9), {"constant_value": 0.4, "outlier_tolerance": 0.2}, False),
        (Image.new("RGB", (8, 8), (9, 9, 9)), {}, True),
        (Image.new("L", (8, 8), 200), {}, True),
        (Image.fromarray((NOISE * 255).byte().permute(1, 2, 0).numpy()), {}, False),
    ],
)
def test_blank_images(image: object, options: dict[str, float], blank: bool) -> None:
    assert is_blank(image, **options) is blank


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((3, 4, 4)), "expected a tensor or a PIL image, got ndarray"),
        (torch.empty(3, 0, 4), "empty"),
        (torch.zeros(4, 4), "expected 3 or 4 dimensions, got 2"),
        (torch.zeros(2, 4, 4), "expected 1 or 3 channels, got 2"),
    ],
)
def test_what_is_no_image(image: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        is_blank(image)


def test_figures_of_a_difference_in_closed_form() -> None:
    eager = torch.tensor([3.0, 4.0, 0.0, 0.0])
    figures = judge(eager, eager + torch.tensor([0.0, 0.0, 0.0, 0.5])).figures
    assert figures is not None
    assert figures.max_abs == 0.5
    assert figures.mean_abs == 0.125
    assert figures.relative_l2 == pytest.approx(0.1)
    assert figures.sqnr == pytest.approx(20.0)
    assert figures.psnr == pytest.approx(10 * math.log10(16 / (0.25 / 4)))
    assert figures.cosine == pytest.approx(25 / (5 * math.sqrt(25.25)))
    assert figures.headroom_bits == pytest.approx(math.log2(torch.finfo(torch.float32).max / 4))


def test_figures_over_several_chunks_are_those_of_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    eager = torch.randn(3, 700_001, generator=draw)
    compiled = eager + 1e-3 * torch.randn(3, 700_001, generator=draw)
    figures = judge(eager, compiled).figures
    assert figures is not None
    assert figures.relative_l2 == pytest.approx(float((compiled - eager).norm() / eager.norm()), rel=1e-4)
    assert figures.std == pytest.approx(float(compiled.std(correction=0)), rel=1e-5)
    flat = torch.nn.functional.cosine_similarity(eager.flatten().double(), compiled.flatten().double(), dim=0)
    assert figures.cosine == pytest.approx(float(flat), abs=1e-9)


def test_statuses_of_outputs() -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    expected = {
        Status.OK: x * (1 + 1e-6),
        Status.MISMATCH: x * 1.01,
        Status.BLANK: torch.full_like(x, 0.3),
        Status.NONFINITE: torch.where(x > 0, x, float("nan")),
        Status.SHAPE: x[:1],
        Status.DTYPE: x.double(),
    }
    for status, compiled in expected.items():
        assert judge(x, compiled).status is status, status
    assert judge((x, [x]), (x,)).status is Status.SHAPE
    assert judge((x, [x]), (x, [x * 2])).status is Status.MISMATCH
    assert judge(torch.zeros(3), torch.zeros(3)).status is Status.OK


def test_bf16_is_judged_by_its_distance_to_fp32() -> None:
    """As far from the fp32 result as eager bf16 is healthy, ten times as far is not; a flat 1e-4 would flag both."""
    gold = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    eager = gold.bfloat16()
    other_rounding = (gold * (1 + 2**-9)).bfloat16()
    assert not torch.allclose(eager.float(), other_rounding.float(), atol=1e-4, rtol=1e-4)
    assert judge(eager, other_rounding, gold).status is Status.OK
    assert judge(eager, (gold * 1.03).bfloat16(), gold).status is Status.MISMATCH


class Fails:
    """Fails where all of a hidden set is there; counts how often it is asked."""

    def __init__(self, *culprits: Sequence[int]) -> None:
        self.culprits, self.asked = [set(c) for c in culprits], 0

    def __call__(self, items: Sequence[int]) -> bool:
        self.asked += 1
        return any(c <= set(items) for c in self.culprits)


@pytest.mark.parametrize(("size", "most"), [(1, 10), (2, 18), (3, 26)])
def test_prefix_bisection_is_exact_and_asks_little(size: int, most: int) -> None:
    draw = random.Random(size)
    for _ in range(50):
        fails = Fails(culprit := draw.sample(range(83), size))
        assert fails(range(83))
        assert prefix_bisection(range(83), fails) == sorted(culprit)
        assert fails.asked <= most


def test_delta_debugging_where_failing_is_not_monotone() -> None:
    """7 heals unless all are there: bisection is led astray, the fallback has nothing to spare."""

    def fails(items: Sequence[int]) -> bool:
        return {3, 11} <= set(items) and (7 not in items or len(items) == 16)

    assert prefix_bisection(range(16), fails) != [3, 11]
    assert sorted(smallest_failing(range(16), fails)) == [3, 11]
    assert delta_debugging([1, 2, 3, 4], Fails([2, 4])) == [2, 4]


def test_independent_sets_are_found_one_after_the_other() -> None:
    assert sorted(map(sorted, all_smallest_failing(range(30), Fails([4], [9, 20])))) == [[4], [9, 20]]


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['block']._modules['resnets']._modules['0'].norm1", "resnets.0.norm1"),
        ("L['self'].up.conv", "up.conv"),
        ("getattr(L['self'].layers, '0')", "layers.0"),
        ("L['block']", ""),
    ],
)
def test_the_names_of_dynamo_become_paths(source: str, path: str) -> None:
    assert relative_path(source) == path


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = CompilePlan("decoder", "aot_eager", ["conv_in", "mid"], {"mid": ["1"]}, ["conv_out"], "test")
    plan.write(tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == plan


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a", "expected keys and values, got list"),
        ("compiel: []", "compiel: unknown"),
        ("compile: conv_in", "compile: expected list, got str"),
        ("compile: [a, a.b]", "got a.b inside a"),
        ("a: [", "expected YAML"),
    ],
)
def test_plans_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(BadInput, match=words):
        read_plan(tmp_path / "plan.yaml")


def test_every_row_is_counted_once() -> None:
    """For any mix of statuses, also none: the counts sum to the total."""
    for mix in itertools.chain([[]], itertools.combinations_with_replacement(list(Status), 3)):
        rows = [
            {"path": str(i), "type": "T", "status": s.value, "role": None, "error": None, "image": None}
            for i, s in enumerate(mix)
        ]
        summary = summarise(rows)
        parts = [summary[name] for name in ("compiled", "failed", "blank", "untested")]
        assert sum(parts) == summary["total"] == len(mix)
        assert min(parts) >= 0
