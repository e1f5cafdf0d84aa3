"""What docs/health.md says to log is what the checks read, and its observer runs as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from docs.health_page import WANTED
from rqvae.health.checks import all_checks
from rqvae.health.examine import examine
from rqvae.health.needs import unmet
from rqvae.health.readers import read_log
from rqvae.health.subject import Subject
from tests.conftest import ROOT, only, rows, tensors
from tests.health_cases import LOSS, STEPS
from tests.health_logs import built
from tests.test_extending import FILES

PAGE = (ROOT / "docs" / "health.md").read_text()


@pytest.mark.parametrize("need", WANTED)
def test_a_name_of_the_page_meets_its_need(tmp_path: Path, need: str) -> None:
    names = [name.replace("GROUP", "blocks").replace("_K", "_2") for name in WANTED[need]]
    assert all(f"`{name}`" in PAGE for name in WANTED[need])
    without, with_it = (
        built(tmp_path / "log", {"train/loss": LOSS, **{name: LOSS for name in more}}, STEPS) for more in ([], names)
    )
    assert unmet(Subject(without, without.segments[0]), (need,)) is not None
    assert unmet(Subject(with_it, with_it.segments[0]), (need,)) is None


def test_ids_that_are_spelled_otherwise_are_named() -> None:
    section = PAGE.split("## Other names for the same")[1].split("## ")[0]
    known = {check.id for check in all_checks()}
    pairs = re.findall(r"([A-Z]+\.[A-Z_]+) is ([A-Z]+\.[A-Z_]+)", section)
    assert len(pairs) == 3
    assert all(other not in known and ours in known for other, ours in pairs)


def test_the_observer_of_the_page_gives_a_check_what_it_needs(cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "moved.py").write_text(re.findall(r"^```python\n# moved.py\n(.*?)^```", PAGE, re.M | re.S)[0])
    (tmp_path / "generator.yaml").write_text(FILES["generator.yaml"])
    observed = re.findall(r"^```yaml\n(observers: .*moved.*)\n```", PAGE, re.M)[0].replace("every: 50", "every: 2")
    (tmp_path / "observed.yaml").write_text(observed + "\n")
    steps = ["--train.steps", "6", "--checkpoint.every", "2", "--checkpoint.keep_last", "9"]
    try:
        assert cli("train", "generator.yaml", "observed.yaml", *steps) == 0
    finally:
        sys.modules.pop("moved", None)
    run = only(tmp_path / "runs" / "rqvae")
    _, after_four = (row for row in rows(run) if any("param_change" in key for key in row))
    parts = [key.rpartition("_")[2] for key in after_four if "param_change" in key]
    assert parts
    before, after = (tensors(run, step) for step in (2, 4))
    for part in parts:
        keys = [key for key in after if key.startswith(f"model/stage2:{part}.")]
        moved = torch.dist(*(torch.cat([state[key].flatten() for key in keys]) for state in (before, after)))
        assert after_four[f"train/param_change_{part}"] == pytest.approx(float(moved), rel=1e-5)
    assert "PARAM.UNCHANGED" not in {check.id for check, _ in examine(read_log(run)).not_assessed}
