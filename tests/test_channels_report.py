"""`report channels`: the page says what the files hold, effects are those of scipy, ablation that of a net by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from torch.nn import functional

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import LabeledImageData
from rqvae.metrics.intervals import t_quantile
from rqvae.models.stage1.kl_vae import KLVAE
from rqvae.reports.channel_drawings import even_steps
from rqvae.reports.channel_files import read_channels
from rqvae.reports.channels import survival, write_channel_report
from rqvae.reports.effects import arms_of, paired_effect
from rqvae.reports.run_files import read_run
from rqvae.trainers.ablate_channels import effects_of
from tests.conftest import only
from tests.test_channels_run import ACTING, train
from tests.test_reports import Reader, write_rows

CLI = Callable[..., int]
STATES = ["active", "outlier", "suppressed", "disconnected", "constant", "silent", "saturated", "inactive"]
DEAD = STATES[2:]
FIELDS = ["mean", "std", "gamma", "beta"]


def make_run(folder: Path, strategy: str = "none", seed: int = 0, psnr: float = 20.0, lr: float = 1e-3) -> Path:
    """A run of 8 snapshots with two layers of 2 and 3 channels and 2 latents, written by hand.

    Channel 0 of layer b (column 2) is silent from step 20 on; where the run intervenes it is acted upon before step
    51, and is active from step 70 on.
    """
    channels = folder / "channels"
    channels.mkdir(parents=True)
    steps = np.arange(10, 90, 10)
    states = np.zeros((8, 7), dtype=np.int8)
    states[1:, 2] = STATES.index("silent")
    states[:, 6] = STATES.index("inactive")
    acts = []
    if strategy != "none":
        states[6:, 2] = 0
        acts = [{"step": 50, "strategy": strategy, "dry_run": False, "channels": [["b", 0, "silent", 0.0]]}]
    values = np.random.default_rng(seed).random((8, 4, 5)).astype(np.float16)
    # the first two shards overlap, as after a kill between putting parts together and deleting them
    for first, last in ((0, 4), (2, 3), (4, 8)):
        part = slice(first, last)
        name = f"steps_{steps[first]:09d}_{steps[last - 1]:09d}.npz"
        np.savez(channels / name, step=steps[part], states=states[part], values=values[part])
    about = {"layers": [{"name": "a", "channels": 2}, {"name": "b", "channels": 3}]}
    about |= {"fields": FIELDS, "states": STATES, "dead": DEAD}
    (channels / "layers.json").write_text(json.dumps(about))
    death = None if strategy == "none" else 70
    regions = [{"layer": "b", "channel": 0, "state": "silent", "birth": 20, "death": death, "score": 0.0125}]
    regions += [{"layer": "latent", "channel": 1, "state": "inactive", "birth": 10, "death": None, "score": 0.003}]
    (channels / "regions.json").write_text(json.dumps({"regions": regions}))
    (channels / "interventions.jsonl").write_text("".join(json.dumps(act) + "\n" for act in acts))
    rows = [{"step": 40, "images": 40, "epoch": 1.0, "time": 1.0, "val/psnr": 1.0}]
    rows += [{"step": 80, "images": 80, "epoch": 2.0, "time": 2.0, "val/psnr": psnr, "channels/dead_fraction": 0.25}]
    write_rows(folder / "metrics.jsonl", rows)
    config = {"train": {"seed": seed}, "intervention": {"strategy": strategy}, "updates": {"lr": lr}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "tracking": {"enabled": True}}))
    (folder / "environment.json").write_text("{}")
    return folder


def test_page_says_what_the_files_hold(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "recycle")
    page = Reader(write_channel_report(tmp_path / "r.html", title="T", runs=[run]))
    assert page.tags.count("svg") == 5  # survival, dead fraction, timeline, channels, gamma and beta
    assert ["b", "3", "0", "0"] in page.rows
    assert ["latent", "2", "1", "0.5"] in page.rows
    assert ["b", "0", "silent", "20", "70", "50", "0.0125"] in page.rows
    assert ["latent", "1", "inactive", "10", "–", "70", "0.003"] in page.rows
    assert 100 * (1 / 7) in page.numbers  # dead at the end, in percent
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert not {"script", "link"} & set(page.tags)


def test_snapshots_are_read_once_and_in_order(tmp_path: Path) -> None:
    files = read_channels(read_run(make_run(tmp_path / "run")))
    assert files is not None
    assert files.steps.tolist() == list(range(10, 90, 10))
    assert files.values["gamma"].shape == (8, 5)
    assert files.is_dead.sum(1).tolist() == [1] + 7 * [2]
    places, edges = even_steps(np.array([10, 20, 50]))
    assert places.tolist() == [0, 1, 2]
    assert edges == (0.0, 60.0)
    places, _ = even_steps(np.array([10, 50, 60, 70, 80]))
    assert places.tolist() == [0, 0, 0, 2, 4]  # columns at 10, 27.5, 45, 62.5, 80


def test_one_snapshot_of_norms_without_beta_and_no_region(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for path in sorted((run / "channels").glob("*.npz"))[1:]:
        path.unlink()
    (path,) = (run / "channels").glob("*.npz")
    arrays = {name: value[:1] for name, value in np.load(path).items()}
    arrays["values"][:, FIELDS.index("beta")] = np.nan
    np.savez(path, **arrays)
    (run / "channels" / "regions.json").write_text('{"regions": []}')
    page = Reader(write_channel_report(tmp_path / "r.html", title="T", runs=[run]))
    assert page.tags.count("svg") == 3  # dead fraction, channels, gamma
    assert "No channel was in any state but active" in page.text
    assert "No run acted on a channel." in page.text


def test_survival_is_that_of_a_count_by_hand(tmp_path: Path) -> None:
    """The act is before step 51: silent at 60, active at 70 and 80. A second act ends what is told of the first."""
    run = make_run(tmp_path / "run", "recycle")
    files = read_channels(read_run(run))
    assert files is not None
    lags, share = survival(files)
    assert (lags.tolist(), share.tolist()) == ([10, 20, 30], [0, 1, 1])
    with (run / "channels" / "interventions.jsonl").open("a") as file:
        again = {"step": 60, "strategy": "recycle", "dry_run": False, "channels": [["b", 0, "silent", 0.0]]}
        file.write(json.dumps(again) + "\n" + '{"step": 70, "str')  # and a line that is being written
    files = read_channels(read_run(run))
    assert files is not None
    lags, share = survival(files)
    assert (lags.tolist(), share.tolist()) == ([10, 20], [0.5, 1])


@pytest.mark.parametrize("degrees", [1, 2, 3, 9, 40])
@pytest.mark.parametrize("probability", [0.9, 0.975, 0.999])
def test_quantiles_are_those_of_scipy(probability: float, degrees: int) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-5)


def test_effects_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(20, 1, 5), rng.normal(20.1, 1, 5)
    effect = paired_effect("k", "recycle", dict(enumerate(a)), {9: 0.0, **dict(enumerate(b))})
    interval = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert effect.seeds == (0, 1, 2, 3, 4)
    assert effect.mean == pytest.approx((b - a).mean())
    assert (effect.low, effect.high) == pytest.approx((interval.low, interval.high), rel=1e-5)
    assert effect.verdict == "not resolved"
    assert paired_effect("k", "x", {0: 1, 1: 2, 2: 3}, {0: 2, 1: 3.1, 2: 3.9}).verdict == "higher"
    assert paired_effect("k", "x", {0: 1, 1: 2, 2: 3}, {0: 0, 1: 1.1, 2: 1.9}).verdict == "lower"
    with pytest.raises(BadInput, match="k of x against the baseline: expected at least 3 seeds that both have, got 2"):
        paired_effect("k", "x", {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 1.0, 7: 1.0})


def test_arms_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Runs without tracking are compared by their scores alone; one is tracked, so that the page is short."""
    base, other = [20.0, 21.0, 22.0], [20.5, 21.4, 22.6]
    runs = [make_run(tmp_path / f"none_{s}", "none", s, base[s]) for s in range(3)]
    runs += [make_run(tmp_path / f"recycle_{s}", "recycle", s, other[s]) for s in range(3)]
    for run in runs[1:]:
        shutil.rmtree(run / "channels")
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("enabled: true", "enabled: false"))
    page = Reader(write_channel_report(tmp_path / "r.html", title="T", runs=runs))
    interval = stats.ttest_rel(other, base).confidence_interval(0.95)
    row = next(row for row in page.rows if row[:2] == ["recycle", "val/psnr"])
    assert row == ["recycle", "val/psnr", "3", "0.5", f"{interval.low:.4g}", f"{interval.high:.4g}", "higher"]
    assert next(r for r in page.rows if r[:2] == ["recycle", "channels/dead_fraction"])[-1] == "not resolved"
    # two seeds are refused, whatever they say
    page = Reader(write_channel_report(tmp_path / "r.html", title="T", runs=[*runs[:2], *runs[3:]]))
    assert "No effect is stated: expected 3 seeds of baseline and intervention, got 2." in page.text
    assert not any(row[:2] == ["recycle", "val/psnr"] for row in page.rows)


def test_bad_input(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    other = make_run(tmp_path / "b", "recycle", lr=0.5)
    with pytest.raises(
        BadInput, match=r"b/config.yaml: updates.lr: expected 0.001 as in a, since only seeds and inter"
    ):
        arms_of([read_run(run), read_run(other)], [])
    (run / "channels" / "layers.json").unlink()
    with pytest.raises(BadInput, match=r"layers.json: expected a file with a mapping, there is no such file"):
        read_channels(read_run(run))
    for path in (run / "channels").glob("*.npz"):
        path.write_bytes(b"no shard")
    (run / "channels" / "layers.json").write_text((other / "channels" / "layers.json").read_text())
    with pytest.raises(BadInput, match=r"npz: expected a shard of channel statistics"):
        read_channels(read_run(run))
    for path in (run / "channels").glob("*.npz"):
        path.unlink()
    with pytest.raises(BadInput, match=r"a/channels: expected snapshots steps_FIRST_LAST.npz, found none"):
        read_channels(read_run(run))
    (run / "config.yaml").write_text("train: {seed: 0}\n")
    with pytest.raises(BadInput, match=r"a: expected a run with tracking.enabled, this one has no folder channels"):
        write_channel_report(tmp_path / "r.html", title="T", runs=[run])
    assert not (tmp_path / "r.html").exists()


def test_ablation_is_that_of_a_net_put_together_by_hand() -> None:
    """Of a norm's channel, of a constant one, of the latent; none where a sum takes the channel in."""
    torch.manual_seed(0)
    model = KLVAE(latent_channels=3, width=8, multipliers=[1, 2], blocks=1, norm_groups=4).double().eval()
    with torch.no_grad():
        model.get_parameter("decoder.norm_out.weight")[5] = 0.0
        model.get_parameter("decoder.norm_out.bias")[5] = 1.5
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    rows = [{"layer": "decoder.norm_out", "channel": 2}, {"layer": "decoder.norm_out", "channel": 5}]
    rows += [{"layer": "latent", "channel": 1}, {"layer": "quant_conv", "channel": 0}]
    whole, effects = effects_of(model, ["GroupNorm", "quant_conv"], rows, images)

    def psnr(norm_channel: int | None, latent_channel: int | None) -> float:
        decoder = model.decoder
        z = model.encode(LabeledImageData(img=images)).zs
        if latent_channel is not None:
            z[:, latent_channel] = z[:, latent_channel].mean()
        h = functional.silu(decoder.norm_out(decoder.stages(decoder.mid(decoder.conv_in(model.post_quant_conv(z))))))
        if norm_channel is not None:
            h[:, norm_channel] = h[:, norm_channel].mean()
        recon = ((decoder.conv_out(h) + 1) / 2).clamp(0, 1)
        return float((-10 * (recon - images).square().flatten(1).mean(1).log10()).mean())

    with torch.no_grad():
        expected = [psnr(2, None), psnr(5, None), psnr(None, 1)]
        assert whole == pytest.approx(psnr(None, None), abs=1e-9)
    assert effects[3] is None
    found = [whole + effect for effect in effects if effect is not None]
    assert found == pytest.approx(expected, abs=1e-9)
    assert abs(effects[1] or 0.0) < 1e-12  # a constant channel is worth nothing, although it is 1.2 everywhere
    assert abs(effects[0] or 0.0) > 1e-4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_command_measures_and_shows_the_ablation(cli: CLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(cli, tmp_path / "s", *ACTING, "--intervention.strategy", "recycle")
    out = tmp_path / "c.html"
    assert cli("report", "channels", run, "--out", out, "--ablation", 4, "--backend", "cpu") == 0
    found = json.loads((run / "channels" / "ablation.json").read_text())
    assert (found["step"], found["images"], found["split"]) == (12, 4, "val")
    page = Reader(out)
    measured = [row["psnr_change"] for row in found["rows"] if row["psnr_change"] is not None]
    assert len(set(measured) & set(page.numbers)) >= 10
    assert any(measured)
    assert len(found["rows"]) == found["limit"]
    for path in (run / "checkpoints").iterdir():  # without weights it says why, and shows the rest
        path.rename(tmp_path / path.name)
    (run / "channels" / "ablation.json").unlink()
    capsys.readouterr()
    assert cli("report-channels", run, "--out", out, "--backend", "cpu") == 0
    assert capsys.readouterr().err.startswith(f"no ablation of {run}: ")
    assert "ablation, dB" not in Reader(out).text
    assert cli("report", "channels", run, "--out", tmp_path / "c.txt") == 2
    assert cli("report", "channels", run, "--out", out, "--ablation", -1) == 2
    assert only(tmp_path, "*.html") == out
