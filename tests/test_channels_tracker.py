"""Statistics of channels against numpy in float64, and what a tracker sees, counts and leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rqvae.backends.compiling import compile_in_place
from rqvae.callbacks.channels import ChannelTracker
from rqvae.callbacks.channels.settings import Thresholds
from rqvae.callbacks.channels.snapshot import Snapshot
from rqvae.errors import BadInput, RunFailed
from rqvae.img_datasets.interfaces import LabeledImageData
from rqvae.models.stage1.kl_vae import KLVAE

ALL = ["GroupNorm", "Conv2d"]


def small_vae(seed: int = 0, **more: object) -> KLVAE:
    torch.manual_seed(seed)
    return KLVAE(latent_channels=3, width=8, multipliers=[1, 2], blocks=1, norm_groups=4, **more).train()  # type: ignore[arg-type]


def images(seed: int, count: int = 4, size: int = 16) -> LabeledImageData:
    return LabeledImageData(img=torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)))


def train_step(model: KLVAE, batch: LabeledImageData) -> None:
    output = model(batch)
    model.compute_loss(output, batch).loss_total.backward()


def outputs_of(model: nn.Module, kinds: tuple[type, ...], run: Callable[[], object]) -> dict[str, np.ndarray]:
    """What modules of these classes give, by name, in float64; our own hooks, independent of the tracker."""
    found: dict[str, np.ndarray] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, o, name=name: found.update({name: o.detach().double().numpy()}))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


def by_hand(a: np.ndarray, activation: str) -> dict[str, np.ndarray]:
    """The definitions of the docs in numpy; maps here have fewer positions than `DETAIL_POSITIONS`."""
    sigmoid = 1 / (1 + np.exp(-a))
    h = a * sigmoid if activation == "silu" else a
    slope = sigmoid * (1 + a * (1 - sigmoid)) if activation == "silu" else np.ones_like(a)
    axes = (0, *range(2, a.ndim))
    peak = np.abs(h).reshape(*h.shape[:2], -1).max(2).mean(0)
    near = (np.abs(h) <= 1e-3).mean(axes)
    return {"mean": h.mean(axes), "std": h.std(axes), "abs": np.abs(h).mean(axes), "peak": peak, "near_zero": near,
            "sensitivity": np.abs(slope).mean(axes)}  # fmt: skip


def test_statistics_are_those_of_a_direct_computation() -> None:
    model, batch = small_vae(), images(1)
    tracker = ChannelTracker(model, ALL)
    found = outputs_of(model, (nn.GroupNorm, nn.Conv2d), lambda: train_step(model, batch))
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    tracker.step()
    snapshot = tracker.snapshot()
    assert snapshot is not None
    assert len(tracker.layers) == len(found) > 30
    for layer in tracker.layers:
        assert tracker.wires is not None
        wire, values = tracker.wires[layer.name], snapshot.of(layer.name)
        is_act = layer.name.split(".")[-1] in ("norm1", "norm2", "norm_out")
        assert wire.activation_name == ("silu" if is_act else "")
        for name, expected in by_hand(found[layer.name], wire.activation_name).items():
            np.testing.assert_allclose(values[name], expected, rtol=1e-5, atol=1e-5, err_msg=f"{layer.name} {name}")
        weight = model.get_parameter(f"{layer.name}.weight").detach().double().flatten(1 if not layer.is_norm else 0)
        norm = weight.abs() if layer.is_norm else weight.norm(dim=1)
        np.testing.assert_allclose(values["weight_norm"], norm, rtol=1e-5)
        parts = [gradients[f"{layer.name}.{p}"].reshape(layer.channels, -1) for p in ("weight", "bias")]
        np.testing.assert_allclose(values["grad_norm"], torch.cat(parts, 1).norm(dim=1), rtol=1e-4, atol=1e-7)
    conv2 = model.get_parameter("decoder.mid.0.conv2.weight").detach().double()
    conv1 = model.get_parameter("decoder.mid.0.conv1.weight").detach().double()
    norm2 = snapshot.of("decoder.mid.0.norm2")
    np.testing.assert_allclose(norm2["out_norm"], conv2.transpose(0, 1).flatten(1).norm(dim=1), rtol=1e-5)
    np.testing.assert_allclose(norm2["in_norm"], conv1.flatten(1).norm(dim=1), rtol=1e-5)
    assert bool(snapshot.of("decoder.mid.0.norm1")["in_norm"].isnan().all())  # conv_in feeds the shortcut too


def test_latent_statistics_are_those_of_a_direct_computation() -> None:
    model, batch = small_vae(), images(2)
    tracker = ChannelTracker(model)
    moments = outputs_of(model, (nn.Conv2d,), lambda: train_step(model, batch))["quant_conv"]
    tracker.step()
    snapshot = tracker.snapshot()
    assert snapshot is not None
    assert snapshot.latent is not None
    mu, logvar = moments[:, :3], moments[:, 3:]
    kl = 0.5 * (mu**2 + np.exp(logvar) - 1 - logvar)
    np.testing.assert_allclose(snapshot.latent.kl, kl.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(snapshot.latent.variance, mu.var((0, 2, 3)), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(snapshot.latent.place_variance, mu.var(0).reshape(-1), rtol=1e-4, atol=1e-9)
    assert snapshot.latent.clamped.tolist() == [0, 0, 0]


def test_spread_of_a_large_constant_is_kept() -> None:
    """Mean 1000, std 1e-2: E[x^2] - E[x]^2 in fp32 gives 0 or noise. A sample's mean is rounded by 3e-5 here."""
    layer = nn.Conv2d(1, 1, 1)
    nn.init.constant_(layer.weight, 1e-2)
    nn.init.constant_(layer.bias, 1000.0)
    model = nn.Sequential(layer)
    tracker, x = ChannelTracker(model, ["Conv2d"]), torch.randn(4, 1, 16, 16)
    output = model(x)
    output.mean().backward()
    tracker.step()
    snapshot = tracker.snapshot()
    assert snapshot is not None
    assert float(snapshot.values["std"][0]) == pytest.approx(output.detach().double().numpy().std(), rel=1e-3)


def test_large_maps_are_sampled_in_runs_with_an_odd_stride() -> None:
    """Of 256 runs of 16 neighbours every 17th: 240 positions of 4096, at every column."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    tracker, x = ChannelTracker(model, ["Conv2d"]), torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        a = model[0](x).double().flatten(2)
    chosen = [position for run in range(0, 256, 17) for position in range(16 * run, 16 * run + 16)]
    assert {position % 64 for position in chosen} == set(range(64))
    a = a[..., chosen]
    model(x).mean().backward()
    tracker.step()
    snapshot = tracker.snapshot()
    assert snapshot is not None
    np.testing.assert_allclose(snapshot.values["sensitivity"], (a > 0).double().mean((0, 2)), rtol=1e-6)
    np.testing.assert_allclose(snapshot.values["near_zero"], (a.relu() <= 1e-3).double().mean((0, 2)), rtol=1e-6)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_maps_of_any_size_and_order_in_memory(order: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken in parts of one, two and all samples; what does not depend on the sampled positions is exact."""
    torch.manual_seed(0)
    a = (torch.randn(5, 6, 40, 40) * 3 + 2).to(memory_format=order)
    model = nn.Sequential(nn.Identity(), nn.Conv2d(6, 6, 1), nn.SiLU())
    nn.init.dirac_(model[1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(model[1].bias)  # type: ignore[arg-type]
    expected = by_hand(a.double().numpy(), "silu")
    for part in (1, 2 * 6 * 1600, 2**20):
        monkeypatch.setattr("rqvae.callbacks.channels.statistics.PART_ELEMENTS", part)
        tracker = ChannelTracker(model, ["Conv2d"])
        model(a).mean().backward()
        tracker.step()
        values = stats(tracker).of("1")
        for name in ("mean", "std", "abs", "peak"):
            np.testing.assert_allclose(values[name], expected[name], rtol=1e-5, err_msg=name)
        tracker.close()


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 2))])
def test_linear_layers_and_other_activations(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    tracker, x = ChannelTracker(model, ["0"]), torch.randn(3, 7, 5)
    model(x).mean().backward()
    tracker.step()
    snapshot = tracker.snapshot()
    assert snapshot is not None
    assert tracker.wires is not None
    assert tracker.wires["0"].target is model[2]  # type: ignore[index]
    a = model[0](x).detach().double()  # type: ignore[index]
    np.testing.assert_allclose(snapshot.values["std"], nn.functional.gelu(a).std((0, 1), correction=0), rtol=1e-5)
    leaf = a.requires_grad_()
    (slope,) = torch.autograd.grad(nn.functional.gelu(leaf).sum(), leaf)
    np.testing.assert_allclose(snapshot.values["sensitivity"], slope.abs().mean((0, 1)), atol=1e-4)


def test_redundant_pairs() -> None:
    from rqvae.callbacks.channels.classifier import redundant_pairs

    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 1)
    with torch.no_grad():
        layer.weight[2], layer.bias[2] = -0.5 * layer.weight[0], 3.0  # type: ignore[index]
    model = nn.Sequential(layer)
    tracker, x = ChannelTracker(model, ["Conv2d"], pairs=True), torch.randn(8, 4, 8, 8)
    output = model(x)
    output.mean().backward()
    tracker.step()
    snapshot = tracker.snapshot()
    assert snapshot is not None
    expected = np.corrcoef(output.detach().double().transpose(0, 1).flatten(1).numpy())
    np.testing.assert_allclose(snapshot.correlations["0"], expected, atol=1e-5)
    ((name, i, j, value),) = redundant_pairs(snapshot, Thresholds())
    assert (name, i, j, round(value, 5)) == ("0", 0, 2, -1.0)


def stats(tracker: ChannelTracker) -> Snapshot:
    snapshot = tracker.snapshot()
    assert snapshot is not None
    return snapshot


def assert_close(a: Snapshot, b: Snapshot, limit: float = 1e-5) -> None:
    for name, value in a.values.items():
        np.testing.assert_allclose(value, b.values[name], rtol=limit, atol=limit, err_msg=name)


def test_micro_batches_and_ranks_are_one_batch() -> None:
    """Two micro-batches of 2, and two ranks of 2 whose sums are added, equal one batch of 4."""
    model, batch = small_vae(), images(3)
    img = batch.require_img()
    halves = [LabeledImageData(img=img[:2]), LabeledImageData(img=img[2:])]
    whole, split = ChannelTracker(model, ALL), None
    train_step(model, batch)
    whole.step()
    reference = stats(whole)
    whole.close()
    model.zero_grad()
    split = ChannelTracker(model, ALL)
    for half in halves:
        (model.compute_loss(model(half), half).loss_total / 2).backward()
    split.step()
    assert_close(stats(split), reference)
    assert stats(split).counts["decoder.conv_out"] == 1

    flats: list[Tensor] = []
    calls: list[int] = []

    def reduce(flat: Tensor) -> Tensor:
        calls.append(flat.numel())
        return flats[0] + flat

    ranks = [copy.deepcopy(model) for _ in range(2)]
    for rank, half in zip(ranks, halves, strict=True):
        rank.zero_grad()
        tracker = ChannelTracker(rank, ALL, world_size=2, reduce=reduce if flats else None)
        train_step(rank, half)
        for p in rank.parameters():  # as DDP leaves them
            p.grad = torch.zeros_like(p)
        tracker.step()
        if not flats:
            taken = tracker.take()
            assert taken is not None
            flats.append(taken[0])
        else:
            joined = stats(tracker)
    for name, value in joined.values.items():
        if name != "grad_norm":
            np.testing.assert_allclose(value, reference.values[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert set(joined.counts.values()) == {2}
    assert len(calls) == 1  # one flat reduction a flush


def test_only_training_forwards_of_the_kth_step_count() -> None:
    model, batch = small_vae(), images(4)
    tracker = ChannelTracker(model, every=3)
    for step in range(1, 8):
        model.eval()
        model(images(50 + step))
        model.train()
        with torch.no_grad():
            model(images(60 + step))  # a discriminator's forward
        train_step(model, batch)
        tracker.step()
        assert tracker.armed == any(module._forward_hooks for module in model.modules()), step
    snapshot = stats(tracker)
    assert (snapshot.observations, set(snapshot.counts.values())) == (2, {2})


def test_recomputed_activations_count_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 1, 1))

        def forward(self, x: Tensor, recompute: bool) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False) if recompute else self.block(x)

    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 1, 8, 8)
    found = []
    for recompute in (False, True):
        tracker = ChannelTracker(model, ALL)
        for _ in range(2):  # the first one also finds the wires
            model.zero_grad()
            model(x, recompute).mean().backward()
            tracker.step()
        found.append(stats(tracker))
        tracker.close()
    assert found[0].counts == found[1].counts
    assert_close(found[0], found[1], 1e-12)


def test_probe_equals_hooks() -> None:
    model, batch = small_vae(), images(5)
    twin = copy.deepcopy(model)
    hooks, probe = ChannelTracker(model, ALL), ChannelTracker(twin, ALL, probing=True)
    for _ in range(2):
        train_step(model, batch)
        probe.probe(lambda: twin(batch))
        train_step(twin, batch)
        hooks.step()
        probe.step()
    a, b = stats(hooks), stats(probe)
    assert_close(a, b)
    assert a.counts == b.counts


def compiled_vae(compiler: str) -> KLVAE:
    model = small_vae(3)
    for block in model.repeated_blocks():
        compile_in_place(block, compiler)
    return model


def trained(model: KLVAE, tracker: ChannelTracker | None) -> tuple[dict[str, Tensor], int]:
    """Weights after 4 steps, and how many frames were compiled in the last two."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    frames = 0
    for step in range(4):
        if step == 2:
            frames = sum(torch._dynamo.utils.counters["frames"].values())
        batch = images(20 + step)
        if tracker is not None and tracker.probing:
            tracker.probe(lambda batch=batch: model(batch))
        train_step(model, batch)
        optimizer.step()
        if tracker is not None:
            tracker.step()
        optimizer.zero_grad()
    added = sum(torch._dynamo.utils.counters["frames"].values()) - frames
    return {name: value.clone() for name, value in model.state_dict().items()}, added


@pytest.mark.parametrize("compiler", ["", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_weights_are_bit_identical_with_and_without(compiler: str) -> None:
    torch._dynamo.reset()
    make = (lambda: compiled_vae(compiler)) if compiler else (lambda: small_vae(3))
    without, _ = trained(make(), None)
    model = make()
    tracker = ChannelTracker(model, ALL, every=2)
    assert tracker.probing == bool(compiler)
    tracked, added = trained(model, tracker)
    assert all(torch.equal(without[name], value) for name, value in tracked.items())
    assert set(stats(tracker).counts.values()) == {2}
    assert added == 0


def test_a_tracker_that_is_silently_off_fails() -> None:
    model = small_vae()
    with pytest.raises(BadInput, match="probing: expected True, as parts of the model are compiled"):
        ChannelTracker(compiled_vae("aot_eager"), probing=False)
    hooks = ChannelTracker(model)
    model.decoder(torch.rand(1, 3, 4, 4))  # a step that does not reach the encoder
    with pytest.raises(RunFailed, match=r"layer encoder.stages.0.0.norm1 \(\d+ of 24\) was not observed: no training"):
        hooks.step()
    hooks.close()
    probing = ChannelTracker(model, probing=True)
    train_step(model, images(1))
    with pytest.raises(RunFailed, match=r"was not observed: probe\(...\) was not called"):
        probing.step()


def test_nothing_is_read_from_the_device() -> None:
    """On `meta` reading a value, or copying to the host, raises: hooks, probe, parameters and flush do neither."""
    for probing in (False, True):
        model = small_vae().to("meta")
        batch = LabeledImageData(img=torch.empty(2, 3, 16, 16, device="meta"))
        tracker = ChannelTracker(model, ALL, pairs=True, probing=probing)
        for _ in range(2):
            if probing:
                tracker.probe(partial(model, batch))
            train_step(model, batch)
            tracker.step()
        taken = tracker.take()
        assert taken is not None
        assert taken[0].device.type == "meta"
        with pytest.raises(NotImplementedError):
            taken[0].cpu()


def test_batch_norm_is_left_alone_by_a_probe() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    tracker, x = ChannelTracker(model, ["BatchNorm2d"], probing=True), torch.randn(2, 1, 4, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tracker.probe(lambda: model(x))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_bad_input() -> None:
    model = small_vae()
    with pytest.raises(BadInput, match="did you mean GroupNorm"):
        ChannelTracker(model, ["GroupNorn"])
    with pytest.raises(BadInput, match=r"'decoder.middle.\*', which names none of KLVAE; did you mean decoder.mid"):
        ChannelTracker(model, ["decoder.middle.*"])
    with pytest.raises(BadInput, match="tracking.thresholds.silent: expected at least 0, got -0.1"):
        Thresholds(silent=-0.1)
    with pytest.raises(BadInput, match="every: expected at least 1, got 0"):
        ChannelTracker(model, every=0)
    with pytest.raises(BadInput, match="latent: expected the name of a module of KLVAE or auto, got 'quant'"):
        ChannelTracker(model, latent="quant")
    tracker = ChannelTracker(model)
    with pytest.raises(BadInput, match="without a tracker, it has one already"):
        ChannelTracker(model)
    tracker.close()
    ChannelTracker(model).close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
