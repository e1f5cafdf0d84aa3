"""The rooms import one way, hardware has one door, and files and functions stay small."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rqvae"
LEAVES = {"contracts", "errors", "files", "randomness", "processes", "durations", "weight_files"}
LEAVES |= {"lpips_network", "mask_colours", "remote", "shards"}
MAY_IMPORT: dict[str, set[str]] = {
    "diffusion": set(),
    "backends": set(),
    "metrics": set(),
    "games": set(),
    "img_datasets": set(),
    "models": {"img_datasets.interfaces", "diffusion"},
    "callbacks": {"models", "backends", "img_datasets", "metrics", "diffusion", "health"},
    "diagnostics": {"models", "backends"},
    "run": {
        "callbacks.channels.settings",
        "callbacks.interfaces",
        "img_datasets",
        "models",
        "trainers.settings",
        "trainers.updates",
    },
    "trainers": {"callbacks", "models", "backends", "img_datasets", "metrics", "diffusion", "games", "run"}
    | {"diagnostics"},
    "play": {"diffusion", "games", "metrics", "models", "trainers"},
    "api": {"backends", "configuration", "diffusion", "img_datasets", "metrics", "models", "run", "shipped"}
    | {"trainers"},
    "reports": {"metrics"},
    "health": set(),
}
VENDORS = ("torch_xla", "habana_frameworks")
HARDWARE = re.compile(
    r"\btorch\.(?:cuda|distributed|accelerator|backends|xpu|mps|mtia)\b|\bdist\.\w+|\bxla\b|\bhpu\b|== \"cuda\""
)
KNOWS_HARDWARE = {
    "rqvae/metrics/full_precision.py": {"torch.backends"},
    "rqvae/metrics/programs.py": {"torch.accelerator"},
}
"""Files outside backends, and what they may name. The programs of `eval` load metrics and no other room (a test of
theirs says so): they find their device themselves, and turn TF32 off around their networks wherever the images are."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def programs() -> list[Path]:
    """What is run beside the package."""
    return sorted([*(ROOT / "eval").rglob("*.py"), *(ROOT / "gpu_eval").rglob("*.py")])


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    tree = ast.parse(path.read_text())
    for name in imports(tree):
        assert not name.startswith(VENDORS) or room == "backends", f"{path}: {name} outside backends"
        if room in MAY_IMPORT and name.startswith("rqvae."):
            inside = name.removeprefix("rqvae.")
            allowed = {room, *LEAVES, *MAY_IMPORT[room]}
            assert any(inside == a or inside.startswith(f"{a}.") for a in allowed), f"{path} imports {name}"


@pytest.mark.parametrize("path", programs(), ids=lambda p: str(p.relative_to(ROOT)))
def test_programs_import_no_vendor(path: Path) -> None:
    assert not [name for name in imports(ast.parse(path.read_text())) if name.startswith(VENDORS)]


@pytest.mark.parametrize("path", [*modules(), *programs()], ids=lambda p: str(p.relative_to(ROOT)))
def test_hardware_has_one_door(path: Path) -> None:
    if path.parent == PACKAGE / "backends":
        return
    found = set(HARDWARE.findall(path.read_text()))
    assert found == KNOWS_HARDWARE.get(str(path.relative_to(ROOT)), set()), f"{path}: {found}"


@pytest.mark.parametrize("path", [*modules(), *programs()], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400, path
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"
            assert node.returns is not None, f"{path}:{node.lineno} {node.name} has no return type"


def test_this_test_can_fail() -> None:
    assert "rqvae.trainers.clock.Clock" in imports(ast.parse("from rqvae.trainers.clock import Clock"))
    assert HARDWARE.findall("torch.accelerator.current_accelerator()") == ["torch.accelerator"]
