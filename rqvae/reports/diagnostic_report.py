"""The page of one compile diagnosis, made from its metrics.json alone."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from rqvae.errors import BadInput
from rqvae.reports.curves import INK, STYLE
from rqvae.reports.page import Leaf, Page, Tile

_BAD = (
    *("MISMATCH", "BLANK", "NONFINITE", "SHAPE", "DTYPE"),
    *("COMPILE_ERROR", "RUNTIME_ERROR", "TIMEOUT", "CRASHED"),
)
_KIND = {"OK": "good", "CONTAINER": "quiet", "NOT_EXERCISED": "quiet"} | dict.fromkeys(_BAD, "bad")
_GOOD, _WRONG = "#1f9d78", "#d1495b"
_MOST_PICTURES = 12

Row = Mapping[str, Any]


def write_report(folder: Path, metrics: Mapping[str, Any], baseline: Path | None, retest: str) -> Path:
    """Write FOLDER/report.html and return its path.

    Args:
        folder: of the diagnosis; pictures are read from it.
        metrics: content of metrics.json.
        baseline: metrics.json of another diagnosis, or None.
        retest: the command that compiles all but what was found bad.

    Raises:
        BadInput: a baseline that is no metrics.json of a diagnosis.
    """
    config, rows = metrics["config"], metrics["results"]
    subtitle = (
        f"{config['subject']}; {config['compiler']} on {config['device']}, {config['dtype']}, seed {config['seed']}"
    )
    latent = config["latent"]
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    footer = f"Latent {' x '.join(map(str, latent['shape']))}, sha256 {latent['sha256'][:16]}; {versions}"
    page = Page("Compile diagnostic", subtitle, footer)
    _answer(page, metrics, retest)
    _gallery(page, folder, config, rows)
    _sets(page, folder, metrics)
    page.heading("Submodules")
    page.tree([_leaf(row) for row in rows], "Status of each submodule compiled by itself, on its own live input.")
    _plots(page, rows)
    _table(page, rows)
    if baseline is not None:
        _difference(page, rows, baseline)
    return page.write(folder / "report.html")


def _answer(page: Page, metrics: Mapping[str, Any], retest: str) -> None:
    summary, config = metrics["summary"], metrics["config"]
    if config.get("random_weights"):
        page.paragraph("The weights are random: compiled code is judged, pictures say nothing about a trained model.")
    page.tiles(
        Tile("Submodules", summary["total"], note=f"{summary['untested']} without a verdict on the compiler"),
        Tile("Right when compiled", summary["compiled"]),
        Tile("Wrong when compiled", summary["failed"] + summary["blank"], note=f"{summary['blank']} of them blank"),
        Tile("Compiled graphs", summary.get("compiled_graphs"), note=f"{summary.get('decodes')} decodes"),
    )
    page.heading("Answer")
    plan = summary.get("plan") or {}
    together = [" + ".join(found["paths"]) for found in summary["interactions"]]
    not_searched = [f"{name} not searched: {why}" for name, why in summary.get("not_searched", {}).items()]
    cuts = [f"{cut['path']}: before {cut['before']}" for cut in summary["suggested_graph_breaks"]]
    number = plan.get("compile")
    units = f"{number} unit{'' if number == 1 else 's'}"
    compiled = f"{units} compiled in {plan.get('file')}; the image with it: {plan.get('status')}"
    answers = [
        ("Wrong by themselves", ", ".join(summary["culprits"]) or "none"),
        ("Wrong only as a whole, or together", ", ".join([*together, *not_searched]) or "none"),
        (
            "Cut their graphs",
            ", ".join(cuts) or "none found; --mode find_breaks looks for them" if together else "not needed",
        ),
        ("Compile plan", compiled if plan else "written by --mode single"),
        ("Test again without them", retest if summary["culprits"] or together else "not needed"),
    ]
    caption = "What to leave eager, and where to cut. The plan is for --compile_plan of train, sample and recon."
    page.table(["what", "where and how"], answers, caption)


def _leaf(row: Row) -> Leaf:
    depth = 0 if row["path"] == "<root>" else row["path"].count(".") + 1
    error = row.get("relative_l2")
    note = f"relative error {error:.2g}" if isinstance(error, float) and error > 0 else ""
    words = [row["role"] or "", note, ", ".join(row["notes"])]
    return Leaf(depth, row["path"], row["status"], _KIND.get(row["status"], "open"), "; ".join(filter(None, words)))


def _gallery(page: Page, folder: Path, config: Mapping[str, Any], rows: Sequence[Row]) -> None:
    page.heading("Pictures")
    sources = {"eager": folder / config["reference"]["file"]}
    wrong = [
        row for row in rows if row["status"] in _BAD and row["role"] != "inherited" and (row["image"] or {}).get("file")
    ]
    for row in wrong[:_MOST_PICTURES]:
        sources[f"{row['path']} compiled"] = folder / row["image"]["file"]
        if row["image"].get("error_map"):
            sources[f"{row['path']} error x10"] = folder / row["image"]["error_map"]
    without = [
        (row["path"], row["status"], row["image"]["no_picture"])
        for row in rows
        if row["status"] not in ("CONTAINER", "NOT_EXERCISED") and (row["image"] or {}).get("no_picture")
    ]
    more = f" {len(wrong) - _MOST_PICTURES} more are in images/." if len(wrong) > _MOST_PICTURES else ""
    page.gallery(sources, f"The eager image, and those with exactly one submodule compiled.{more}", 16, width=192)

    if without:
        page.table(["path", "status", "why"], without, "Submodules that are not OK and have no picture.")


def _sets(page: Page, folder: Path, metrics: Mapping[str, Any]) -> None:
    """What `--mode compile_except` found, by the set that stayed eager."""
    sets = metrics["summary"].get("compile_except", {})
    if not sets:
        return
    page.heading("All but some compiled")
    names = ("path", "status", "role", "backend_calls")
    for key, entry in sets.items():
        cells = [[*(row[name] for name in names), ", ".join(row["notes"])] for row in entry["results"]]
        page.table(
            ["rows", "status", "role", "runs of compiled graphs", "notes"], cells, f"Excluded: {key or 'nothing'}."
        )
        shown = [row for row in entry["results"] if (row["image"] or {}).get("file")][:_MOST_PICTURES]
        if shown:
            pictures = {row["path"]: folder / row["image"]["file"] for row in shown}
            page.gallery(pictures, f"With all but {key or 'nothing'} compiled.", 16, width=192)


def _plots(page: Page, rows: Sequence[Row]) -> None:
    timed = [row for row in rows if (row["timing"] or {}).get("speed_up")]
    if timed:
        page.heading("Cost and gain")
        page.drawing(
            _scatter(timed), "Seconds of compilation against how much faster the submodule runs; above 1 it pays."
        )
    known = [row for row in rows if isinstance(row.get("headroom_bits"), float) and row["leaf"]]
    if known:
        caption = (
            "Powers of two between a layer's largest value and its type's largest number; below 2 it may overflow."
        )
        page.drawing(_headroom(known), caption)


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"(?s)^.*?(?=<svg)", "", buffer.getvalue().decode()).replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # without a fixed size it fills the page; addresses of name spaces are not needed inline
    return re.sub(
        r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    )


def _colours(rows: Sequence[Row]) -> list[str]:
    return [_WRONG if row["status"] in _BAD else _GOOD for row in rows]


def _scatter(rows: Sequence[Row]) -> str:
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(9, 3), layout="constrained")
        axes = figure.add_subplot()
        seconds = [max(row["timing"]["compile_seconds"], 1e-3) for row in rows]
        axes.scatter(seconds, [row["timing"]["speed_up"] for row in rows], c=_colours(rows), s=14)
        axes.axhline(1, color=INK, linewidth=0.5, linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel="compile seconds (shared graphs near 0.001)", ylabel="speed-up")
        return _svg(figure)


def _headroom(rows: Sequence[Row]) -> str:
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(9, 2.4), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(range(len(rows)), [row["headroom_bits"] for row in rows], color=_colours(rows))
        axes.set(xlabel="leaf submodules, in the decoder's order", ylabel="headroom, bits")
        return _svg(figure)


def _table(page: Page, rows: Sequence[Row]) -> None:
    page.heading("All figures")
    header = ["path", "type", "status", "relative error", "tolerance", "max error", "cosine", "compile s", "speed-up"]
    names = ("error_compiled", "tolerance", "max_abs", "cosine")
    cells = [
        [row["path"], row["type"], row["status"], *(row.get(name) for name in names)]
        + [(row["timing"] or {}).get("compile_seconds"), (row["timing"] or {}).get("speed_up")]
        for row in rows
    ]
    page.table(
        header, cells, "Errors are relative to a reference of higher precision; more figures are in metrics.csv."
    )
    errors = [
        (row["path"], row["error"]["kind"] or row["status"], row["error"]["message"]) for row in rows if row["error"]
    ]
    if errors:
        page.table(["path", "kind", "message"], errors, "What failed; traces are in metrics.json.")


def read_baseline(path: Path) -> dict[str, str]:
    """Statuses by path of another diagnosis.

    Raises:
        BadInput: no such file, or no metrics.json of a diagnosis.
    """
    try:
        return {row["path"]: row["status"] for row in json.loads(path.read_text())["results"]}
    except OSError:
        raise BadInput(f"--baseline: expected metrics.json of another diagnosis, no file {path}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--baseline {path}: expected metrics.json of a diagnosis, got {error!r}") from None


def _difference(page: Page, rows: Sequence[Row], baseline: Path) -> None:
    before = read_baseline(baseline)
    now = {row["path"]: row["status"] for row in rows}
    changed = [
        (path, before.get(path, "absent"), now.get(path, "absent"))
        for path in dict.fromkeys([*now, *before])
        if before.get(path) != now.get(path)
    ]
    page.heading("Against the baseline")
    if changed:
        page.table(["path", "before", "now"], changed, f"Statuses that differ from {baseline}.")
    else:
        page.paragraph(f"Every status is that of {baseline}.")
