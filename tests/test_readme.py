"""Each example of the README runs as it stands, in a folder of its own; and each command is run by some test."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from rqvae.commands import COMMANDS
from rqvae.games.collect import collect
from tests.conftest import ROOT, only

README = (ROOT / "README.md").read_text()
# What is not run here, by name, and why. That make knows how to build it is checked all the same.
NOT_RUN = {
    "make demo": "ten minutes; tests/test_demo.py runs the same command with budgets of seconds",
    "make test": "is what runs this test",
    "make play": "serves until Ctrl-C; tests/test_world_commands.py plays the same model",
    "make setup": "downloads 7 GB",
    "make PYTHON=python3.12 demo": "needs that interpreter; otherwise as make demo",
    "make docs": "tests/test_docs.py compares the pages that it writes",
    "make site": "tests/test_docs.py builds it in a folder of its own",
    "python -m rqvae play WORLD_RUN": "serves until Ctrl-C; tests/test_play.py plays",
    "python -m rqvae play WORLD_RUN --static site": "needs onnxruntime-web; tests/test_onnx.py writes and plays it",
    "make figures ISSUE=3": "measures for minutes on a machine that nobody else uses",
    "make test-all": "takes an hour; make knows it",
    "make test-torch27": "downloads 0.8 GB; make knows it",
}
# Appended so that an example takes seconds, by the words it begins with.
SHORTER = {
    "python -m rqvae collect": "--frames 300",
    "python -m rqvae make-reference": "--extractor random-vgg16 --images 8 --batch-size 4",
    "python -m rqvae diagnose": "--backend aot_eager",
    "python -m rqvae rollout": "--starts 2 --horizon 4 --seeds 0",
    "python -m rqvae layout": "--images 2 --judge-steps 2",
    "python -m rqvae canvas": "--steps 2",
    "python -m rqvae train configs/pathology": "--train.steps 2 --pictures.every null",
    "python -m rqvae train configs/maze_chase": "--train.steps 2 --data.workers 0 --pictures.every null",
    "./train": "--train.steps 2 --data.workers 0 --pictures.every null",
    "python -m rqvae train": "--train.steps 2 --data.workers 0",
    "python -m rqvae sample": "--num 6 --steps 2",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def shell_examples() -> list[str]:
    """Every line of the shell blocks, with `...` standing for the words of the line above, and every inline command."""
    found: list[str] = []
    for block in blocks("bash"):
        above = ""
        for line in block.replace("\\\n", " ").splitlines():
            command = line.partition("  #")[0].strip()
            if command.endswith(" ..."):
                command = f"{command.removesuffix(' ...')} {above.partition(' ')[2]}"
            above = command or above
            found += [command] if command else []
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    found += re.findall(r"`((?:\./\w+\.sh|python -m rqvae|rqvae|make)\s[^`]+)`", prose)
    return list(dict.fromkeys(found))


@dataclass
class World:
    """A folder with links to the repository, and what the placeholders of the examples stand for."""

    folder: Path
    runs: dict[int, Path]
    """Stage1, Stage2, a world model under 3 and a generator on masks under 4."""

    def fill(self, example: str) -> str:
        """The example with its placeholders filled, its optional arguments left out, and shortened."""
        stage = 2 if example.startswith("./train_stage2") or " --stage 2" in example else 1
        values = {
            "PROJECT": "p", "SAVE_DIR": "saved", "CONFIG": f"configs/debug/stage{stage}.yaml", "WORLD_SIZE": "1",
            "RUN_NAME": "r", "CKPT": str(self.runs[1]), "RUN": str(self.runs[2]), "STAGE1_RUN": str(self.runs[1]),
            "WORLD_RUN": str(self.runs[3]), "STAGE2_CONFIG": str(self.runs[2] / "config.yaml"),
            "TISSUE_RUN": str(self.runs[4]),
        }  # fmt: skip
        text = re.sub(r"\s\[[A-Z_ .]+\]", "", example)
        text = re.sub(r"\b(" + "|".join(values) + r")\b(?!=)", lambda m: values[m[1]], text)
        more = next((words for start, words in SHORTER.items() if example.startswith(start)), "")
        cut = " -- " if example.startswith("./") and more and " -- " not in example else " "
        return f"{text}{cut}{more}".strip()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An autoencoder, and a generator of 32 x 32 images under the very path that the README loads."""
    from rqvae.cli import run

    folder = tmp_path_factory.mktemp("readme")
    for path in [ROOT / "configs", ROOT / "rqvae", ROOT / ".venv", *ROOT.glob("*.sh")]:
        if path.exists():
            (folder / path.name).symlink_to(path)
    runs = {}
    for stage in (1, 2):
        line = ["train", f"configs/debug/stage{stage}.yaml", "--save-dir", folder / "trained", "--project", str(stage)]
        line += ["--train.steps", 2, "--data.dataset.init_args.size", 32, "--pictures.every", "null"]
        line += ["--ema.power", "[0.05,0.1]", "--ema.snapshot_every", 1]
        line += ["--tracking.enabled", "true", "--tracking.every", 1] if stage == 1 else []
        assert run([str(word) for word in line]) == 0
        runs[stage] = only(folder / "trained" / str(stage))
    collect("maze-chase", 300, 32, folder / "frames")
    line = ["train", "configs/maze_chase/world_model.yaml", "--save-dir", folder / "trained", "--project", "world"]
    line += ["--train.steps", 2, "--data.dataset.init_args.root", folder / "frames", "--pictures.every", "null"]
    assert run([str(word) for word in line]) == 0
    runs[3] = only(folder / "trained" / "world")
    line = ["train", "configs/pathology/short_test.yaml", "--save-dir", folder / "trained", "--project", "tissue"]
    assert run([str(word) for word in line]) == 0
    runs[4] = only(folder / "trained" / "tissue")
    Image.new("L", (40, 50), 3).save(folder / "mask.png")
    for place in re.findall(r"rqvae\.load\(\"(runs/[^\"]+)\"\)", README):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).symlink_to(runs[2])
    return World(folder, runs)


def shell(world: World, command: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command], cwd=world.folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )


def marked(example: str) -> object:
    """Those of commands whose own tests run them too take long enough to be left to `make test-all`."""
    slow = re.search(
        r"diagnose|procedural|make-reference|diffusers|channels|woeval|recon_stage1|layout|canvas", example
    )
    return pytest.param(example, marks=pytest.mark.slow) if slow else example


@pytest.mark.parametrize("example", [marked(e) for e in shell_examples() if e not in NOT_RUN])
def test_shell_example(example: str, world: World) -> None:
    command = world.fill(example)
    done = shell(world, command)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_examples_are_found_and_what_is_not_run_is_in_the_readme() -> None:
    found = shell_examples()
    for script in ROOT.glob("*.sh"):
        assert any(f"./{script.name} " in example for example in found), script.name
    assert any(example.startswith("python -m rqvae sample RUN") for example in found)
    for name in NOT_RUN:
        assert name in README, f"{name} is no longer in the README"


@pytest.mark.parametrize("example", [e for e in NOT_RUN if e.startswith("make")])
def test_make_knows_what_is_not_run(example: str) -> None:
    done = subprocess.run([*example.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sampled_images_and_their_provenance_are_where_the_readme_says(world: World) -> None:
    example = next(e for e in shell_examples() if e.startswith("python -m rqvae sample RUN"))
    if not (world.folder / "samples.npz").exists():
        assert shell(world, world.fill(example)).returncode == 0
    facts = yaml.safe_load((world.folder / "samples.json").read_text())
    assert facts.keys() >= {"checkpoint", "step", "weights", "solver", "nfe", "guidance", "seed"}


@pytest.mark.parametrize("code", blocks("python"))
def test_python_example(code: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs, and a comment `# (16, 3, 32, 32) in [0, 1]` is true of the line's variable."""
    monkeypatch.chdir(world.folder)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    for name, shape in re.findall(r"^(\w+) = .*# \(([\d, ]+)\) in \[0, 1\]", code, re.MULTILINE):
        value = names[name]
        assert isinstance(value, torch.Tensor)
        assert tuple(value.shape) == tuple(map(int, shape.split(",")))
        assert 0 <= float(value.min()) <= float(value.max()) <= 1


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_example_trains_a_part_of_ones_own(text: str, world: World) -> None:
    """`my_package.my_model.MyAutoencoder`, an autoencoder in a folder outside the repository."""
    part = yaml.safe_load(text)
    assert part.keys() == {"stage1"}, "a new kind of example needs a test of its own"
    module, _, name = part["stage1"]["class_path"].rpartition(".")
    file = world.folder / f"{module.replace('.', '/')}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        "from rqvae.models.stage1.kl_vae import KLVAE\n\n\n"
        f"class {name}(KLVAE):\n"
        "    def __init__(self, width: int) -> None:\n"
        "        super().__init__(width=width, multipliers=[1, 2], blocks=1, norm_groups=8)\n"
    )
    config = yaml.safe_load((ROOT / "configs/debug/stage1.yaml").read_text()) | part
    (world.folder / "mine.yaml").write_text(yaml.safe_dump(config))
    done = shell(world, "python -m rqvae train mine.yaml --save-dir own --train.steps 1 --online_eval.every null")
    assert done.returncode == 0, done.stderr
    wrong = shell(world, "python -m rqvae train mine.yaml --save-dir own --stage1.init_args.widht 8")
    assert wrong.returncode == 2, "names are checked before anything starts"


def commands_in(tree: ast.AST) -> set[str]:
    """The commands that a test file gives: `cli("train", ...)`, `start("train", ...)`, `["train", ...]`."""
    found = set()
    for node in ast.walk(tree):
        words: list[ast.expr] = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("cli", "start", "run", "command"):
            words = node.args[:1]
        elif isinstance(node, ast.List | ast.Tuple):
            words = node.elts[:1] if isinstance(node, ast.List) else []
            constants = [e.value if isinstance(e, ast.Constant) else None for e in node.elts]
            found |= {str(b) for a, b in zip(constants, constants[1:], strict=False) if a == "rqvae"}
        found |= {str(word.value) for word in words if isinstance(word, ast.Constant)}
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_run_by_some_test(name: str) -> None:
    files = [file for file in sorted((ROOT / "tests").glob("test_*.py")) if file != Path(__file__)]
    assert [file.name for file in files if name in commands_in(ast.parse(file.read_text()))], name


def test_the_search_for_commands_can_fail() -> None:
    tree = ast.parse('cli("a"); x = ["b", 1]; y = [python, "-m", "rqvae", "c"]; z = "d"; other("e")')
    assert commands_in(tree) == {"a", "b", "c"}
