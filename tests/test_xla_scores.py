"""Scores on XLA, here the host's cores: features on the device at the highest precision, statistics in float64."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from rqvae.metrics.feature_files import read_features
from tests.conftest import ROOT, only, rows
from tests.inception_weights import write_random_inception
from tests.xla_job import environment, train

pytestmark = pytest.mark.skipif(find_spec("torch_xla") is None, reason="torch_xla is not installed")

INCEPTION = """
import sys, torch
from rqvae import backends
from rqvae.metrics.evaluation import FeatureSums
from rqvae.metrics.extractors import InceptionExtractor
from rqvae.trainers.references import add_features
from tests.test_fid_inception import photo

torch.set_num_threads(1)
backend = backends.create("xla")
import torch_xla.backends
assert torch_xla.backends.get_mat_mul_precision() == "highest"
images = photo(64, 4) / 255
images = torch.cat([images, images.flip(3), 1 - images])
for name, device in (("cpu", "cpu"), ("xla", backend.device)):
    extractor = InceptionExtractor(weights=sys.argv[1]).load().to(device)
    sums = FeatureSums(2048, 10, inception=True, keep=True)
    for start in (0, 6):
        part, ids = images[start : start + 6], torch.arange(start, start + 6)
        add_features(sums, extractor, part.to(device), ids, ids < 10)
    sums.reduce(backend.all_reduce)
    torch.save({"mean": sums.pooled.mean, "cov": sums.pooled.cov, "spatial": sums.spatial.mean,
                "scores": sums.inception_scores(), "features": sums.features("pooled")}, f"{sys.argv[2]}/{name}.pth")
"""


def test_scores_while_training_equal_those_of_the_cpu(tmp_path: Path) -> None:
    """gFID's statistics of two steps in float64; the reference's are of the same images."""
    extractor = json.dumps({"class_path": "tests.extractors.Projections"})
    scored = ["--online_eval.every", 2, "--online_eval.metrics", "[gfid]", "--online_eval.batch_size", 5]
    scored += ["--online_eval.images", 12, "--online_eval.extractor", extractor]
    jobs = [
        train("stage2", name, tmp_path, "--train.precision", "fp64", "--train.steps", 2, *scored)
        for name in ("xla", "cpu")
    ]
    a, b = (read_features(job.folder / "eval" / "step_00000002.npz") for job in jobs)
    assert a.n == b.n == 12
    np.testing.assert_allclose(a.pooled.mean, b.pooled.mean, rtol=0, atol=1e-6 * np.abs(b.pooled.mean).max())
    np.testing.assert_allclose(a.pooled.cov, b.pooled.cov, rtol=0, atol=1e-6 * np.abs(b.pooled.cov).max())
    scores = [rows(job.folder)[-1]["eval/fd_projections"] for job in jobs]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    references = [read_features(only(job.folder.parent / "references")) for job in jobs]
    np.testing.assert_allclose(references[0].pooled.cov, references[1].pooled.cov, rtol=1e-6)


@pytest.mark.slow
def test_inception_by_the_procedure_of_a_tpu_equals_the_cpu(tmp_path: Path) -> None:
    import torch

    weights = write_random_inception(tmp_path / "inception.pth")
    command = [sys.executable, "-c", INCEPTION, str(weights), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (torch.load(tmp_path / f"{name}.pth", weights_only=False) for name in ("xla", "cpu"))
    for key in ("mean", "cov", "spatial"):
        assert float((ours[key] - theirs[key]).abs().max()) < 1e-6 * float(theirs[key].abs().max()), key
    assert ours["scores"] == pytest.approx(theirs["scores"], rel=1e-6)
