"""A report that a person once had written on a two-step run: its ten topics, and the seven errors in it.

The log, config and source are our own re-creation (tests/health_sources.py). Each topic is covered by a finding, or
the report says what to log so that it can be; none of the errors is said.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from rqvae.health.examine import Examination, examine
from rqvae.health.readers import read_log
from rqvae.health.report_json import as_json
from tests.health_logs import ids
from tests.health_sources import PROGRAM, examined

TOPICS: dict[str, tuple[set[str], set[str]]] = {
    "load weights only": ({"LOG.WARNING.TORCH_LOAD"}, set()),
    "watch the loss": (
        {"RUN.TOO_SHORT", "OPT.SCHEDULE_WARMUP_SKIPPED"},
        {"LOSS.DIVERGED", "LOSS.NOT_DECREASING", "LOSS.DRIFT_UP", "DIFF.INIT_LEVEL"},
    ),
    "imbalance of classes": ({"DATA.IMBALANCE_PIXEL"}, {"DATA.IMBALANCE_EFFECTIVE"}),
    "dropped conditions, training and sampling": (
        {"COND.DROP_SEMANTICS", "COND.TRAIN_SAMPLE_MISMATCH"},
        {"COND.SAMPLER_MISMATCH", "COND.MASK_IGNORED"},
    ),
    "clip the output": ({"DIFF.CLAMP_IN_LATENT"}, set()),
    "check for NaN": ({"NUM.NAN_MASKED"}, set()),
    "log the learning rate": ({"LOG.MISSING_LR"}, {"OPT.SCHEDULE_MISMATCH"}),
    "watch the average": ({"EMA.NOT_STARTED"}, {"EMA.HORIZON", "EMA.LAG"}),
    "debug prints": ({"LOG.VERBOSITY", "PERF.EVAL_SHARE"}, set()),
    "the autoencoder and its scale": (
        {"VAE.INPUT_RANGE", "NORM.ASYMMETRIC", "NORM.LATENTS_SHIFTED"},
        {"LATENT.SCALE", "LATENT.SHIFT", "VAE.ROUNDTRIP"},
    ),
}
"""Topic: what is found, and what cannot be said yet."""


@pytest.fixture
def report(tmp_path: Path) -> Examination:
    return examined(tmp_path)


@pytest.mark.parametrize("topic", TOPICS)
def test_each_topic_is_covered_by_log_config_and_source(report: Examination, topic: str) -> None:
    found, open_ = TOPICS[topic]
    assert found <= ids(report)
    reasons = {check.id: reason for check, reason in report.not_assessed}
    for id_ in open_:
        assert reasons[id_].startswith("log "), id_


@pytest.mark.parametrize("topic", TOPICS)
def test_each_topic_is_covered_by_the_log_alone(tmp_path: Path, topic: str) -> None:
    examined(tmp_path)  # writes the log
    report = examine(read_log(tmp_path / "log_001.txt"))
    reasons = {check.id: reason for check, reason in report.not_assessed}
    for id_ in set.union(*TOPICS[topic]) - ids(report):
        assert reasons[id_].startswith(("log ", "nothing more: give ")), id_


def said(report: Examination) -> str:
    """All that the findings say, in lower case."""
    findings = as_json(report)["findings"]
    words = [[f["title"], f["message"], *f["alternatives"], *f["recommendation"], f["verify"]] for f in findings]
    return "\n".join(sum(words, [])).lower()


def test_code_is_quoted_from_the_file_it_stands_in(report: Examination, tmp_path: Path) -> None:
    """Said there: a listing that is not that code, of a file that does not have it."""
    quoted = [e for f in report.findings for e in f.evidence if e.file and e.file.endswith(".py")]
    assert len(quoted) >= 15
    for evidence in quoted:
        assert evidence.line is not None
        line = (tmp_path / "source" / evidence.file).read_text().split("\n")[evidence.line - 1]
        head = re.sub(r"^\w+: ", "", evidence.text.split("\n")[0].strip())[:40]  # what is stated has its name before
        assert head in line, evidence


def test_nan_is_said_to_be_hidden_not_unchecked(report: Examination) -> None:
    """Said there: "not checked for NaN", beside code that replaces it."""
    (finding,) = (f for f in report.findings if f.check.id == "NUM.NAN_MASKED")
    assert "replaced" in finding.found.message
    assert finding.check.recommendation[0].startswith("take nan_to_num out")
    assert not re.search(r"not checked for nan|add a check for nan", said(report))


def test_encoding_is_placed_in_the_training_step(report: Examination) -> None:
    """Said there: the encoder runs outside the training loop."""
    (finding,) = (f for f in report.findings if f.check.id == "VAE.INPUT_RANGE")
    (place,) = (e for e in finding.evidence if e.file == "program.py")
    functions = [node for node in ast.walk(ast.parse(PROGRAM)) if isinstance(node, ast.FunctionDef)]
    inside = [f.name for f in functions if f.lineno <= (place.line or 0) <= (f.end_lineno or 0)]
    assert inside == ["train_step"]
    assert "outside the training" not in said(report)


def test_counts_within_a_factor_of_two_are_no_imbalance(report: Examination) -> None:
    """Said there: class 0 has significantly more samples; it has 0.6 % more than class 1. Areas do differ."""
    assert "DATA.IMBALANCE_IMAGE" in {check.id for check, _ in report.silent}
    (finding,) = (f for f in report.findings if f.check.id == "DATA.IMBALANCE_PIXEL")
    assert "class_2 has 56.7 times the pixels of class_3" in finding.found.message


def test_clipping_the_prediction_is_advised_against(report: Examination) -> None:
    """Said there: clip the output to [-1, 1], which cuts 31.7 % of the targets of unit variance."""
    (finding,) = (f for f in report.findings if f.check.id == "DIFF.CLAMP_IN_LATENT")
    assert any("do not clip" in words for words in finding.check.recommendation)
    advice = [words for f in report.findings for words in f.check.recommendation]
    assert not [w for w in advice if re.search(r"\b(clip|clamp)\b", w) and "do not" not in w and "gradient" not in w]


def test_two_losses_are_no_sign_of_instability(report: Examination) -> None:
    """Said there: 1.15 and then 2.69 are instability; they are two batches of a schedule without its warm-up."""
    (finding,) = (f for f in report.findings if f.check.id == "RUN.TOO_SHORT")
    assert "two points, no trend can be inferred" in finding.found.message
    assert "no trend can be inferred" in finding.power
    wrong = {i for i in ids(report) if i.startswith(("LOSS.", "GRAD.", "DIFF.INIT", "OPT.LR_TOO"))}
    assert not wrong
    assert not re.search(r"instab|unstable|diverg|too high", said(report))


def test_a_warning_belongs_to_the_package_of_its_frame(report: Examination) -> None:
    """Said there: torch.load stands in the program; the frame is a dependency's."""
    (finding,) = (f for f in report.findings if f.check.id == "LOG.WARNING.TORCH_LOAD")
    assert finding.found.message == "torch.load with weights_only=False in diffusers"
    assert {e.file for e in finding.evidence} == {"log_001.txt"}
    assert "a dependency" in finding.check.recommendation[0]
