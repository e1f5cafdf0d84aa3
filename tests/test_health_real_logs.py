"""Logs of public projects: their labels, their points, and copies of them that say the same.

`RQVAE_HEALTH_LOGS` names a folder of such logs, which are no part of this repository.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from rqvae.health.checks import all_checks
from rqvae.health.examine import Examination, examine
from rqvae.health.log import RunLog
from rqvae.health.readers import read_log
from tests.health_copies import CHANGES, FORMATS, changed, settings_of
from tests.health_logs import ids, judged

FOLDER = Path(os.environ.get("RQVAE_HEALTH_LOGS", ""))
pytestmark = pytest.mark.skipif(not FOLDER.name, reason="RQVAE_HEALTH_LOGS names no folder of real logs")
Label = tuple[str, str, int, set[str]]
BIN = {"DIFF.BIN_DOMINANCE"}
LABELS: dict[str, Label] = {
    "dit/lightningdit_vavae_xl_64ep.log.txt": ("dit", "Train Loss", 800, set()),
    "dit/domainguidance_caltech_ft.log.txt": ("dit", "Train Loss", 145, set()),
    "dit/pqdit_low_rank_012.log.txt": ("dit", "Train Loss", 50, {"LOSS.DIVERGED", "DIFF.TRIVIAL_PREDICTOR"}),
    "dit/njudeep_009_neverstepped.log.txt": ("dit", "Train Loss", 0, {"RUN.NO_STEPS"}),
    "dm/log_001.excerpt.txt": (
        "dm",
        "loss",
        2,
        {
            "COND.DROP_SEMANTICS",
            "COND.TRAIN_SAMPLE_MISMATCH",
            "DATA.IMBALANCE_PIXEL",
            "LOG.VERBOSITY",
            "PERF.EVAL_SHARE",
        },
    ),
    "guided/kpd_lr1e-4.progress.csv": ("guided-csv", "loss", 1039, BIN),
    "guided/kpd_exp2000.progress.csv": ("guided-csv", "loss", 575, BIN),
    "guided/kpd_exp2000.log.txt": ("guided-text", "loss", 575, BIN),
    "hf/whisper_small_hi_overfit.trainer_state.json": ("trainer-state", "loss", 200, {"GEN.OVERFIT"}),
    "hf/tinyllama_ft.trainer_state.json": ("trainer-state", "loss", 186, set()),
    "hf/edgeai_short.trainer_state.json": ("trainer-state", "loss", 5, set()),
    "wandb/mia_sd15_finetune.wandb_export.csv": ("wandb-csv", "train_loss", 10000, set()),
}
"""Format, metric, its points, and the findings to act on."""
EVALUATIONS = {"hf/whisper_small_hi_overfit.trainer_state.json": 5, "hf/tinyllama_ft.trainer_state.json": 14}
TOLD = {
    "dit/domainguidance_caltech_ft.log.txt": {"RUN.TRUNCATED"},
    "dm/log_001.excerpt.txt": {"RUN.TOO_SHORT", "LOG.MISSING_LR", "LOG.MISSING_GRAD", "EVAL.MISSING"},
    "hf/edgeai_short.trainer_state.json": {"RUN.TOO_SHORT"},
}
"""Findings that are no more than told."""
CRITICAL = {"dit/pqdit_low_rank_012.log.txt"}
CHECKS = {check.id: check for check in all_checks()}
OF_THE_FILE = {"LOG.VERBOSITY"}
"""Checks that speak of the file's size: a copy is another file."""
OF_THE_TEXT = {"LOG.WARNING.OTHER", "LOG.WARNING.TORCH_LOAD", "PERF.EVAL_SHARE"}
"""Checks of what only a printed text holds: warnings, and words of a sampling."""


@lru_cache
def known(name: str) -> tuple[RunLog, Examination]:
    log = read_log(FOLDER / name)
    return log, examine(log)


def test_every_log_of_the_folder_has_a_label() -> None:
    held = {str(p.relative_to(FOLDER)) for p in FOLDER.rglob("*") if p.suffix in (".txt", ".csv", ".json")}
    assert held == set(LABELS)


@pytest.mark.parametrize("name", LABELS)
def test_label_and_points_of_a_real_log(name: str) -> None:
    log, found = known(name)
    form, metric, points, wanted = LABELS[name]
    assert (log.format, log.points(metric)) == (form, points)
    assert log.points("eval_loss") == EVALUATIONS.get(name, log.points("eval_loss"))
    assert ids(found, "minor") == wanted
    assert bool(ids(found, "critical")) == (name in CRITICAL)
    assert TOLD.get(name, set()) <= ids(found)


def test_twins_of_one_real_run_agree() -> None:
    (table, of_table), (text, of_text) = (known(f"guided/kpd_exp2000.{end}") for end in ("progress.csv", "log.txt"))
    assert ids(of_table) == ids(of_text)
    first, second = table.segments[0].series, text.segments[0].series
    assert set(first) == set(second)
    for name, series in first.items():
        assert len(series) == len(second[name]) == 575, name
        np.testing.assert_allclose(second[name].values, series.values, rtol=5.1e-3, err_msg=name)
        np.testing.assert_allclose(second[name].steps, series.steps, rtol=5.1e-3, err_msg=name)


def assert_same(name: str, copy: Examination, exempt: set[str]) -> None:
    """The same ids of all severities, among the checks whose needs both logs meet and that are not exempt."""
    _, original = known(name)
    blind = {check.id for check, _ in (*original.not_assessed, *copy.not_assessed)} | exempt
    assert ids(copy) - blind == ids(original) - blind


def newly_blind(name: str, copy: Examination) -> dict[str, str]:
    """What the copy cannot assess although the original could, with what it asks for."""
    before = {check.id for check, _ in known(name)[1].not_assessed}
    return {check.id: reason for check, reason in copy.not_assessed if check.id not in before}


def unseen(name: str, copy: RunLog) -> set[str]:
    """Findings about the end of a loss with fewer than three points in it: every threshold asks for three."""
    if not copy.segments[0].series:
        return set()
    loss = judged(copy).subjects[0].loss
    assert loss is not None
    findings = known(name)[1].findings
    return {f.check.id for f in findings if f.found.steps and (loss.steps >= f.found.steps[0]).sum() < 3}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LABELS)
def test_a_copy_of_a_real_log_has_the_same_findings(name: str, change: str) -> None:
    copy = changed(known(name)[0], change)
    exempt = set(OF_THE_FILE)
    if "loss" in change:  # in another unit the level of predicting nothing is another too
        exempt |= {check.id for check in CHECKS.values() if "objective" in check.needs}
    found = judged(copy)
    assert_same(name, found, exempt | unseen(name, copy))
    for check, reason in newly_blind(name, found).items():
        assert "points" in change, check
        assert "more" in reason, check  # it asks for more points, not for something that the copy has


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", [name for name, label in LABELS.items() if label[2]])
def test_a_real_log_in_another_format_has_the_same_findings(tmp_path: Path, name: str, form: str) -> None:
    original = known(name)[0]
    log = read_log(FORMATS[form](tmp_path, original))
    assert log.format == form
    for metric, series in original.segments[0].series.items():
        assert len(series) == log.points(metric), metric
    found = examine(log, settings_of(original))
    assert_same(name, found, OF_THE_FILE)
    assert set(newly_blind(name, found)) <= OF_THE_TEXT
