"""Every check fires on a log that has its fault and is silent on the same log repaired."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rqvae.health import rise
from rqvae.health.checks import all_checks
from rqvae.health.finding import SEVERITIES
from rqvae.health.readers import read_log
from rqvae.health.statistics import blocks
from tests.health_cases import CASES, LOSS, STEPS, N, at_end, examined_case
from tests.health_logs import built, dit, guided_csv, healthy, ids, judged, ours, trainer_state


@pytest.mark.parametrize("name", CASES)
def test_a_check_fires_on_its_fault_and_not_on_the_repair(tmp_path: Path, name: str) -> None:
    sick, repaired = CASES[name]
    assert name in ids(examined_case(tmp_path, sick))
    assert name not in ids(examined_case(tmp_path, repaired))


def test_most_checks_have_a_fixture() -> None:
    known = {check.id for check in all_checks()}
    assert set(CASES) <= known
    assert len(CASES) >= 0.7 * len(known), sorted(known - set(CASES))


def test_what_stands_beside_a_check_is_complete() -> None:
    for check in all_checks():
        assert check.severity in SEVERITIES, check.id
        assert check.threshold, check.id
        assert check.recommendation, check.id
        assert check.verify, check.id


def test_findings_of_a_pure_function_are_equal(tmp_path: Path) -> None:
    log = built(tmp_path / "log", {"loss": at_end(LOSS, 60, 2 * LOSS[-60:])}, STEPS)
    assert judged(log).findings == judged(log).findings


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_has_no_finding_to_act_on(tmp_path: Path, seed: int) -> None:
    steps, values = healthy(N, noise=0.03 * 3 ** (seed % 4), seed=seed)
    assert not ids(judged(built(tmp_path / "log", {"loss": values, "grad_norm": values + 1}, steps)), "minor")


def test_two_points_are_no_trend(tmp_path: Path) -> None:
    found = judged(built(tmp_path / "log", {"loss": [1.1548, 2.6852]}, [1, 2])).findings
    (short,) = (f for f in found if f.check.id == "RUN.TOO_SHORT")
    assert "two points, no trend can be inferred" in short.found.message
    assert not {f.check.id for f in found if f.check.id.startswith("LOSS.")}


def test_a_gan_has_no_finding_of_a_diffusion(tmp_path: Path) -> None:
    series = {"Loss/G/loss": 1.0 + 0.001 * LOSS, "Loss/D/loss": 300 * LOSS, "Loss/scores/real": LOSS}
    found = ids(judged(built(tmp_path / "log", series, STEPS, {"timesteps": 1000})))
    assert not {name for name in found if name.startswith(("DIFF.", "LOSS.", "SCALE."))}


def test_an_unmet_need_says_what_to_log(tmp_path: Path) -> None:
    reasons = {c.id: reason for c, reason in judged(built(tmp_path / "log", {"loss": LOSS}, STEPS)).not_assessed}
    assert reasons["GRAD.VANISHING"] == "log the gradient norm before clipping"
    assert reasons["NUM.NAN_MASKED"].endswith("give the program's source with --source")


def test_a_divergence_is_neither_a_recovered_jump_nor_overfitting(tmp_path: Path) -> None:
    series = {"loss": at_end(LOSS, 60, 1.0), "val_loss": (STEPS[29::30], at_end(LOSS, 60, 1.0)[29::30])}
    found = ids(judged(built(tmp_path / "log", series, STEPS)))
    assert "LOSS.DIVERGED" in found
    assert not found & {"LOSS.SPIKE_RECOVERED", "LOSS.SPIKE_RATE", "GEN.OVERFIT"}


def test_what_a_log_cannot_hold_is_not_assessed(tmp_path: Path) -> None:
    """80 epochs are stated and no point says its epoch; a table has no room for warnings."""
    reasons = {
        c.id: reason
        for c, reason in judged(built(tmp_path / "log", {"loss": LOSS}, STEPS, {"epochs": 80})).not_assessed
    }
    assert reasons["RUN.TRUNCATED"] == "log the epoch of each point"
    assert reasons["LOG.WARNING.OTHER"].startswith("keep what the program prints")


def test_missing_values_of_a_table_are_no_nan_of_a_run(tmp_path: Path) -> None:
    val = np.where(np.arange(N) % 50 == 49, 0.4, np.nan)
    assert "NUM.NONFINITE" not in ids(judged(built(tmp_path / "log", {"loss": LOSS, "val_loss": val}, STEPS)))


def sick_curve(kind: str) -> tuple[np.ndarray, np.ndarray]:
    steps, values = healthy(600)
    if kind == "diverged":
        values[480:] *= 3
    elif kind == "nan":
        values[500:] = np.nan
    elif kind == "flat":
        values = 0.5 * np.exp(0.03 * np.random.default_rng(3).standard_normal(600))
    return steps, values


CHANGES = {
    "shifted": lambda s, v: (s + 37, v),
    "longer steps": lambda s, v: (10 * s, v),
    "other unit": lambda s, v: (s, 0.1 * v),
    "every second": lambda s, v: (s[::2], v[::2]),
    "four digits": lambda s, v: (s, np.round(v, 4)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["healthy", "diverged", "nan", "flat"])
def test_copies_of_a_log_give_the_same_ids(tmp_path: Path, kind: str, change: str) -> None:
    curve = sick_curve(kind)
    guided_csv(tmp_path / "progress.csv", curve)
    expected = ids(judged(read_log(tmp_path / "progress.csv")), "minor")
    guided_csv(tmp_path / "copy.csv", CHANGES[change](*curve))
    assert ids(judged(read_log(tmp_path / "copy.csv", "guided-csv")), "minor") == expected


@pytest.mark.parametrize("kind", ["healthy", "diverged", "nan"])
def test_other_formats_of_a_log_give_the_same_ids(tmp_path: Path, kind: str) -> None:
    curve, found = sick_curve(kind), []
    for name, write in (("log.txt", dit), ("metrics.jsonl", ours), ("trainer_state.json", trainer_state)):
        write(tmp_path / name, curve)
        found.append(ids(judged(read_log(tmp_path / name)), "minor"))
    assert found[0] == found[1] == found[2]


def risen(kind: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    if kind == "quiet, by a third":
        return at_end(LOSS, 60, 1.35 * LOSS[-60:])
    if kind == "three points ago":
        return at_end(LOSS, 3, 2.5 * LOSS[-3:])
    return np.exp(0.9 * rng.standard_normal(1000)) * np.where(np.arange(1000) < 600, 1, 1.8)


@pytest.mark.parametrize("kind", ["quiet, by a third", "three points ago", "as noisy as its level"])
def test_each_way_to_see_a_rise_is_needed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = risen(kind)
    assert rise.lasting_rise(values, blocks(values)) is not None
    arms = ("_rise_of_blocks", "_rise_of_points", "_rise_of_stretches")
    own = arms[["quiet, by a third", "three points ago", "as noisy as its level"].index(kind)]
    for arm in arms:
        if arm != own:
            monkeypatch.setattr(rise, arm, lambda *_: None)
    assert rise.lasting_rise(values, blocks(values)) is not None
    monkeypatch.setattr(rise, own, lambda *_: None)
    assert rise.lasting_rise(values, blocks(values)) is None


def test_the_error_of_a_stretch_knows_a_slow_wobble() -> None:
    """Of independent means it is their deviation; of means that come in equal pairs, that of the sum of a pair."""
    rng = np.random.default_rng(6)
    singles, pairs = rng.standard_normal((300, 60)), np.repeat(rng.standard_normal((300, 30)), 2, axis=1)
    assert 0.95 < np.median([rise._error_of_stretches(means) for means in singles]) < 1.25
    assert np.median([rise._error_of_stretches(means) for means in pairs]) == pytest.approx(np.sqrt(2), rel=0.15)
