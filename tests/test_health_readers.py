"""Readers of logs: every format gives back the curve it was written from, and broken files are told in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from rqvae.errors import BadInput
from rqvae.health.log import RunLog
from rqvae.health.readers import read_log, readers
from rqvae.health.roles import role_of
from tests.health_logs import WRITERS, dit, guided_csv, guided_text, healthy, ours, trainer_state, wandb_csv


def written(folder: Path, form: str, points: int = 120) -> tuple[Path, str, np.ndarray, np.ndarray]:
    name, metric, write = WRITERS[form]
    steps, values = healthy(points)
    write(folder / name, (steps, values))
    return folder / name, metric, steps, values


@pytest.mark.parametrize("form", WRITERS)
def test_a_format_gives_back_its_curve(tmp_path: Path, form: str) -> None:
    path, metric, steps, values = written(tmp_path, form)
    log = read_log(path)
    assert log.format == form
    (segment,) = log.segments
    series = segment.series[metric]
    assert len(series) == 120
    np.testing.assert_allclose(series.values, values, rtol=6e-3 if form == "guided-text" else 6e-4)
    if form not in ("dm", "guided-text"):
        np.testing.assert_array_equal(series.steps, steps)
    text = path.read_text().split("\n")
    if form not in ("lucidrains", "dm", "trainer-state"):
        for i in (0, 57, 119):
            numbers = [float(x) for x in re.findall(r"\d+\.\d+", text[series.lines[i] - 1])]
            assert min(abs(x / values[i] - 1) for x in numbers) < 6e-3


def test_every_reader_of_the_package_is_tested_here() -> None:
    assert {reader.name for reader in readers()} == {*WRITERS, "tensorboard"}


def test_tensorboard_events_as_the_writer_of_torch_makes_them(tmp_path: Path) -> None:
    board = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(tmp_path)
    steps, values = healthy(50)
    for step, value in zip(steps, values, strict=True):
        board.add_scalar("train/loss", value, int(step))
        board.add_histogram("weights", np.zeros(9), int(step))
    board.close()
    (path,) = tmp_path.glob("events*")
    log = read_log(tmp_path)
    assert (log.format, log.points("train/loss")) == ("tensorboard", 50)
    np.testing.assert_allclose(log.segments[0].series["train/loss"].values, values, rtol=1e-6)
    path.write_bytes(path.read_bytes()[:-5])
    cut = read_log(path)
    assert cut.points("train/loss") == 50
    assert "cut off" in cut.notes[0]


def test_twins_of_one_run_agree_to_the_digits_that_are_printed(tmp_path: Path) -> None:
    curve = healthy(200, every=20)
    guided_csv(tmp_path / "progress.csv", curve)
    guided_text(tmp_path / "log.txt", curve)
    csv, text = (read_log(tmp_path / name).segments[0].series["loss"] for name in ("progress.csv", "log.txt"))
    assert len(csv) == len(text) == 200
    np.testing.assert_allclose(text.values, csv.values, rtol=6e-3)


def test_steps_that_repeat_by_rounding_are_no_restart(tmp_path: Path) -> None:
    guided_text(tmp_path / "log.txt", healthy(600, every=20))
    log = read_log(tmp_path / "log.txt")
    steps = log.segments[0].series["loss"].steps
    assert (np.diff(steps) == 0).any()
    assert (len(log.segments), log.counts.get("restart", 0), len(log.segments[0].series["loss"].standing)) == (
        1,
        0,
        600,
    )


def test_several_runs_in_one_file_are_several(tmp_path: Path) -> None:
    first, second = healthy(80), healthy(40, seed=1)
    dit(tmp_path / "a", first)
    dit(tmp_path / "b", second)
    (tmp_path / "log.txt").write_text((tmp_path / "a").read_text() + (tmp_path / "b").read_text())
    log = read_log(tmp_path / "log.txt")
    assert [len(segment.series["Train Loss"]) for segment in log.segments] == [80, 40]


def test_what_a_resumed_run_wrote_again_counts_once(tmp_path: Path) -> None:
    steps, values = healthy(100)
    again = (np.concatenate([steps[:60], steps[40:]]), np.concatenate([values[:60] + 5, values[40:]]))
    ours(tmp_path / "metrics.jsonl", again)
    log = read_log(tmp_path / "metrics.jsonl")
    series = log.segments[0].series["train/loss_total"]
    assert (len(log.segments), log.counts["restart"] > 0, len(series), len(series.standing)) == (1, True, 120, 100)
    np.testing.assert_array_equal(series.standing.steps, steps)
    np.testing.assert_array_equal(series.standing.values[40:], values[40:])


def test_runs_of_a_wandb_export_are_columns(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('"Step","a - loss","b - loss"\n"1","0.5",""\n"2","0.4","0.9"\n"3","","0.8"\n')
    log = read_log(tmp_path / "x.csv")
    assert [(s.label, s.series["loss"].values.tolist()) for s in log.segments] == [("a", [0.5, 0.4]), ("b", [0.9, 0.8])]


def test_the_bar_of_a_loop_that_describes_before_it_counts(tmp_path: Path) -> None:
    bars = [
        ("", 0),
        ("loss: 1.1548: ", 0),
        ("loss: 1.1548: ", 1),
        ("loss: 2.6852: ", 1),
        ("loss: 2.6852: ", 2),
        ("loss: 2.6852: ", 2),
    ]
    text = "".join(f"\r{loss}{50 * n:3d}%|###  | {n}/2 [00:0{n}<00:01,  1.32s/it]" for loss, n in bars)
    (tmp_path / "x.log").write_text(text + "\n")
    series = read_log(tmp_path / "x.log").segments[0].series["loss"]
    assert (series.steps.tolist(), series.values.tolist()) == ([1, 2], [1.1548, 2.6852])


def test_nan_null_and_infinity_of_each_format(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text(
        '{"loss": NaN, "step": 1, "samples": 2}\n{"loss": Infinity, "step": 2, "samples": 4}\n'
    )
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "images": 8, "time": 1.0, "train/loss_total": null}\n')
    (tmp_path / "log.txt").write_text("[2024-01-01 00:00:00] (step=0000100) Train Loss: nan, Train Steps/Sec: 1.00\n")
    values = read_log(tmp_path / "progress.json").segments[0].series["loss"].values
    assert np.isnan(values[0])
    assert np.isinf(values[1])
    assert np.isnan(read_log(tmp_path / "metrics.jsonl").segments[0].series["train/loss_total"].values).all()
    assert np.isnan(read_log(tmp_path / "log.txt").segments[0].series["Train Loss"].values).all()


def test_encodings_colours_and_line_ends(tmp_path: Path) -> None:
    dit(tmp_path / "plain", healthy(60))
    text = (tmp_path / "plain").read_text()
    forms = {
        "crlf": text.replace("\n", "\r\n").encode(),
        "utf16": text.encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + text.encode(),
    }
    forms["mixed"] = text.encode().replace(b"/data/train", b"/data/tr\xe4in\xff")
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
        assert read_log(tmp_path / name).points("Train Loss") == 60, name


def test_a_trainer_state_that_was_cut_off_or_has_no_line_ends(tmp_path: Path) -> None:
    trainer_state(tmp_path / "a.json", healthy(100))
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    cut = read_log(tmp_path / "cut.json")
    assert 40 < cut.points("loss") < 60
    assert "cut off" in cut.notes[0]
    (tmp_path / "compact.json").write_text(json.dumps(json.loads(text)))
    assert read_log(tmp_path / "compact.json").points("loss") == 100


def test_losses_of_a_gan_are_no_loss_that_is_minimised() -> None:
    names = {
        "Loss/G/loss": "gan_g",
        "Loss/D/loss": "gan_d",
        "d_loss": "gan_d",
        "train/loss_disc": "gan_d",
        "loss_q3": "t_bin",
    }
    names |= {
        "eval_loss": "eval_loss",
        "val/loss": "eval_loss",
        "Train Loss": "train_loss",
        "train/loss_total": "train_loss",
    }
    names |= {"Train Steps/Sec": "throughput", "lr-AdamW": "lr", "eval_wer": "held_out", "fid50k_full": "score_low"}
    assert {name: role_of(name) for name in names} | {"eval_wer": "held_out"} == names | {"eval_wer": "held_out"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.csv", b"", "the file is empty"),
        ("blank.txt", b"\n\n  \n", "the file is empty"),
        ("header.csv", b"step,loss,samples\n", "found none"),
        ("binary.bin", bytes(range(256)) * 40, "binary data"),
        ("prose.txt", b"Once upon a time there was no training run.\n" * 9, "in a known format"),
        ("half.jsonl", b'{"step": 1, "images"', "in a known format"),
        ("events.out.tfevents.1.host", b"\x00" * 7, "none that is whole"),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=words) as caught:
        read_log(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_folders_and_formats(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no such file"):
        read_log(tmp_path / "none.csv")
    with pytest.raises(BadInput, match="expected a log in this folder"):
        read_log(tmp_path)
    wandb_csv(tmp_path / "x.csv", healthy(30))
    with pytest.raises(BadInput, match="expected the format dit, it looks like wandb-csv"):
        read_log(tmp_path / "x.csv", "dit")
    with pytest.raises(BadInput, match="expected one of"):
        read_log(tmp_path / "x.csv", "parquet")
    with pytest.raises(BadInput, match="can be imported"):
        read_log(tmp_path / "x.csv", "no.such.Reader")


def test_a_table_with_missing_columns_and_a_short_row(tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text("loss,samples,step\n0.5,8,1\n0.4\n,,3\n0.3,24,4\n")
    series = read_log(tmp_path / "progress.csv").segments[0].series["loss"]
    assert series.values.tolist() == [0.5, 0.4, 0.3]


class OwnReader:
    """A reader of somebody's own format."""

    name = "own"
    files: tuple[str, ...] = ()

    def sniff(self, _path: Path, head: str) -> float:
        return float(head.startswith("OWN"))

    def read(self, path: Path) -> RunLog:
        from rqvae.health.log import LogBuilder

        log = LogBuilder(path, self.name)
        for line, text in enumerate(path.read_text().splitlines()[1:], 2):
            log.add("loss", line, float(text), line)
        return log.finish(line)


def test_a_reader_of_ones_own_by_class_path(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("OWN\n1\n0.5\n")
    log = read_log(tmp_path / "x", "tests.test_health_readers.OwnReader")
    assert log.segments[0].series["loss"].values.tolist() == [1, 0.5]
