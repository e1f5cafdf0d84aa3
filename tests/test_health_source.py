"""Log, config and source together: defects of a latent diffusion, re-created, renamed and repaired."""

from __future__ import annotations

import ast
import keyword
from pathlib import Path

import numpy as np
import pytest
import torch

from rqvae.errors import BadInput
from rqvae.health.schedules import Schedule
from rqvae.health.settings import read_settings
from rqvae.health.source import read_source
from tests.health_logs import ids
from tests.health_sources import CONFIG, MODEL, PROGRAM, examined

DEFECTS = {
    "latents mapped by 2x - 1": {"NORM.LATENTS_SHIFTED", "NORM.ASYMMETRIC"},
    "VAE fed [0, 1]": {"VAE.INPUT_RANGE"},
    "clamp in latent space": {"DIFF.CLAMP_IN_LATENT"},
    "denormalised twice": {"NORM.DENORMALISED_TWICE"},
    "class-blind condition": {"COND.CLASS_BLIND"},
    "null is a class": {"COND.NULL_IS_A_CLASS"},
    "no list of classes: class 0 always": {"COND.SAMPLER_ONE_CLASS"},
    "split by class list": {"DATA.LEAK"},
    "NaN hidden": {"NUM.NAN_MASKED"},
    "one cycle of 2 steps, anew on resume": {"OPT.SCHEDULE_WARMUP_SKIPPED", "OPT.SCHEDULE_RESUME_NEW"},
    "average not begun": {"EMA.NOT_STARTED"},
    "trained on mixtures, sampled on single classes": {"COND.TRAIN_SAMPLE_MISMATCH"},
    "dead config key": {"LOG.DEAD_KEY"},
    "time in evaluation, verbose": {"PERF.EVAL_SHARE", "LOG.VERBOSITY"},
    "nothing logged, a blank image": {"LOG.MISSING_LR", "LOG.MISSING_GRAD", "EVAL.MISSING", "DATA.BLANK_IMAGE"},
}
SOURCE_RULES = {
    "NORM.LATENTS_SHIFTED", "NORM.ASYMMETRIC", "VAE.INPUT_RANGE", "DIFF.CLAMP_IN_LATENT", "NORM.DENORMALISED_TWICE",
    "COND.CLASS_BLIND", "COND.NULL_IS_A_CLASS", "COND.SAMPLER_ONE_CLASS", "DATA.LEAK", "NUM.NAN_MASKED",
    "OPT.SCHEDULE_RESUME_NEW", "LOG.DEAD_KEY", "LOG.LR_READ_WRONG", "EMA.NOT_STARTED",
}  # fmt: skip
REPAIRS = [
    ("return self.objective(stretch(pictures), t, tissue)", "return self.objective(pictures, t, tissue)"),
    ("self.vae.encode(pictures)", "self.vae.encode(pictures * 2 - 1)"),
    ("hold=True", "hold=False"),
    ("shown = pictures * 0.5 + 0.5", "shown = pictures"),
    ("(inside.repeat(1, 8, 1, 1) > 0).float()", "F.one_hot(inside.long()).float()"),
    ("nn.Embedding(classes, width)", "nn.Embedding(classes + 1, width)"),
    ("return torch.tensor([1.0])", 'raise ValueError("expected classes")'),
    ("lists[label].append(name)", "lists[label].append((name, label))"),
    ("guess = torch.nan_to_num(guess)", "guess = guess"),
    ("wanted = torch.nan_to_num(wanted)", "wanted = wanted"),
    ("max_lr=self.rate, total_steps=left", "max_lr=self.rate, total_steps=self.total"),
    ("self.make_loader(batch_size)", "self.make_loader(batch_size, num_workers, config)"),
    (
        'train_num_steps=settings["train_num_steps"],',
        'train_num_steps=settings["train_num_steps"], every=settings["save_and_sample_every"],',
    ),
    ("self.scheduler.get_lr()", "self.scheduler.get_last_lr()"),
    ("from ema_pytorch import EMA", "from mine import EMA"),
]


def test_all_defects_are_found_with_their_places(tmp_path: Path) -> None:
    found = examined(tmp_path)
    missed = {name for name, any_of in DEFECTS.items() if not any_of & ids(found)}
    assert not missed
    for finding in found.findings:
        if finding.check.id in SOURCE_RULES:
            assert any(e.line for e in finding.evidence), finding.check.id
    (dead,) = (f for f in found.findings if f.check.id == "LOG.DEAD_KEY")
    assert "num_workers: 16" in dead.found.message


def test_the_rates_of_the_smoke_test_are_told(tmp_path: Path) -> None:
    (skipped,) = (f for f in examined(tmp_path).findings if f.check.id == "OPT.SCHEDULE_WARMUP_SKIPPED")
    assert "8.1e-05, 4e-10" in skipped.found.message


def test_repaired_code_is_silent(tmp_path: Path) -> None:
    model, program = MODEL, PROGRAM
    for old, new in REPAIRS:
        assert old in model + program, old
        model, program = model.replace(old, new), program.replace(old, new)
    assert not ids(examined(tmp_path, model, program)) & SOURCE_RULES


@pytest.mark.parametrize("index", range(len(REPAIRS)))
def test_one_repair_silences_nothing_else(tmp_path: Path, index: int) -> None:
    old, new = REPAIRS[index]
    before = ids(examined(tmp_path)) & SOURCE_RULES
    (tmp_path / "again").mkdir()
    after = ids(examined(tmp_path / "again", MODEL.replace(old, new), PROGRAM.replace(old, new))) & SOURCE_RULES
    assert len(before - after) <= 4
    assert after <= before


class Rename(ast.NodeTransformer):
    """Other names for all that the source defines itself; what libraries and config call theirs stays."""

    def __init__(self, tree: ast.AST) -> None:
        kept = {
            "forward",
            "__init__",
            "self",
            "torch",
            "nn",
            "F",
            "EMA",
            "OneCycleLR",
            "train_test_split",
            "yaml",
            "partial",
        }
        kept |= {"encode", "decode", "load_state_dict", "get_lr", "num_workers"}
        own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        own |= {a.arg for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) for a in n.args.args}
        own |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        self.names = {
            name: f"q{i}_{name[::-1]}" for i, name in enumerate(sorted(own - kept)) if not keyword.iskeyword(name)
        }

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if not (isinstance(node.value, ast.Name) and node.value.id in ("torch", "nn", "F")):
            node.attr = self.names.get(node.attr, node.attr)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = self.names.get(node.name, node.name)
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.name = self.names.get(node.name, node.name)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg = self.names.get(node.arg, node.arg)
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        self.generic_visit(node)
        if node.arg:
            node.arg = self.names.get(node.arg, node.arg)
        return node


def test_renamed_code_is_found_too(tmp_path: Path) -> None:
    tree = ast.parse(MODEL + PROGRAM)
    renamed = ast.unparse(Rename(tree).visit(tree))
    assert "stretch" not in renamed
    assert "objective" not in renamed
    plain = ids(examined(tmp_path)) & SOURCE_RULES
    (tmp_path / "again").mkdir()
    assert ids(examined(tmp_path / "again", "", renamed)) & SOURCE_RULES == plain


OWN_ENCODER = """
class Own(nn.Module):
    def encode(self, pictures):
        return self.layers(self.centred(pictures))

    def centred(self, pictures):
        count, channels, height, width = pictures.shape
        self.check(height, width)
        return 2 * pictures - 1
"""
SCALAR = """
def quantile(probability: float, steps: int):
    return math.tan(2 * probability - 1) / steps
"""


@pytest.mark.parametrize(
    ("old", "new", "gone"),
    [
        ("torch.nan_to_num(guess)\n", "torch.nan_to_num(guess, nan=torch.inf)\n", "NUM.NAN_MASKED"),
        ("torch.nan_to_num(guess)\n", "guess.nan_to_num(torch.inf)\n", "NUM.NAN_MASKED"),
    ],
)
def test_nan_that_becomes_infinity_is_not_hidden(old: str, new: str, gone: str, tmp_path: Path) -> None:
    assert old in MODEL
    model = MODEL.replace(old, new).replace("wanted = torch.nan_to_num(wanted)", "wanted = wanted")
    assert gone not in ids(examined(tmp_path, model))


def test_an_encoder_of_the_source_that_centres_images_itself(tmp_path: Path) -> None:
    """Then images are not encoded raw, and 2x - 1 elsewhere is not said to be of latents."""
    shifted = {"NORM.LATENTS_SHIFTED", "NORM.ASYMMETRIC", "VAE.INPUT_RANGE"}
    assert ids(examined(tmp_path)) >= shifted
    (tmp_path / "again").mkdir()
    assert not ids(examined(tmp_path / "again", MODEL + OWN_ENCODER)) & shifted


def test_a_number_is_no_latent(tmp_path: Path) -> None:
    (old, new), *_ = REPAIRS
    model, program = (text.replace(old, new) + SCALAR for text in (MODEL, PROGRAM))
    assert "NORM.LATENTS_SHIFTED" not in ids(examined(tmp_path, model, program))
    (tmp_path / "again").mkdir()
    tensor = model.replace("probability: float", "probability")
    assert "NORM.LATENTS_SHIFTED" in ids(examined(tmp_path / "again", tensor, program))


def test_a_schedule_of_the_config_goes_before_one_in_the_source(tmp_path: Path) -> None:
    assert "OPT.SCHEDULE_WARMUP_SKIPPED" in ids(examined(tmp_path))
    (tmp_path / "again").mkdir()
    config = CONFIG + "\nlr_policy:\n  schedule_class: mine.Constant\n"
    assert "OPT.SCHEDULE_WARMUP_SKIPPED" not in ids(examined(tmp_path / "again", config=config))


def test_one_cycle_is_that_of_torch() -> None:
    for total in (2, 50, 1000):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-4, total_steps=total)
        expected = []
        for _ in range(total):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if len(expected) < total:
                schedule.step()
        np.testing.assert_allclose(Schedule("one-cycle", 1e-4, total, 0, ()).at(np.arange(total)), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1\nb", "line 2"), ("", "nothing"), ("- 1\n- 2\n", "something else"), ("a: b: c\n", "line 1")],
)
def test_bad_configs_are_told_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(BadInput, match=words) as caught:
        read_settings(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)


def test_bad_sources_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no such folder"):
        read_source(tmp_path / "none")
    with pytest.raises(BadInput, match="found none that can be parsed"):
        read_source(tmp_path)
