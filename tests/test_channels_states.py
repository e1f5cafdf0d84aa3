"""Channels that are planted dead are found, at their place and step, and nothing else is; what revives them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from rqvae.callbacks.channels import ChannelTracker, Region
from rqvae.callbacks.channels.ablation import replaced
from rqvae.callbacks.channels.classifier import Classifier, scores
from rqvae.callbacks.channels.interventions import act, check_trained
from rqvae.callbacks.channels.settings import InterventionSettings, Thresholds
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import LabeledImageData
from rqvae.models.stage1.kl_vae import KLVAE

BORN, HEALED, STEPS = 5, 12, 16
WIDTH = 12


class Net(nn.Module):
    """A posterior of 3 latents behind two norms. The first norms each channel by itself, so that data alone decide."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(WIDTH, WIDTH, eps=1e-6)
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm2 = nn.GroupNorm(3, WIDTH, eps=1e-6)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.quant_conv = nn.Conv2d(WIDTH, 6, 1)
        with torch.no_grad():
            self.norm1.bias[4] = 1.5
            self.quant_conv.weight *= 4

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.silu(self.norm1(x))
        h = nn.functional.silu(self.norm2(self.conv1(h)))
        return self.quant_conv(self.conv2(h))


def data(step: int, planted: bool) -> Tensor:
    """(6, WIDTH, 8, 8); planted: channels 3 and 4 are blank, 5 is all but blank."""
    x = torch.randn(6, WIDTH, 8, 8, generator=torch.Generator().manual_seed(step))
    if planted:
        x[:, 3:5] = 0.0
        x[:, 5] *= 3e-5
    return x


@dataclass
class Plant:
    """What is done to a network before step BORN; `data` is where only the data, or a bias, change."""

    layer: str
    channel: int
    state: str
    by: str


PLANTS = [
    Plant("norm1", 3, "silent", "data"),
    Plant("norm1", 4, "constant", "data"),  # blank in the data, and its beta was 1.5 from the start
    Plant("norm1", 5, "suppressed", "data"),
    Plant("norm1", 7, "saturated", "bias"),
    Plant("norm2", 1, "silent", "weights"),
    Plant("norm2", 2, "constant", "weights"),
    Plant("norm2", 5, "saturated", "weights"),
    Plant("norm2", 7, "disconnected", "weights"),
    Plant("norm2", 9, "suppressed", "weights"),
    Plant("latent", 1, "inactive", "weights"),
]


@torch.no_grad()
def plant(model: Net) -> None:
    model.norm1.bias[7] = -20.0
    model.norm2.weight[torch.tensor([1, 2, 5])] = 0.0
    model.norm2.bias[torch.tensor([1, 2, 5])] = torch.tensor([0.0, 1.5, -20.0])
    model.conv2.weight[:, 7] = 0.0
    model.norm2.weight[9] = 0.04
    model.quant_conv.weight[1] = 0.0


def ablation_shares(model: Net, tracker: ChannelTracker, x: Tensor) -> dict[tuple[str, int], float]:
    """How much the output changes when a channel is replaced by its mean, over the layer's median of that."""
    assert tracker.wires is not None
    effects: dict[tuple[str, int], float] = {}
    snapshot = tracker.snapshot()
    assert snapshot is not None
    with torch.no_grad():
        whole = model.eval()(x)
        for name in ("norm1", "norm2"):
            means = snapshot.of(name)["mean"]
            found = []
            for channel in range(WIDTH):
                with replaced(tracker.wires[name], channel, float(means[channel])):
                    found.append(float((model(x) - whole).abs().mean()))
            middle = sorted(found)[len(found) // 2]
            effects |= {(name, channel): effect / middle for channel, effect in enumerate(found)}
    model.train()
    return effects


def test_planted_channels_are_found() -> None:
    """Precision and recall are 1.0, with the state, the layer, the channel and both steps."""
    torch.manual_seed(0)
    model = Net().train()
    healthy = copy.deepcopy(model.state_dict())
    tracker = ChannelTracker(model)
    for step in range(1, STEPS + 1):
        if step == BORN:
            plant(model)
        if step == HEALED:
            effects = ablation_shares(model, tracker, data(99, planted=True))
            model.load_state_dict(healthy)
        model(data(step, BORN <= step < HEALED)).square().mean().backward()
        tracker.step()
        tracker.snapshot()
    found = {(r.layer, r.channel, r.state, r.birth, r.death) for r in tracker.regions()}
    expected = {(p.layer, p.channel, p.state, BORN, HEALED) for p in PLANTS}
    assert found == expected
    by_ablation = {place for place, share in effects.items() if share < 0.01}
    without_effect = ("silent", "constant", "disconnected", "saturated")  # suppressed ones are planted by construction
    assert by_ablation == {(p.layer, p.channel) for p in PLANTS if p.state in without_effect}
    assert sum(p.by != "weights" for p in PLANTS) >= 4


@pytest.mark.parametrize("layers", [["GroupNorm"], ["GroupNorm", "Conv2d"]])
def test_nothing_is_invented_in_healthy_networks(layers: list[str]) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        model = KLVAE(latent_channels=3, width=16, multipliers=[1, 2], blocks=1, norm_groups=8).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tracker = ChannelTracker(model, layers, thresholds=Thresholds(enter=1, leave=1, active_unit=0.0))
        for step in range(3):
            noise = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(100 * seed + step))
            img = nn.functional.interpolate(noise, size=(16, 16), mode="bilinear")
            batch = LabeledImageData(img=img, draws={"posterior": torch.randn(4, 3, 8, 8)})
            optimizer.zero_grad()
            model.compute_loss(model(batch), batch).loss_total.backward()
            optimizer.step()
            tracker.step()
            tracker.snapshot()
        assert tracker.regions() == [], seed
        tracker.close()


def test_hysteresis() -> None:
    """Enter after 3, leave after 2; a region begins and ends with the first observation that led to it."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(4, 4), nn.Conv2d(4, 1, 1)).train()
    tracker = ChannelTracker(model)
    dead = {3, 4, 6, 7, 8, 9, 11, 14}  # 3-4: too short; 6-9: a region; 10 alone is no end; 12-13 end it; 14: too short
    for step in range(1, 18):
        with torch.no_grad():
            model[1].weight[2] = 0.0 if step in dead else 1.0
        model(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))).mean().backward()
        tracker.step()
        if step == 9:
            (row,) = tracker.regions()
            assert (row.layer, row.channel, row.state, row.birth, row.death) == ("1", 2, "silent", 6, None)
        tracker.snapshot()
    assert [(r.birth, r.death) for r in tracker.regions()] == [(6, 12)]


def test_state_of_a_classifier_goes_on() -> None:
    torch.manual_seed(0)
    model = Net().train()
    plant(model)
    tracker = ChannelTracker(model)
    copies: list[Classifier] = []
    for step in range(1, 7):
        if step == 3:  # in the midst of a streak
            copies.append(Classifier(tracker.layers, tracker.thresholds))
            copies[0].load_state_dict(tracker.classifier.state_dict())
        model(data(step, True)).square().mean().backward()
        tracker.step()
        snapshot = tracker.snapshot()
        assert snapshot is not None
        for other in copies:
            other.observe(snapshot)
    assert copies[0].regions() == tracker.regions() != []
    with pytest.raises(
        BadInput, match=r"expected the 2 layers of the checkpoint, got 1; norm2 is only in the checkpoi"
    ):
        Classifier(tracker.layers[:1], tracker.thresholds).load_state_dict(tracker.classifier.state_dict())


# interventions


def small_decoder(seed: int) -> nn.Module:
    """6 blocks of norm, SiLU, convolution on 64 channels: 384 channels behind norms."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = [nn.Conv2d(3, 64, 1)]
    for _ in range(6):
        parts += [nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1)]
    return nn.Sequential(*parts, nn.Conv2d(64, 3, 1)).train()


@torch.no_grad()
def kill(model: nn.Module, mode: str, seed: int) -> Tensor:
    """96 of the 384 channels; (6, 64) bool."""
    order = torch.randperm(384, generator=torch.Generator().manual_seed(seed))
    dead = torch.zeros(384, dtype=torch.bool)
    dead[order[:96]] = True
    dead = dead.view(6, 64)
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    for norm, conv, chosen in zip(norms, convs, dead, strict=True):
        norm.weight[chosen] = 0.0
        norm.bias[chosen] = -20.0 if mode == "saturated" else 0.0
        if mode == "disconnected":
            conv.weight[:, chosen] = 0.0
    return dead


def dead_after(strategy: str, mode: str, seed: int = 0, steps: int = 120, every: int = 20) -> int:
    """How many of 96 killed channels are dead at the end, by one snapshot's classes."""
    model = small_decoder(seed)
    dead = kill(model, mode, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tracker = ChannelTracker(model, every=every, thresholds=Thresholds(enter=1, leave=1))
    settings = InterventionSettings(strategy=strategy)  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x = torch.randn(2, 3, 8, 8, generator=noise)
        optimizer.zero_grad()
        (model(x) - x.flip(1)).square().mean().backward()
        if tracker.wires and step % every == 1 and strategy != "none":
            for layer in tracker.layers:
                chosen = tracker.classifier.state[layer.start : layer.stop] != 0
                act(layer, tracker.wires[layer.name], chosen, settings, optimizer, seed=step)
        optimizer.step()
        tracker.step()
        snapshot = tracker.snapshot()
    assert snapshot is not None
    states, _, _ = scores(snapshot, Thresholds())
    return int(((states.view(6, 64) != 0) & dead).sum())


MODES = ("zero", "saturated", "disconnected")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", ["affine_reset", "recycle"])
def test_revival(strategy: str, mode: str) -> None:
    assert dead_after(strategy, mode) == 0


def test_the_nudge_cannot_wake_a_saturated_channel() -> None:
    assert dead_after("scale_mul", "saturated") >= 90


@pytest.mark.parametrize("strategy", ["scale_mul", "scale_add", "scale_reset", "affine_reset", "recycle"])
def test_only_touched_rows_change(strategy: str) -> None:
    """Weights, moments and gradients of other channels stay bit by bit; those of touched rows' moments are zero."""
    model = small_decoder(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tracker = ChannelTracker(model, ["4"])
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.rand(2, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        tracker.step()
    chosen = torch.zeros(64, dtype=torch.bool)
    chosen[[3, 17]] = True
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    assert tracker.wires is not None
    settings = InterventionSettings(strategy=strategy)  # type: ignore[arg-type]
    act(tracker.layers[0], tracker.wires["4"], chosen, settings, optimizer, seed=0)
    rows = {"4.weight": 0}
    rows |= {"4.bias": 0} if strategy in ("affine_reset", "recycle") else {}
    rows |= {"3.weight": 0, "3.bias": 0, "6.weight": 1} if strategy == "recycle" else {}
    for name, p in model.named_parameters():
        axis, state = rows.get(name, 0), optimizer.state[p]
        touched = chosen if name in rows else torch.zeros(p.shape[0], dtype=torch.bool)
        kept = (~touched).nonzero().flatten()
        picked = touched.nonzero().flatten()
        assert torch.equal(p.detach().index_select(axis, kept), before[name].index_select(axis, kept)), name
        assert torch.equal(state["exp_avg"].index_select(axis, kept), moments[name].index_select(axis, kept)), name
        for tensor in (state["exp_avg"], state["exp_avg_sq"], p.grad):
            assert not tensor.index_select(axis, picked).any(), name
        if name in rows:
            assert not torch.equal(p.detach(), before[name]), name
    new = dict(model.named_parameters())["4.weight"].detach()[chosen]
    old = before["4.weight"][chosen]
    values = {"scale_mul": old * 1.1, "scale_add": old + 0.05}
    assert torch.equal(new, values.get(strategy, torch.ones(2)))


def test_bad_input_of_interventions() -> None:
    model = small_decoder(0)
    layers = ChannelTracker(model).layers
    model[1].weight.requires_grad_(False)
    with pytest.raises(BadInput, match=r"expected trained layers, 1.weight is frozen"):
        check_trained(layers, list(model.parameters()))
    with pytest.raises(BadInput, match="expected a tracked layer with gamma"):
        check_trained([layer for layer in layers if not layer.is_norm], list(model.parameters()))
    with pytest.raises(BadInput, match="intervention.cooldown: expected at least 0, got -1"):
        InterventionSettings(cooldown=-1)


def test_region_is_a_row() -> None:
    assert list(Region("a", 1, "silent", 3, None, 0.0).__dict__) == [
        "layer", "channel", "state", "birth", "death", "score"
    ]  # fmt: skip
