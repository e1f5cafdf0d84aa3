"""Write one page on one run, or on several side by side: curves, values, pictures, differences."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser, folder_at
from rqvae.errors import BadInput

AXES = ("step", "images", "epoch", "time")


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae report", description=__doc__)
    own.add_argument("runs", nargs="+", metavar="RUN", help="run folders or their URLs, of one stage or of both")
    own.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE.html", help="report.html by default"
    )
    own.add_argument("--against", choices=AXES, default="step", help="horizontal axis; images for other batch sizes")
    own.add_argument("--title", help="of the page; the runs' names by default")
    return own


def run(arguments: Sequence[str]) -> int:
    """Write one page on one run, or on several side by side: curves, values, pictures, differences."""
    if arguments and arguments[0] == "channels":  # a run of that name is ./channels
        from rqvae.commands import report_channels

        return report_channels.run(arguments[1:])
    options = parser().parse_args(list(arguments))

    from rqvae.reports.run_report import distinct_names, write_report

    check_out(options.out)
    runs = [folder_at(run) for run in options.runs]
    names = distinct_names(runs)
    title = options.title or (names[0] if len(names) == 1 else f"{len(names)} runs")
    write_report(options.out, title=title, runs=runs, against=options.against)
    sys.stdout.write(f"{options.out}: {', '.join(names)}\n")
    return 0


def check_out(out: Path) -> None:
    """BadInput unless `out` names a page that can be written; nothing is made."""
    if out.suffix != ".html" or out.is_dir():
        raise BadInput(f"--out {out}: expected a file that ends in .html")
    nearest = out.parent
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK) or (out.exists() and not os.access(out, os.W_OK)):
        raise BadInput(f"--out {out}: expected a place that can be written, {nearest} is not")
