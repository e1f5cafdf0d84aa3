"""The generated pages are those of the code, the site has no broken link, and the commands of the pages run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from docs.generate import FOLDER, PAGES
from rqvae.commands import COMMANDS
from rqvae.configuration import read
from rqvae.diffusion.sampling import Sampler
from tests.conftest import ROOT

CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))


@pytest.mark.parametrize("name", PAGES)
def test_committed_page_is_what_the_code_says(name: str) -> None:
    assert (FOLDER / name).read_text() == PAGES[name](), f"docs/{name} differs from the code: run `make docs`"


def keys_of(config: dict[str, Any], owner: str = "", prefix: str = "") -> Iterator[tuple[str, str]]:
    """(owner, key) of everything a resolved config has: `init_args` belong to the class beside them."""
    for key, value in config.items():
        yield owner, f"{prefix}{key}"
        if not isinstance(value, dict):
            continue
        if "class_path" in value:
            module, _, name = value["class_path"].rpartition(".")
            cls = getattr(import_module(module), name)
            yield from keys_of(value.get("init_args") or {}, f"{cls.__module__}.{cls.__qualname__}")
        elif key == "sampler":
            yield from keys_of(value, f"{Sampler.__module__}.Sampler")
        elif not owner:
            yield from keys_of(value, owner, f"{prefix}{key}.")


@pytest.mark.usefixtures("small_hub_vae")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_key_of_the_shipped_configs_is_on_the_page(path: Path) -> None:
    """The keys are those that the config parser resolves, which knows nothing of the page."""
    page = (FOLDER / "configuration.md").read_text()
    classes = {part.partition("`\n")[0]: part for part in re.split(r"\n#### \w+\n\n`", page)}
    found = list(keys_of(read([path]).resolved))
    assert len(found) > 30
    for owner, key in found:
        text = classes[owner] if owner else page
        assert f"`{key}`" in text, f"{owner or 'config'}: {key} is not on docs/configuration.md"


def test_every_documented_key_has_words() -> None:
    """A row without a meaning is an argument that its class's docstring forgot."""
    rows = [row for name in PAGES for row in (FOLDER / name).read_text().splitlines() if row.startswith("| ")]
    silent = [row for row in rows if row.replace("\\|", "").rstrip().endswith("|  |")]
    assert not silent, silent


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_is_on_the_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Against argparse's own help."""
    parser = import_module(f"rqvae.commands.{name.replace('-', '_')}").parser()
    page = (FOLDER / "cli.md").read_text()
    section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", parser.format_help())) - {"--help"}
    listed = {option.rstrip("-") for option in re.findall(r"--[a-z][\w-]*", section)}
    assert section
    assert options <= listed


def test_pages_show_no_address_of_a_machine() -> None:
    """A default that is an object or an absolute path would differ from machine to machine."""
    for name in PAGES:
        found = re.findall(r"0x[0-9a-f]{6,}|/home/\S+|/work/\S+|<function|<class", (FOLDER / name).read_text())
        assert not found, (name, found)


class Targets(HTMLParser):
    """What a page refers to, and the anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            if name == "href" and tag == "a" and value:
                self.links.append(value)
            if value and ((name == "src") or (name == "href" and tag == "link")):
                self.loads.append(value)


def test_the_site_builds_strictly_and_needs_no_network(tmp_path: Path) -> None:
    """mkdocs refuses broken links between sources; here the links of the built pages are followed."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", "docs/mkdocs/mkdocs.yml"]
    done = subprocess.run([*command, "--site-dir", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    pages = {file: Targets(file.read_text()) for file in tmp_path.glob("*.html") if file.name != "404.html"}
    assert {"configuration.html", "cli.html", "resume.html", "architecture.html"} <= {file.name for file in pages}
    for file, page in pages.items():
        for target in page.loads:
            assert not target.startswith(("http:", "https:", "//")), f"{file.name} loads {target}"
            assert (tmp_path / target.partition("?")[0]).exists(), f"{file.name}: {target}"
        for target in page.links:
            place, _, fragment = target.partition("#")
            if place.startswith(("http:", "https:")):
                continue
            other = file if not place else tmp_path / place
            assert other.exists(), f"{file.name}: {target}"
            if fragment and other in pages:
                assert fragment in pages[other].anchors, f"{file.name}: {target}"


def test_a_broken_link_stops_the_site(tmp_path: Path) -> None:
    """The check above can fail."""
    pytest.importorskip("mkdocs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](gone.md)")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\ntheme: {name: mkdocs}\nplugins: []\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(tmp_path / "mkdocs.yml")]
    assert subprocess.run(command, capture_output=True).returncode != 0


def commands_of(page: Path) -> list[list[str]]:
    """The shell commands of a page, one a list of words."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_commands_of_the_resume_page_do_what_it_says(tmp_path: Path, cli, capfd) -> None:
    first, fresh, resume = commands_of(FOLDER / "resume.md")

    def run(words: list[str]) -> str:
        """Run one in `tmp_path` in the place of `runs`, with the folder that TIME stands for."""
        assert words[:3] == ["python", "-m", "rqvae"]
        words = [word.replace("runs", str(tmp_path), 1) if word.startswith("runs") else word for word in words[3:]]
        known = sorted((tmp_path / "docs").glob("first_*"))
        words = [str(known[0]) if word.endswith("first_TIME") else word for word in words]
        assert cli(*words) == 0
        time.sleep(1.1)  # a second run of a name has another TIME
        return capfd.readouterr().err

    assert "new run" in run(first)
    (run_folder,) = (tmp_path / "docs").iterdir()
    assert (run_folder / "FINISHED").exists()
    assert "is finished; --fresh starts a new run" in run(first)
    (run_folder / "FINISHED").unlink()
    assert f"going on with {run_folder}, from step_00000010" in run(first), "as after an interruption"
    assert "new run" in run(fresh)
    assert len(list((tmp_path / "docs").iterdir())) == 2
    said = run(resume)
    assert re.search(r"new run \S+/second_\d{8}-\d{6} from \S+/first_\d{8}-\d{6}/checkpoints/step_00000010", said)
    assert "changed: train.steps: 10 -> 15" in said


def test_links_of_the_readme_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert targets
    assert not [t for t in targets if not t.startswith("http") and not (ROOT / t).exists()]
