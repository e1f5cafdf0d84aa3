"""The world model as ONNX: its answers are torch's, its tables are the solvers, and it plays in a browser."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rqvae.diffusion import VP, ClassifierFree, LinearFlow, euler, renoise
from rqvae.diffusion.noise import KeyedNoise
from rqvae.errors import BadInput, RunFailed
from rqvae.img_datasets.interfaces import ActionCondition, DataSpec, LabeledImageData
from rqvae.metrics.reconstruction import to_uint8
from rqvae.models.interfaces import base_connector
from rqvae.models.stage1.pixel import PixelStage1
from rqvae.models.stage2.linear_dit import LinearDiT
from rqvae.models.stage2.world_model import WorldModel
from rqvae.models.two_stage import TwoStage
from rqvae.play.onnx_export import STEP_INPUTS, Decoder, Step, _export, check_onnx, export_onnx, solver_table
from rqvae.play.onnx_runtime import OnnxNetwork, use_onnx
from rqvae.play.session import Session, World
from rqvae.play.starts import Start
from rqvae.play.static_site import RUNTIME, find_runtime, write_site
from tests.browser import Page, chromium

SPEC = DataSpec((3, 32, 32), num_actions=5, history=3, context=True)
NAMES = ("NOOP", "UP", "RIGHT", "LEFT", "DOWN")


def small(shape: tuple[int, ...], spec: DataSpec) -> LinearDiT:
    return LinearDiT(shape, spec, depth=1, width=32, heads=2, cross_heads=2)


def make_two_stage(**options: object) -> TwoStage:
    torch.manual_seed(0)
    model = WorldModel((48, 8, 8), SPEC, backbone=small, **options)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return TwoStage(PixelStage1(4), base_connector(), model, (3, 32, 32)).eval()


def a_condition() -> ActionCondition:
    rng = torch.Generator().manual_seed(1)
    context = torch.rand(1, 3, 48, 8, 8, generator=rng) * 2 - 1
    return ActionCondition(context, torch.tensor([[1, 5, 2]]), torch.tensor([[False, True, True]]), 5, encoded=True)


@pytest.mark.parametrize("solver", [euler, renoise], ids=lambda s: s.__name__)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prediction": "velocity", "residual": False},
        {"prediction": "v", "residual": False, "path": VP("cosine")},
        {"path": LinearFlow()},
    ],
    ids=["x0", "velocity", "v on VP", "flow"],
)
def test_a_table_of_steps_is_the_solver(solver: Callable, options: dict) -> None:
    """The rows, walked through by hand, against `TwoStage.sample` with the same numbers."""
    two_stage, condition = make_two_stage(**options), a_condition()
    stage2 = two_stage.stage2
    sampler = replace(stage2.sampler, solver=solver, shift=2.0, steps=5)
    noise = torch.randn(1, 48, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = two_stage.sample(condition, noise, sampler).zs_pred
    x, fresh = noise, KeyedNoise(noise)
    for i, (t, of_x, of_prediction, of_noise) in enumerate(solver_table(stage2, solver.__name__, sampler, 5)):
        with torch.no_grad():
            prediction = stage2.backbone(x, torch.full((1,), t), condition)
        x = of_x * x + of_prediction * prediction + (of_noise * fresh(i) if of_noise else 0)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_what_a_table_cannot_hold_is_refused() -> None:
    stage2 = make_two_stage().stage2
    with pytest.raises(BadInput, match="solver: expected euler or renoise"):
        solver_table(stage2, "heun", stage2.sampler, 4)
    with pytest.raises(BadInput, match=r"sampler.guidance: expected none"):
        solver_table(stage2, "euler", replace(stage2.sampler, guidance=ClassifierFree(2.0)), 4)


def test_missing_files_of_the_runtime_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli, capfd) -> None:
    with pytest.raises(BadInput, match=f"expected {' and '.join(RUNTIME)}"):
        find_runtime(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"npm install onnxruntime-web"):
        find_runtime(None)
    dist = tmp_path / "node_modules" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    for name in RUNTIME:
        (dist / name).write_bytes(b"")
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert find_runtime(None) == find_runtime(dist) == find_runtime(dist.parent) == dist
    assert cli("play", "nowhere", "--static", tmp_path / "out", "--onnxruntime-web", below) == 2
    assert "ort-wasm-simd-threaded.wasm" in capfd.readouterr().err
    assert cli("play", "nowhere", "--onnxruntime-web", below) == 2


@pytest.mark.slow
def test_onnx_answers_as_torch(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra [onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="the extra [onnx]")
    two_stage, condition = make_two_stage(), a_condition()
    export_onnx(two_stage, SPEC, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"step.onnx", "decode.onnx"}, "weights are inside"
    step = runtime.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    rng = torch.Generator().manual_seed(3)
    for t in (1.0, 0.4, 0.02):
        x = torch.randn(1, 48, 8, 8, generator=rng)
        inputs = (condition.context, condition.actions, condition.mask, x, torch.tensor([t]))
        feeds = {name: value.numpy() for name, value in zip(STEP_INPUTS, inputs, strict=True)}
        (found,) = step.run(["prediction"], feeds)
        with torch.no_grad():
            expected = Step(two_stage.stage2, 5)(*inputs)
        assert expected.abs().max() > 0.5
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
        other = {**feeds, "actions": np.array([[1, 5, 3]])}
        assert np.abs(step.run(["prediction"], other)[0] - found).max() > 1e-3, "the action is an input, no constant"
        unseen = {**feeds, "mask": np.array([[False, False, True]])}
        assert np.abs(step.run(["prediction"], unseen)[0] - found).max() > 1e-3, "the mask is one too"
    decode = runtime.InferenceSession(tmp_path / "decode.onnx", providers=["CPUExecutionProvider"])
    (frame,) = decode.run(["frame"], {"zs": x.numpy()})
    np.testing.assert_allclose(frame, Decoder(two_stage)(x).numpy(), atol=1e-4)


@pytest.mark.slow
def test_the_check_finds_a_file_of_another_model(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra [onnx]")
    pytest.importorskip("onnxruntime", reason="the extra [onnx]")
    two_stage = make_two_stage()
    export_onnx(two_stage, SPEC, tmp_path)
    assert check_onnx(two_stage, SPEC, tmp_path) < 1e-4
    with torch.no_grad():
        two_stage.stage2.backbone.network.final.bias[-5] += 0.01
    with pytest.raises(RunFailed, match="expected the numbers of torch within 0.0001"):
        check_onnx(two_stage, SPEC, tmp_path)


@pytest.mark.slow
def test_play_by_onnxruntime_shows_the_frames_of_torch() -> None:
    pytest.importorskip("onnxscript", reason="the extra [onnx]")
    pytest.importorskip("onnxruntime", reason="the extra [onnx]")
    worlds = [World(make_two_stage(), 5, NAMES, a_start) for _ in range(2)]
    use_onnx(worlds[1].two_stage, SPEC, threads=1)
    assert isinstance(worlds[1].two_stage.stage2.backbone, OnnxNetwork)
    sessions = [Session(world, seed=1) for world in worlds]
    for key in (2, 4, 0):
        for session in sessions:
            session.press(key)
        one, two = (session.tick().dream.astype(int) for session in sessions)
        assert np.abs(one - two).max() <= 1
    with pytest.raises(BadInput, match="onnx: expected one frame"):
        worlds[1].two_stage.stage2.backbone(torch.zeros(2, 48, 8, 8), torch.zeros(2), a_condition())


@pytest.mark.slow
def test_what_onnx_cannot_say_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra [onnx]")

    class Volumes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    words = r"^onnx: a.onnx: expected operations that torch.onnx can write, got: only 4D [^\n]*$"
    with pytest.raises(BadInput, match=words):
        _export(Volumes(), (torch.zeros(1, 2, 3, 4, 5),), tmp_path / "a.onnx", ("x",), "y")


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is not None, reason="the extra [onnx] is installed")
def test_a_missing_extra_is_said_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"expected the packages of the extra \[onnx\].*pip install 'mae-dit\[onnx\]'"):
        export_onnx(make_two_stage(), SPEC, tmp_path)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Any server of files: Python's own."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "site"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def a_start(seed: int) -> Start:
    rng = np.random.default_rng(seed)
    return Start(rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8), np.array([1, 2]))


@torch.no_grad()
def expected_frames(two_stage: TwoStage, start: Start, noise: np.ndarray) -> list[np.ndarray]:
    """Action 4 by the model's own four Euler steps, then action 3 by two steps of `renoise`, worked out by hand."""
    images = torch.from_numpy(start.frames).permute(0, 3, 1, 2).float() / 255
    latents = two_stage.stage1.encode(LabeledImageData(img=images)).zs[None]
    seen, noises = torch.ones(1, 3, dtype=torch.bool), torch.from_numpy(noise).reshape(3, 1, 48, 8, 8)
    condition = ActionCondition(latents, torch.tensor([[*start.actions, 4]]), seen, 5, encoded=True)
    first = two_stage.sample(condition, noises[0]).zs_pred
    latents, actions = torch.cat((latents[:, 1:], first[:, None]), dim=1), torch.tensor([[start.actions[1], 4, 3]])
    condition = replace(condition, context=latents, actions=actions)
    backbone = two_stage.stage2.backbone
    middle = 0.5 * backbone(noises[1], torch.ones(1), condition) + 0.5 * noises[2]
    second = backbone(middle, torch.full((1,), 0.5), condition)
    images = [to_uint8(Decoder(two_stage)(zs))[0].permute(1, 2, 0) for zs in (first, second)]
    return [image.numpy().astype(int) for image in images]


def press_and_look(page: Page) -> None:
    before = page.pixels("dream")
    number = "Number(document.getElementById('numbers').textContent.match(/frame (\\d+)/)[1])"
    page.key("ArrowRight", down=True)
    page.wait("document.querySelector('#pad .on') !== null")
    count = page.run(number)
    page.wait(f"{number} > {count + 3}")
    page.key("ArrowRight", down=False)
    assert page.pixels("dream") != before


@pytest.mark.slow
def test_the_folder_plays_in_a_browser(served: tuple[Path, str], tmp_path: Path) -> None:
    """A frame of the page is `TwoStage.sample`'s for the same noise; keys change frames; nothing else is asked."""
    pytest.importorskip("onnxscript", reason="the extra [onnx]")
    place = os.environ.get("ONNXRUNTIME_WEB")
    try:
        runtime = find_runtime(Path(place) if place else None)
    except BadInput as error:
        pytest.skip(f"{error}; ONNXRUNTIME_WEB names it for the tests")
    folder, address = served
    two_stage = make_two_stage()
    write_site(folder, two_stage, SPEC, names=NAMES, starts=a_start, runtime=runtime, count=2)
    with pytest.raises(BadInput, match="expected a new or empty folder"):
        write_site(folder, two_stage, SPEC, names=NAMES, starts=a_start, runtime=runtime)
    with chromium(tmp_path / "profile") as page:
        page.open(address)
        page.wait("document.getElementById('numbers').textContent.includes('frames/s')", seconds=90)
        page.run("document.getElementById('pause').click()")
        noise = np.random.default_rng(5).standard_normal((3, 48 * 64)).astype(np.float32)
        frames = page.run(
            f"(async () => {{ const noise = {json.dumps(noise.tolist())}, {{ world, Dream }} = window.playing; "
            "const dream = new Dream(world, 1); let k = 0; const fresh = () => Float32Array.from(noise[k++]); "
            "const one = await dream.next(4, 'euler', 4, fresh), two = await dream.next(3, 'renoise', 2, fresh); "
            "return [[...one], [...two]]; })()"
        )
        for found, expected in zip(frames, expected_frames(two_stage, a_start(1), noise), strict=True):
            shown = np.array(found).reshape(32, 32, 4)
            assert (shown[..., 3] == 255).all()
            assert np.abs(shown[..., :3] - expected).max() <= 1
        page.run("document.getElementById('pause').click()")
        press_and_look(page)
        asked = page.run("performance.getEntriesByType('resource').map(entry => entry.name)")
        assert all(name.startswith(address) for name in asked), asked
        page.screenshot(Path(os.environ.get("RQVAE_SCREENSHOTS", tmp_path), "static.png"))
