"""Writes the pages that are made from the code: `python -m docs.generate` (`make docs`).

docs/configuration.md, docs/cli.md, docs/health.md and a list in docs/resume.md. A test compares them with what the code
says now.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from docs import cli_page, configuration_page, health_page
from rqvae.trainers.run_folder import _PLACE_KEYS

FOLDER = Path(__file__).parent


def resume_page() -> str:
    """docs/resume.md as it is, with the keys in which two runs that count as the same may differ."""
    keys = "\n".join(f"- `{key}`" for key in sorted(_PLACE_KEYS))
    text = (FOLDER / "resume.md").read_text()
    return re.sub(r"(<!-- place keys -->\n).*?(<!-- end -->)", rf"\1\n{keys}\n\n\2", text, flags=re.DOTALL)


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration_page.page,
    "cli.md": cli_page.page,
    "health.md": health_page.page,
    "resume.md": resume_page,
}


def main() -> None:
    """Write every page that differs from what the code says."""
    for name, make in PAGES.items():
        file, text = FOLDER / name, make()
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            sys.stdout.write(f"{file.relative_to(FOLDER.parent)}: written\n")


if __name__ == "__main__":
    main()
