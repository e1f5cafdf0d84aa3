"""The page on foreign parts, run as it stands; and what is said of parts that do not fit."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from rqvae.configuration import read
from rqvae.trainers.assembly import check
from tests.conftest import ROOT, assert_same, only, rows, tensors

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
FILES = {m[1]: text for _, text in BLOCKS if (m := re.match(r"# (\S+\.(?:py|yaml))\n", text))}
COMMANDS = [text.strip() for kind, text in BLOCKS if kind == "bash"]
MODULES = [Path(name).stem for name in FILES if name.endswith(".py")]

USED = {
    "discs": "Discs.__getitem__",
    "grey": "SometimesGrey.__call__",
    "edges": "Edges.forward",
    "huber": "HuberDiffusion.compute_loss",
    "fold": "Fold.forward Fold.reverse",
    "patches": "LinearPatches.forward",
    "convnet": "ConvNet.forward",
    "gaussian": "ClassGaussian.compute_loss ClassGaussian.infer",
    "midpoint": "midpoint",
    "watch": "GradientPeak.after_backward Freeze.before_update",
}
"""What must be called in the run of each of the page's modules."""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder outside the repository with the page's files; the current one, as for `python -m`."""
    folder = tmp_path / "lab"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in (*MODULES, "bad", "broken", "torn"):
        sys.modules.pop(name, None)


def spied(module: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the calls of `USED`."""
    calls = dict.fromkeys(USED[module].split(), 0)
    for path in calls:
        *owners, name = path.split(".")
        owner = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        function = getattr(owner, name)

        def counted(*values, __path=path, __function=function, **options):
            calls[__path] += 1
            return __function(*values, **options)

        counted.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        counted.__module__, counted.__qualname__ = function.__module__, function.__qualname__
        monkeypatch.setattr(owner, name, counted)
    return calls


def test_the_page_shows_every_kind_of_part() -> None:
    assert sorted(MODULES) == sorted(USED)
    assert len(COMMANDS) == len(USED)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: shlex.split(c)[4] if c.count("yaml") > 1 else "gaussian")
def test_the_page_runs_and_each_part_is_used(command: str, lab: Path, cli, monkeypatch) -> None:
    python, m, rqvae, *arguments = shlex.split(command)
    assert (python, m, rqvae) == ("python", "-m", "rqvae")
    module = arguments[-1] if "--run-name" in arguments else Path(arguments[-1]).stem
    calls = spied(module, monkeypatch)
    assert cli(*arguments) == 0
    run = only(lab / "runs" / "rqvae", f"{module}_*")
    assert (run / "FINISHED").exists()
    assert all(calls.values()), calls
    losses = [row["train/loss_total"] for row in rows(run)]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    assert list((run / "samples").iterdir())


def test_the_page_as_a_user_runs_it(lab: Path) -> None:
    """In a process of its own, in that folder, with nothing on PYTHONPATH but the package."""
    assert "train/loss_edges" in in_a_shell(next(c for c in COMMANDS if "edges" in c), lab)


@pytest.mark.slow
def test_every_rank_finds_the_parts(lab: Path) -> None:
    assert "train/loss_edges" in in_a_shell(next(c for c in COMMANDS if "edges" in c) + " --world-size 2", lab)


def in_a_shell(command: str, lab: Path) -> dict[str, float]:
    """The first row of the run that the command leaves."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return rows(only(lab / "runs" / "rqvae"))[0]


def test_parts_on_pythonpath_are_found_from_any_folder(lab: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{os.environ['PYTHONPATH']}{os.pathsep}{lab}"}
    command = [sys.executable, "-m", "rqvae", "train", lab / "generator.yaml", lab / "with_midpoint.yaml"]
    done = subprocess.run(
        [*command, "--print-config"], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["stage2"]["init_args"]["sampler"]["solver"] == "midpoint.midpoint"


def test_a_loss_is_added_with_its_weight_and_resumes_bit_for_bit(lab: Path, cli) -> None:
    line = ["train", "autoencoder.yaml", "with_edges.yaml", "--train.precision", "fp64"]
    assert cli(*line, "--project", "whole") == 0
    whole = only(lab / "runs" / "whole")
    for row in rows(whole):
        parts = row["train/loss_recon"] + row["train/loss_latent"] + 0.5 * row["train/loss_edges"]
        assert row["train/loss_total"] == pytest.approx(parts, rel=1e-12)
    assert cli(*line, "--project", "rest", "--resume-ckpt", whole / "checkpoints" / "step_00000002") == 0
    rest = only(lab / "runs" / "rest")
    assert_same(tensors(rest, 4), tensors(whole, 4))
    assert [row["train/loss_edges"] for row in rows(rest)] == [row["train/loss_edges"] for row in rows(whole)][2:]
    assert not [name for name in tensors(whole, 4) if "edges" in name]
    assert cli("train", "autoencoder.yaml", "--train.precision", "fp64", "--project", "without") == 0
    without, base = tensors(only(lab / "runs" / "without"), 4), tensors(whole, 4)
    assert any(not torch.equal(without[k], base[k]) for k in base if k.startswith("model/")), "it has a gradient"


def test_an_intervention_acts_and_an_observer_is_logged(lab: Path, cli) -> None:
    assert (
        cli("train", "autoencoder.yaml", "with_watch.yaml", "--checkpoint.every", 1, "--checkpoint.keep_last", 9) == 0
    )
    run = only(lab / "runs" / "rqvae")
    assert all(row["watch/peak_autoencoder"] > 0 for row in rows(run))
    names = [name for name in tensors(run, 1) if name.startswith("model/stage1:encoder")]
    first, second, third = (tensors(run, step) for step in (1, 2, 3))
    assert names
    assert all(torch.equal(first[name], second[name]) for name in names), "frozen for two steps"
    assert not all(torch.equal(second[name], third[name]) for name in names)


def test_the_solver_of_the_page_is_of_second_order(lab: Path) -> None:
    """dx/dt = x from t = 1 to 0, whose solution is x(0) = x(1) / e."""
    midpoint = importlib.import_module("midpoint").midpoint
    errors = []
    for steps in (8, 16, 32):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        x, nfe = midpoint(lambda x, t: x, torch.ones(1, dtype=torch.float64), times)
        assert nfe == 2 * steps
        errors.append(abs(float(x) - float(np.exp(-1))))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)
    assert np.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.1)


def test_the_snippet_of_hugging_face_is_a_config(lab: Path) -> None:
    snippet = next(text for kind, text in BLOCKS if kind == "yaml" and "HuggingFaceImages" in text)
    (lab / "hf.yaml").write_text(snippet)
    check(read([lab / "autoencoder.yaml", lab / "hf.yaml"]).for_checks(), world_size=1)


BAD = """
import torch
from torch import nn
from rqvae.callbacks.interfaces import Observer
from rqvae.img_datasets import DataSpec, LabeledImageData, LabeledImageDataset, Split, Transform
from rqvae.models.interfaces import Stage1Encodings, Stage1Model, Stage1ModelOutput, Stage2Model, base_connector
from rqvae.models.losses.interfaces import ImageLoss
from rqvae.models.stage1.kl_vae import KLVAE

class NoSplit(LabeledImageDataset):
    def __init__(self, size: int = 16): ...
class Tuples(LabeledImageDataset):
    def __init__(self, split: Split, size: int = 16): self.split = split
    spec = DataSpec((3, 16, 16))
    def __len__(self): return 8
    def __getitem__(self, index): return torch.zeros(3, 16, 16), 0
class NotDataset:
    def __init__(self, split: Split, size: int = 16): ...
class NoSpec(Transform):
    def __init__(self, share: float = 1.0): ...
class Smaller(Transform):
    def __init__(self, spec: DataSpec): ...
    def __call__(self, sample, rng):
        sample.img = sample.img[:, :8]
        return sample
class NoRng(Transform):
    def __init__(self, spec: DataSpec): ...
    def __call__(self, sample): return sample
class PerSample(ImageLoss):
    def __init__(self): super().__init__("each")
    def forward(self, output, inputs): return output.xs_recon.flatten(1).mean(1)
class Detached(PerSample):
    def forward(self, output, inputs): return output.xs_recon.detach().mean()
class Gan(ImageLoss):
    def __init__(self): super().__init__("gan")
class OneArgument(PerSample):
    def forward(self, output): return output.xs_recon.mean()
class Half(KLVAE):
    def forward(self, inputs):
        output = super().forward(inputs)
        output.xs_recon = output.xs_recon[:, :, ::2]
        return output
class Bare(KLVAE):
    def forward(self, inputs): return super().forward(inputs).xs_recon
class Lies(base_connector):
    def latent_shape(self, stage1_shape): return (stage1_shape[0] * 4, *stage1_shape[1:])
class OneShape(Stage2Model):
    def __init__(self, latent_shape: tuple): ...
class Narrow(nn.Module):
    def __init__(self, latent_shape: tuple, data_spec: DataSpec):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
    def forward(self, x, t, condition): return self.scale * x[:, :1]
class Forgetful(Observer):
    def after_step(self, run): ...
def two(denoise, x): return x, 0
def sample_only(denoise, x, times, noise): return x
def smaller(denoise, x, times, noise): return x[:, :1], 1
"""

NOT_FITTING = [
    (
        "data: {dataset: {class_path: nowhere.Discs}}",
        r"data\.dataset: No module named 'nowhere'.*looked for in .*lab and on",
    ),
    ("data: {dataset: {class_path: bad.Disks}}", r"data\.dataset: module 'bad' has no attribute 'Disks'"),
    ("stage1: {class_path: broken.Model}", r"stage1: .*No module named 'no_such_package'"),
    ("stage1: {class_path: torn.Model}", r"torn\.py:2: SyntaxError"),
    ("stage1: {class_path: wrong_name.Model}", r"wrong_name\.py:1: NameError: .*undefined"),
    (
        "data: {dataset: {class_path: bad.NoSplit}}",
        r"bad\.yaml: data\.dataset: expected NoSplit\(split, \.\.\.\), got NoSplit\(size\)",
    ),
    ("data: {dataset: {class_path: bad.NotDataset}}", r"data\.dataset: .*NotDataset.*subclass of LabeledImageDataset"),
    (
        "data: {dataset: {class_path: bad.Tuples}}",
        r"data\.dataset: Tuples\[index\]: expected LabeledImageData, got tuple",
    ),
    (
        "data: {train_transform: bad.NoSpec}",
        r"data\.train_transform: expected NoSpec\(spec, \.\.\.\), got NoSpec\(share\)",
    ),
    (
        "data: {train_transform: bad.Smaller}",
        r"data\.train_transform: Smaller: img: expected \(3, 16, 16\), got \(3, 8, 16\)",
    ),
    (
        "data: {val_transform: bad.NoRng}",
        r"data\.val_transform: expected NoRng\.__call__\(sample, rng\), got \(sample\)",
    ),
    ("losses: [{class_path: bad.PerSample}]", r"losses: PerSample: expected \(\), got \(8,\)"),
    ("losses: [{class_path: bad.Detached}]", r"losses: Detached: expected a gradient"),
    ("losses: [{class_path: bad.Gan}]", r"bad\.yaml: losses: expected a name .* none of .*got 'gan'"),
    (
        "losses: [{class_path: bad.OneArgument}]",
        r"losses\[0\]: expected OneArgument\.forward\(output, inputs\), got \(output\)",
    ),
    (
        "losses: [{class_path: edges.Edges}, {class_path: edges.Edges}]",
        r"losses: expected different names.*edges.*edges",
    ),
    ("stage1: {class_path: bad.Half}", r"stage1: forward: xs_recon: expected \(8, 3, 16, 16\), got \(8, 3, 8, 16\)"),
    ("stage1: {class_path: bad.Bare}", r"stage1: forward: expected Stage1ModelOutput, got Tensor"),
    (
        "observers: [{class_path: bad.Forgetful}]",
        r"observers\[0\]: expected Forgetful\.after_step\(run, losses\), got \(run\)",
    ),
    ("observers: [{class_path: bad.Half}]", r"observers.*bad\.Half does not correspond to a subclass of Observer"),
    ("connector: {class_path: bad.Lies}", r"connector: forward: zs: expected \(\d, 48, 8, 8\), got \(\d, 12, 8, 8\)"),
    (
        "connector: {class_path: bad.Half}",
        r"connector: .*bad\.Half does not correspond to a subclass of base_connector",
    ),
    (
        "stage2: {class_path: bad.OneShape}",
        r"stage2: expected OneShape\(latent_shape, data_spec, \.\.\.\), got OneShape",
    ),
    (
        "stage2: {init_args: {backbone: {class_path: bad.Narrow}}}",
        r"stage2\.backbone: Narrow: expected \(\d, 12, 8, 8\), got \(\d, 1, 8, 8\)",
    ),
    (
        "stage2: {init_args: {sampler: {solver: bad.two}}}",
        r"bad\.yaml: stage2\.init_args\.sampler\.solver: expected a function \(denoise, x, times, noise\), got bad",
    ),
    ("stage2: {init_args: {sampler: {solver: bad.three}}}", r"sampler\.solver: module 'bad' has no attribute 'three'"),
    ("stage2: {init_args: {sampler: {solver: nowhere.step}}}", r"sampler\.solver: No module named 'nowhere'"),
    (
        "stage2: {init_args: {sampler: {solver: bad.sample_only}}}",
        r"sampler\.solver: expected the answer \(x, nfe\).*got Tensor",
    ),
    (
        "stage2: {init_args: {sampler: {solver: bad.smaller}}}",
        r"sampler\.solver: x: expected \(\d, 12, 8, 8\), got \(\d, 1, 8, 8\)",
    ),
]


@pytest.mark.parametrize(("text", "expected"), NOT_FITTING, ids=range(len(NOT_FITTING)))
def test_a_part_that_does_not_fit_is_one_line(text: str, expected: str, lab: Path, cli, capfd) -> None:
    (lab / "bad.py").write_text(BAD)
    (lab / "broken.py").write_text("import no_such_package\n")
    (lab / "torn.py").write_text("x = 1\ndef f(:\n")
    (lab / "wrong_name.py").write_text("undefined\n")
    (lab / "bad.yaml").write_text(f"{text}\n")
    base = "generator.yaml" if re.match("stage2|connector", text) else "autoencoder.yaml"
    assert cli("train", base, "bad.yaml", "--train.steps", 1, "--pictures.every", 1) == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    said = [row for row in errors.splitlines() if row.startswith("error: ")]
    assert len(said) == 1, errors
    assert re.search(expected, said[0]), said[0]


def test_two_losses_of_one_class_have_their_own_names(lab: Path, cli) -> None:
    """As the page says, the name is the class's to give: an argument makes it the config's."""
    named = FILES["edges.py"].replace("*, weight", "*, name: str, weight").replace('"edges"', "name")
    (lab / "edges.py").write_text(named)
    losses = [{"class_path": "edges.Edges", "init_args": {"name": n, "weight": w}} for n, w in (("a", 1.0), ("b", 0.0))]
    (lab / "two.yaml").write_text(json.dumps({"losses": losses}))
    assert cli("train", "autoencoder.yaml", "two.yaml", "--train.steps", 1) == 0
    (row,) = rows(only(lab / "runs" / "rqvae"))
    assert row["train/loss_a"] == row["train/loss_b"] > 0
