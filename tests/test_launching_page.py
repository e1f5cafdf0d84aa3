"""The scripts, manifests and Dockerfiles of docs/launching.md, as far as this machine can tell.

No cluster and no Docker engine was at hand: SLURM's programs are stand-ins, and a Dockerfile's instructions are read.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rqvae import backends
from rqvae.backends.hosts import Hosts
from rqvae.commands.train import parser
from rqvae.configuration import read
from rqvae.scripts import translate
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "launching.md").read_text()
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for host in 0 1; do SLURM_NODEID=$host "$@"; code=$?; [ $code -gt "${worst:-0}" ] && worst=$code; done
exit ${worst:-0}
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "$@" > scontrol.txt; fi
"""
SCRIPT = """#!/bin/bash
env > "env_$NODE_RANK"
printf '%s\\n' "$@" > "args_$NODE_RANK"
exit $CODE
"""


def blocks(language: str, word: str) -> str:
    """The one block of the page in this language that has `word`."""
    (found,) = [text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if word in text]
    return found


def hosts_of(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Hosts:
    """What the launcher would make of a container's or a task's environment."""
    with monkeypatch.context() as patch:
        for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RQVAE_MAX_RESTARTS"):
            patch.delenv(name, raising=False)
            if name in environment:
                patch.setenv(name, environment[name])
        return Hosts.from_environment()


def check_train(words: list[str]) -> None:
    """`python -m rqvae WORDS` is a command that there is, on a config that there is, of its stage."""
    assert words[0] == "train"
    options, overrides = parser().split(words[1:])
    assert not overrides
    (config,) = options.configs
    assert read([ROOT / config]).stage == options.stage


@pytest.mark.parametrize("code", [0, 2, 143])
def test_slurm_script(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "train_stage2.sh": SCRIPT}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(blocks("bash", "#SBATCH"))
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-8]", "CODE": str(code)}
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env={"PATH": path, **slurm}, timeout=20)
    assert done.returncode == code
    for rank in (0, 1):
        environment = dict(row.split("=", 1) for row in (tmp_path / f"env_{rank}").read_text().splitlines())
        assert hosts_of(environment, monkeypatch) == Hosts(2, rank, "node7", 23456, "", restarts=3)
        check_train(translate("train_stage2.sh", (tmp_path / f"args_{rank}").read_text().splitlines()) or [])
    again = tmp_path / "scontrol.txt"
    assert again.read_text() == "requeue 123456\n" if code == 143 else not again.exists()


def test_tpu_pod_command() -> None:
    words = shlex.split(blocks("bash", "gcloud"))
    command = next(word.removeprefix("--command=") for word in words if word.startswith("--command="))
    inner = shlex.split(command.replace("\n", " "))
    script = inner.index("./train_stage2.sh")
    assert "RQVAE_BACKEND=xla" in inner[:script]
    check_train(translate("train_stage2.sh", inner[script + 1 :]) or [])


def manifest(image: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The service, the job and the container of an image."""
    service, job = yaml.safe_load_all(blocks("yaml", image))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return service, job, container


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_gke_manifest(device: str) -> None:
    service, job, container = manifest(f"mae-dit:{device}")
    assert (ROOT / "docker" / f"{device}.Dockerfile").exists()
    check_train(container["args"])
    pod = job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None", "the word: a service without an address of its own"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["terminationGracePeriodSeconds"] > 30, "as long as the launcher waits for a checkpoint"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    per_host = container["args"][container["args"].index("--world-size") + 1]
    assert str(*container["resources"]["limits"].values()) == per_host
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "/shared" in mounts
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_gke_pods_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the name that Kubernetes gives pod 0 of an indexed job: JOB-0.SUBDOMAIN."""
    _, job, container = manifest("mae-dit:cuda")
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    for index in ("0", "1"):
        environment = {entry["name"]: entry.get("value", index) for entry in container["env"]}
        expected = Hosts(2, int(index), f"{name}-0.{pod['subdomain']}", 29500, "", restarts=20)
        assert hosts_of(environment, monkeypatch) == expected


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, its text) of a Dockerfile."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in joined]


def test_there_is_a_dockerfile_for_each_device() -> None:
    assert [file.name.partition(".")[0] for file in DOCKERFILES] == ["cpu", "cuda", "hpu", "tpu"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_dockerfile_names_what_there_is(file: Path, cli, capsys: pytest.CaptureFixture[str]) -> None:
    steps = instructions(file)
    assert steps[0][0] == "FROM"
    assert re.search(r":\S+$", steps[0][1]), "a base image with its tag"
    for kind, text in steps:
        assert kind in ("FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"), kind
        for source in text.split()[:-1] if kind == "COPY" else ():
            assert (ROOT / source).exists(), source
        for extra in re.findall(r"'\.\[([\w,]+)\]'", text):
            known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            assert set(extra.split(",")) <= set(known), extra
    environment = dict(pair.split("=", 1) for kind, text in steps if kind == "ENV" for pair in text.split())
    backend = backends.choose(environment["RQVAE_BACKEND"])
    assert backend == {"tpu": "xla"}.get(file.name.partition(".")[0], file.name.partition(".")[0])
    (entry,) = [json.loads(text) for kind, text in steps if kind == "ENTRYPOINT"]
    (default,) = [json.loads(text) for kind, text in steps if kind == "CMD"]
    assert entry == ["python", "-m", "rqvae"]
    assert cli(*default) == 0
    assert "usage: python -m rqvae" in capsys.readouterr().out


def copied(file: Path) -> set[str]:
    """What a Dockerfile copies: names of the repository's root, which become the same names in the image."""
    copies = [text.split() for kind, text in instructions(file) if kind == "COPY"]
    assert all(words[-1] == "./" or words[:-1] == words[-1:] for words in copies), copies
    return {source for words in copies for source in words[:-1]}


def test_what_the_dockerfiles_copy_is_enough_to_run(tmp_path: Path) -> None:
    """In an empty folder, without the repository on the path: the package's metadata, and a command on a config."""
    names = copied(DOCKERFILES[0])
    assert all(copied(file) == names for file in DOCKERFILES)
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    made = run("-c", "from setuptools import setup; setup(script_args=['-q', 'egg_info'])")
    assert made.returncode == 0, made.stderr
    assert "torch<2.10,>=2.7" in (tmp_path / "mae_dit.egg-info" / "requires.txt").read_text()
    shown = run("-m", "rqvae", "train", "configs/debug/stage1.yaml", "--print-config")
    assert shown.returncode == 0, shown.stderr
    assert "stage1" in yaml.safe_load(shown.stdout)


def test_gaudis_torch_is_not_replaced(tmp_path: Path) -> None:
    """The shell line that makes the lists, with a stand-in for pip in the image."""
    (line,) = [text for kind, text in instructions(ROOT / "docker" / "hpu.Dockerfile") if "requirements.txt" in text
               and kind == "RUN"]  # fmt: skip
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\nif [ "$1" = list ]; then printf "numpy==1.26.4\\ntorch==2.7.1a0+git1\\nrich==13.0\\n";'
                   ' else echo "$@" > installed.txt; fi\n')  # fmt: skip
    pip.chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    line = line.replace("/tmp/", f"{tmp_path}/")
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert done.returncode == 0
    assert (tmp_path / "vendor.txt").read_text().split() == ["numpy==1.26.4", "torch==2.7.1a0+git1"]
    names = {re.split(r"[>=\[; ]", row)[0] for row in (tmp_path / "ours.txt").read_text().splitlines()} - {"#"}
    ours = {re.split(r"[>=\[; ]", row)[0] for row in (ROOT / "requirements.txt").read_text().splitlines()} - {"#"}
    assert names == ours - {"torch", "torchvision", "torch_xla"}
    assert f"-c {tmp_path}/vendor.txt" in (tmp_path / "installed.txt").read_text()
