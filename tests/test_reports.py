"""Report pages: what is on them equals what was in the files, and nothing is loaded from elsewhere."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from skimage import data

from rqvae.errors import BadInput
from rqvae.metrics.animations import gif_bytes
from rqvae.reports.curves import default_keys, draw_curves, smooth
from rqvae.reports.demo import DemoInputs, write_demo_report
from rqvae.reports.grids import png_bytes, save_grid
from rqvae.reports.metrics_file import Metrics, read_metrics
from rqvae.reports.page import Page, Tile, show
from rqvae.reports.run_report import write_report

SUMMARY = {
    "stage1_psnr": 33.412763,
    "stage1_ssim": 0.98731,
    "nearest_train_psnr": 27.3391,
    "cpu_seconds": 803.22,
    "seconds": 368.4,
    "parts": {
        "collect": {"seconds": 4.1, "cpu_seconds": 3.3},
        "stage1": {"seconds": 364.3, "cpu_seconds": 799.92},
    },
    "world": {
        "one_step": {"psnr": 28.25, "psnr_moving": 14.625, "copy_last_moving": 4.875},
        "open_turns": 0.8125,
        "blocked_refused": None,
        "player_visible": {"1": 1.0, "64": 0.71875},
        "ghosts_visible": {"1": 1.0, "64": 0.40625},
        "detector_error": 0.0,
    },
    "extra": {"frames": 20000},
}


class Reader(HTMLParser):
    """Collects addresses, exact numbers, tags, and the text of a page; fails on tags that are not closed."""

    VOID = {"meta", "img"}

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.numbers: list[float] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(page.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                self.addresses.append(value)
            if tag == "data":
                self.numbers.append(json.loads(value))

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += text
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += text


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, seed: int = 0, steps: int = 60) -> Path:
    rng = np.random.default_rng(seed)
    (folder / "samples").mkdir(parents=True)
    rows = [
        {
            "step": k,
            "images": 32 * k,
            "epoch": k / 20,
            "time": 1.8e9 + k / 2,
            "train/loss_total": 1 / k + 0.02 * rng.random(),
        }
        | ({"val/psnr": 20 + k / 10} if k % 20 == 0 else {})
        for k in range(1, steps + 1)
    ]
    write_rows(folder / "metrics.jsonl", rows)
    config = {"train": {"steps": f"{steps} steps", "seed": seed}, "data": {"batch_size": 32}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {"commit": "4be1c0ffee", "parameters": {"autoencoder": 1432231, "discriminator": 171777}}
    (folder / "environment.json").write_text(json.dumps(environment))
    for step in (20, 60):
        photo = data.astronaut()[: step + 4, :64]
        (folder / "samples" / f"recon_{step:08d}.png").write_bytes(png_bytes(photo))
    return folder


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    photos = np.stack([data.astronaut()[k : k + 32, k : k + 32] for k in (0, 100, 200)]).transpose(0, 3, 1, 2)
    save_grid(photos, tmp_path / "recon" / "grids" / "reconstructions.png", columns=1)
    save_grid(photos, tmp_path / "samples.png", columns=1)
    (tmp_path / "dream.gif").write_bytes(gif_bytes(photos.transpose(0, 2, 3, 1), fps=8))
    runs = [make_run(tmp_path / "train" / name, steps=steps) for name, steps in (("one", 60), ("two", 40))]
    summary = SUMMARY | {"stage1_run": str(runs[0]), "stage2_run": str(runs[1])}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "meta.json").write_text(json.dumps({"action_names": ["STAY", "JUMP", "DUCK"]}))
    return tmp_path


def test_demo_page_is_self_contained(demo: Path) -> None:
    page = Reader(write_demo_report(demo))
    assert page.addresses
    assert all(re.match(r"#|data:image/(png|gif);base64,", address) for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.tags.count("img") == 3
    assert page.tags.count("svg") == 2
    text = (demo / "report" / "index.html").read_text()
    assert "@import" not in text
    for reference in [address[1:] for address in page.addresses if address.startswith("#")]:
        assert f'id="{reference}"' in text


def test_demo_page_shows_the_numbers_of_the_files(demo: Path) -> None:
    page = Reader(write_demo_report(demo))
    expected = [33.412763, 0.98731, 27.3391, 803.22, 368.4, 4.1, 3.3, 799.92, 20000, 1432231, 171777]
    expected += [28.25, 14.625, 0.8125, 0.71875, 0.40625]
    assert set(expected) <= set(page.numbers)
    # Steps and images of both runs, from the last rows.
    assert {60, 1920, 40, 1280} <= set(page.numbers)
    for words in ("33.41", "0.9873", "27.34", "803.2", "1,432,231", "4be1c0ffee", "60 steps", "JUMP"):
        assert words in page.text


def test_demo_page_is_the_same_each_time_and_leaves_no_other_file(demo: Path) -> None:
    first = write_demo_report(demo).read_bytes()
    assert write_demo_report(demo).read_bytes() == first
    assert [path.name for path in (demo / "report").iterdir()] == ["index.html"]


@pytest.mark.parametrize(
    "missing",
    [
        "summary.json",
        "samples.png",
        "dream.gif",
        "frames/meta.json",
        "train/two/metrics.jsonl",
        "train/one/config.yaml",
    ],
)
def test_a_missing_file_is_named(demo: Path, missing: str) -> None:
    (demo / missing).unlink()
    with pytest.raises(BadInput) as error:
        write_demo_report(demo)
    assert str(error.value).startswith(f"{demo / missing}: expected")
    assert "\n" not in str(error.value)
    assert not (demo / "report").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage1_ssim": None}, "key stage1_ssim: expected a number, got None"),
        ({"parts": {"stage1": {"seconds": "long"}}}, "key parts.stage1.seconds: expected a number, got 'long'"),
        ({"seconds": True}, "key seconds: expected a number, got True"),
        ({"stage1_run": 3}, "key stage1_run: expected a text, got 3"),
    ],
)
def test_a_key_of_another_type_is_named(demo: Path, change: dict, message: str) -> None:
    file = demo / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BadInput, match=message):
        write_demo_report(demo)
    file.write_text(json.dumps(SUMMARY))
    with pytest.raises(BadInput, match="key stage1_run: expected a text, there is no such key"):
        write_demo_report(demo)


def test_demo_takes_other_inputs(demo: Path) -> None:
    sheet = demo / "recon" / "grids" / "reconstructions.png"
    inputs = DemoInputs(demo / "train" / "two", demo / "train" / "one", sheet, sheet, sheet, ["A", "B", "C"])
    rows = Reader(write_demo_report(demo, inputs)).rows
    assert ["step", "40", "60"] in rows


def test_run_report_overlays_runs_and_shows_what_differs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, seed) for name, seed in (("first", 3), ("second", 4))]
    page = Reader(write_report(tmp_path / "out" / "r.html", title="A & <b>", runs=runs))
    assert "A & <b>" in page.text
    assert "b" not in page.tags
    assert page.tags.count("svg") == 1
    assert page.tags.count("img") == 2
    assert "recon_00000060.png" in page.text
    assert "recon_00000020.png" not in page.text
    assert ["seconds, first row to last", "29.5", "29.5"] in page.rows
    assert ["parameters autoencoder", "1,432,231", "1,432,231"] in page.rows
    assert page.rows[page.rows.index(["key", "first", "second"]) + 1 :] == [["train.seed", "3", "4"]]


def test_metrics_of_a_run_that_is_still_writing(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write_rows(file, [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": None, "val/psnr": 30.0}])
    with file.open("a") as stream:
        stream.write('{"step": 3, "train/lo')
    metrics = read_metrics(file, "run")
    assert metrics.keys == ["train/loss", "val/psnr"]
    steps, losses = metrics.series("train/loss")
    assert steps.tolist() == [1, 2]
    np.testing.assert_array_equal(losses, [0.5, np.nan])
    assert [part.tolist() for part in metrics.series("val/psnr")] == [[2], [30]]


def test_a_broken_line_before_the_last_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(BadInput, match=r"metrics.jsonl: line 2: expected a JSON object with a step"):
        read_metrics(file, "run")
    file.write_text("")
    with pytest.raises(BadInput, match="expected at least one row, got none"):
        read_metrics(file, "run")


def line_points(svg: str, colour: str, width: str) -> list[np.ndarray]:
    """Points of the lines of one colour and width, in the drawing's units."""
    found = []
    for path in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):
        style = path.get("style", "")
        if f"stroke: {colour}" in style and f"stroke-width: {width}" in style and "clip-path" in path.attrib:
            words = path.attrib["d"].replace("M", " ").replace("L", " ").split()
            found.append(np.array(words, dtype=float).reshape(-1, 2))
    return found


def test_curves_lie_where_the_values_are() -> None:
    rows = [{"step": k, "a/linear": 5.0 - k, "a/halving": 2.0**-k} for k in range(1, 9)]
    svg = draw_curves([Metrics("run", rows)], ["a/linear", "a/halving"])
    linear, halving, halving_log = line_points(svg, "#3b7ddd", "1.5")
    for points, values in ((linear, 5.0 - np.arange(1, 9)), (halving, 0.5 ** np.arange(1, 9))):
        fit = np.polyfit(values, points[:, 1], 1)
        assert fit[0] < 0  # SVG counts downwards
        np.testing.assert_allclose(np.polyval(fit, values), points[:, 1], atol=1e-4)
    np.testing.assert_allclose(np.diff(halving_log[:, 1], n=2), 0, atol=1e-4)  # a straight line on a log axis


def test_overlays_have_a_legend_and_gaps_are_marked() -> None:
    rows = [{"step": k, "train/loss": 1.0 if k != 5 else None} for k in range(1, 9)]
    runs = [Metrics("plain", rows), Metrics("with <less>", rows[:3])]
    svg = draw_curves(runs, ["train/loss"])
    words = "".join(ElementTree.fromstring(svg).itertext())
    assert "plain" in words
    assert "with <less>" in words
    assert len(line_points(svg, "#d1495b", "0.7")) == 1
    assert "http" not in svg.replace("http://www.w3.org/", "")
    with pytest.raises(BadInput, match=r"key train/lost: expected one of train/loss"):
        draw_curves(runs, ["train/lost"])


def test_keys_a_reader_looks_for_come_first() -> None:
    row = {"step": 1, "train/lr": 1, "train/loss_recon": 1, "train/loss_total": 1, "val/psnr": 1, "eval/rfid": 1}
    keys = default_keys([Metrics("run", [row])])
    assert keys == ["eval/rfid", "val/psnr", "train/loss_total", "train/loss_recon", "train/lr"]


def test_smoothing_is_the_weighted_mean_and_passes_over_gaps() -> None:
    values = np.random.default_rng(0).normal(size=40)
    values[[0, 7, 8]] = np.nan
    weights = 0.5 ** (np.abs(np.subtract.outer(np.arange(40), np.arange(40))) / 3) * np.isfinite(values)
    expected = (weights * np.where(np.isfinite(values), values, 0)).sum(1) / weights.sum(1)
    np.testing.assert_allclose(smooth(values, half_life=3), expected, rtol=1e-12)


def test_values_are_shown_as_a_reader_wants_them() -> None:
    values = (33.41276, 0.98731, 1432231, 20480.6, 4e-4, 3.1e-6, None, True, "fp32", [1, 2], 0, -0.5)
    shown = ["33.41", "0.9873", "1,432,231", "20,481", "0.0004", "3.1e-06", "–", "true", "fp32", "[1, 2]", "0", "-0.5"]
    assert [show(value) for value in values] == shown


def test_page_refuses_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("not a picture")
    with pytest.raises(BadInput, match=r"x.png: expected a picture"):
        Page("t").picture(tmp_path / "x.png", "c")


def test_page_escapes_text(tmp_path: Path) -> None:
    page = Page("<i>", "<i>", "<i>")
    page.heading("<i>")
    page.paragraph("<i>")
    page.tiles(Tile("<i>", "<i>", "<i>", "<i>"))
    page.table(["<i>"], [["<i>"]], "<i>")
    page.gallery({"<i>": png_bytes(np.zeros((2, 2, 3), np.uint8))}, "<i>")
    assert "i" not in Reader(page.write(tmp_path / "p.html")).tags


def test_saved_grid_holds_the_pixels_of_a_tensor(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (3, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = save_grid(images, tmp_path / "deep" / "sheet.png", columns=2, scale=3, gap=1)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * 12 + 1, 2 * 15 + 1, 3)
    np.testing.assert_array_equal(sheet[13::3, :15:3], images[2].permute(1, 2, 0).numpy())


def test_reports_do_without_torch() -> None:
    """A page can be made where no training code can run."""
    modules = "rqvae.reports.demo, rqvae.reports.run_report, rqvae.reports.grids"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
