"""Every command of the description that this tool follows, and every command of its page in docs/."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rqvae.commands import diagnose
from tests.conftest import ROOT
from tests.diagnoses import metrics, save_vae

EXAMPLES = [
    # utility_diagnostic/vae/README.md of kplau1128/helpers-utilities, each command once, without `python
    # vae_diagnostic.py`, in its order
    "--help",
    "--device hpu --filter all --mode single --save_images",
    "--list_submodules",
    '--mode compile_except --exclude_path "path.to.submodule"',
    '--mode compile_except --exclude_path "path1,path2,path3"',
    '--mode compile_except --exclude_path "bad_paths.txt"',
    "--device hpu --filter all --mode single",
    '--device hpu --save_images --model_name "custom/model/path"',
    '--mode compile_except --exclude_path "path.to.submodule" --gaudi_config "path/to/config.json"',
    "--use_tensorboard",
    '--use_wandb --wandb_project "my_project" --wandb_run "test_run"',
    '--test_paths "path/to/paths.txt"',
    '--test_paths "path1,path2,path3"',
    "--mode single",
    "--mode compile_except",
]
_WRITES = {"--save_images": "images/*_OK.png", "--use_tensorboard": "logs/tensorboard/events*"}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_original(
    example: str, cli: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, but for the device, and with places that exist in place of `path.to.submodule` and the like."""
    (tmp_path / "paths.txt").write_text("# of an example\nconv_in\n\nmid_block.resnets.0.norm1\n")
    (tmp_path / "bad_paths.txt").write_text("# found before\nmid_block.resnets.0.norm1\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "bad_paths.txt").write_text("conv_out\n")  # of a diagnosis before, which compile_except reads by default
    save_vae(tmp_path / "custom")
    known = {
        "hpu": "cpu",
        "custom/model/path": str(tmp_path / "custom"),
        "path.to.submodule": "mid_block.resnets.0",
        "path/to/config.json": "config.json",
        "path/to/paths.txt": str(tmp_path / "paths.txt"),
        "path1,path2,path3": "conv_in,mid_block,conv_out",
    }
    words = [known.get(word, word) for word in shlex.split(example)]
    monkeypatch.setattr(diagnose, "_MODEL", str(tmp_path / "custom"))
    monkeypatch.chdir(tmp_path)
    if "--help" in words:
        with pytest.raises(SystemExit) as left:
            cli("diagnose", *words)
        assert left.value.code == 0
        return
    extra = ["--device", "cpu", "--output", out, "--backend", "eager", "--latent_size", "4"]
    if "--filter" not in words and "--test_paths" not in words and "compile_except" not in words:
        extra += ["--filter", "leaf"]
    assert cli("diagnose", *extra, *words) == 0
    assert "mid_block.resnets.0: ResnetBlock2D" in (out / "submodules" / "submodule_list.txt").read_text()
    if "--list_submodules" in words:
        assert not (out / "metrics" / "metrics.json").exists()
        return
    check(out, words)


def check(out: Path, words: list[str]) -> None:
    """What the command says is what was done."""
    paths = [row["path"] for row in metrics(out)["results"]]
    if "compile_except" in words:
        excluded = {"mid_block.resnets.0": 1, "conv_in,mid_block,conv_out": 3, "bad_paths.txt": 1}
        number = excluded[words[words.index("--exclude_path") + 1]] if "--exclude_path" in words else 1
        assert (len(paths), paths[0], paths[-1]) == (number + 2, "combined", "interaction")
    elif "--test_paths" in words:
        listed = "," not in words[-1]
        assert paths == (["conv_in", "mid_block.resnets.0.norm1"] if listed else ["conv_in", "mid_block", "conv_out"])
    else:
        assert len(paths) > 30
    if "bad_paths.txt" in words:
        assert "excluded.mid_block.resnets.0.norm1" in paths
    for option, pattern in _WRITES.items():
        assert bool(list(out.glob(pattern))) == (option in words), option


def commands_of_the_page() -> Iterator[str]:
    page = ROOT / "docs" / "vae_diagnostic.md"
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        yield from (line for line in block.splitlines() if line.startswith("python -m rqvae diagnose"))


@pytest.mark.parametrize("command", list(commands_of_the_page()) if (ROOT / "docs/vae_diagnostic.md").exists() else [])
def test_the_commands_of_the_page(
    command: str, cli: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights, without a compiler's seconds, in a folder of its own; placeholders get a value."""
    (tmp_path / "bad_paths.txt").write_text("conv_in\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diagnose, "_MODEL", str(tmp_path / "VAE"))
    save_vae(tmp_path / "VAE")
    (tmp_path / "vae_diagnostic_output").mkdir()
    (tmp_path / "vae_diagnostic_output" / "bad_paths.txt").write_text("conv_in\n")
    words = shlex.split(command)[4:]
    extra = ["--backend", "eager", "--device", "cpu", "--latent_size", "4"]
    if not {"--test_paths", "--list_submodules", "compile_except"} & set(words):
        extra += ["--test_paths", "conv_in,mid_block.resnets.0"]
    assert cli("diagnose", *words, *extra) == 0
