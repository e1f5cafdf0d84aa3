"""Playing: the session, the protocol, and the server over a real socket."""

from __future__ import annotations

import io
import json
import socket
import struct
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rqvae.diffusion import dpm_solver_pp_2m, euler, heun, renoise
from rqvae.errors import BadInput
from rqvae.games.maze_chase import MazeChase
from rqvae.img_datasets.game_frames import GameFrames
from rqvae.img_datasets.interfaces import ActionCondition, DataSpec, LabeledImageData
from rqvae.metrics.animations import gif_bytes
from rqvae.metrics.reconstruction import to_uint8
from rqvae.models.interfaces import base_connector
from rqvae.models.stage1.pixel import PixelStage1
from rqvae.models.stage2.linear_dit import LinearDiT
from rqvae.models.stage2.world_model import WorldModel
from rqvae.models.two_stage import TwoStage
from rqvae.play.recording import Recording
from rqvae.play.session import Session, World, png
from rqvae.play.starts import starts_of_game, stored_starts
from rqvae.trainers.dream import frame_noise

fastapi = pytest.importorskip("fastapi")
from fastapi.testclient import TestClient  # noqa: E402
from starlette.websockets import WebSocketDisconnect  # noqa: E402

from rqvae.play.server import PlayLimits, make_app  # noqa: E402

SPEC = DataSpec((3, 32, 32), num_actions=5, history=3, context=True)


def small(shape: tuple[int, ...], spec: DataSpec) -> LinearDiT:
    return LinearDiT(shape, spec, depth=1, width=32, heads=2, cross_heads=2)


def make_world(with_game: bool = True) -> World:
    torch.manual_seed(0)
    model = WorldModel((48, 8, 8), SPEC, backbone=small)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    two_stage = TwoStage(PixelStage1(4), base_connector(), model, (3, 32, 32)).eval()
    game = MazeChase()
    starts = starts_of_game(game, 3)
    if with_game:
        return World(two_stage, 5, game.action_names, starts, game)
    start = starts(0)
    return World(two_stage, 5, game.action_names, stored_starts(start.frames[None], start.actions[None]))


def test_a_played_frame_is_the_sampled_one() -> None:
    """The session against `TwoStage.sample` for the same keys and noise."""
    world = make_world()
    session = Session(world, seed=3)
    start = world.starts(3)
    frames = torch.from_numpy(start.frames).permute(0, 3, 1, 2).float() / 255
    latents, actions = list(world.two_stage.stage1.encode(LabeledImageData(img=frames)).zs), list(start.actions)
    for t, key in enumerate([2, 2, 0, 4]):
        if key:
            session.press(key)
        else:
            session.release()
        tick = session.tick()
        actions.append(key)
        seen = torch.ones(1, 3, dtype=torch.bool)
        context, past = torch.stack(latents[-3:])[None], torch.tensor([actions[-3:]])
        condition = ActionCondition(context, past, seen, 5, encoded=True)
        output = world.two_stage.sample(condition, frame_noise((48, 8, 8), 3, 0, t)[None])
        latents.append(output.zs_pred[0])
        expected = to_uint8(world.two_stage.decode(output))[0].permute(1, 2, 0).numpy()
        assert np.array_equal(tick.dream, expected)
        assert tick.step == t + 1


def test_a_tap_is_played_once_and_a_held_key_until_it_is_up() -> None:
    session = Session(make_world())
    session.press(2)
    session.release()  # before any frame
    for _ in range(3):
        session.tick()
    session.press(4)
    for _ in range(2):
        session.tick()
    session.press(3)
    session.tick()
    session.release()
    session.tick()
    assert [action for _, action in session.history] == [0, 2, 0, 0, 4, 4, 3, 0]


def test_the_real_game_runs_beside_under_the_same_keys() -> None:
    world = make_world()
    session, start = Session(world, seed=1), world.starts(1)
    game = MazeChase()
    game.restore_state(start.state)
    for key in (1, 1, 2, 3):
        session.press(key)
        tick = session.tick()
        frame, _, terminated, _ = game.step(key)
        assert np.array_equal(tick.real, frame)
        if terminated:
            break


def test_the_real_game_goes_on_when_the_player_is_caught() -> None:
    """Its state is followed by a game of as many lives."""
    world, caught = make_world(), 0
    for seed in range(12):
        session, game = Session(world, seed=seed), MazeChase(lives=1000)
        game.restore_state(world.starts(seed).state)
        while game.clone_state().caught == 0 and session.tick().real is not None:
            frame, _, over, _ = game.step(0)
            assert not over
        assert np.array_equal(session._real, frame)
        caught += game.clone_state().caught
        if caught:
            return
    raise AssertionError("nobody was caught")


@pytest.mark.parametrize("solver", [euler, renoise, heun, dpm_solver_pp_2m])
def test_a_player_chooses_the_solver(solver: Any) -> None:
    """A frame is what the model gives with that sampler as its own."""
    session, other = Session(make_world(), seed=2), make_world()
    session.set_solver(solver.__name__)
    session.set_steps(3)
    other.two_stage.stage2.sampler = replace(other.two_stage.stage2.sampler, solver=solver, steps=3)
    expected = Session(other, seed=2)
    for _ in range(2):
        assert np.array_equal(session.tick().dream, expected.tick().dream)
    session.set_solver(None)
    with pytest.raises(BadInput, match="solver: expected null or one of euler, heun"):
        session.set_solver("fly")


def test_a_reset_begins_the_same_dream_again() -> None:
    session = Session(make_world(), seed=5)
    first = [session.tick().dream for _ in range(3)]
    session.reset(5)
    again = [session.tick().dream for _ in range(3)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    session.reset(6)
    assert not np.array_equal(session.tick().dream, first[0])


def test_the_dream_runs_without_the_game() -> None:
    with_game, without = Session(make_world()), Session(make_world(with_game=False))
    one, two = with_game.tick(), without.tick()
    assert two.real is None
    assert np.array_equal(one.dream, two.dream)


@pytest.mark.slow
def test_the_network_is_one_graph_for_any_number_of_steps() -> None:
    """What `play --runtime compiled` relies on: the same frames, and nothing is compiled once more while one plays."""
    from torch._dynamo.utils import counters

    from rqvae.backends.compiling import compile_in_place

    eager, compiled = Session(make_world()), Session(make_world())
    compile_in_place(compiled.world.two_stage.stage2.backbone, "eager")
    compiled.tick()
    compiled.reset(0)
    graphs = counters["stats"]["unique_graphs"]
    for steps, key in ((4, 2), (1, 3), (8, 0)):
        for session in (eager, compiled):
            session.set_steps(steps)
            session.press(key)
        assert np.array_equal(eager.tick().dream, compiled.tick().dream)
    assert graphs >= 1
    assert counters["stats"]["unique_graphs"] == graphs


def test_png_is_lossless_and_the_gif_has_every_frame() -> None:
    session = Session(make_world())
    for _ in range(4):
        frame = session.tick().dream
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(frame)))), frame)
    gif = Image.open(io.BytesIO(gif_bytes(session.film(), fps=10, scale=2)))
    assert (gif.n_frames, gif.size) == (5, (64, 64))


def test_bad_orders() -> None:
    session = Session(make_world())
    with pytest.raises(BadInput, match="action: expected 0 to 4, got 5"):
        session.press(5)
    with pytest.raises(BadInput, match="seed: expected at least 0, got -1"):
        session.reset(-1)
    with pytest.raises(BadInput, match="steps: expected 1 to 50, got 0"):
        session.set_steps(0)
    with pytest.raises(BadInput, match="--fps, --sessions"):
        PlayLimits(fps=0)


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(make_app(make_world(), PlayLimits(fps=60, sessions=2))) as client:
        yield client


def unpack(message: bytes) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None]:
    (size,) = struct.unpack(">I", message[:4])
    facts, body = json.loads(message[4 : 4 + size]), message[4 + size :]
    pictures = (body[: facts["dream"]], body[facts["dream"] :])  # the second is empty once the real game is over
    dream, real = (np.asarray(Image.open(io.BytesIO(part))) if part else None for part in pictures)
    assert dream is not None
    return facts, dream, real


def test_the_socket_streams_and_takes_keys(client: TestClient) -> None:
    assert "Play inside the model" in client.get("/").text
    with client.websocket_connect("/play") as browser:
        facts = browser.receive_json()
        assert facts == {
            "session": 1, "actions": ["NOOP", "UP", "RIGHT", "LEFT", "DOWN"], "fps": 60, "real": True,
        }  # fmt: skip
        header, dream, real = unpack(browser.receive_bytes())
        assert header["step"] == 1
        assert real is not None
        assert dream.shape == real.shape == (32, 32, 3)
        for order in ({"press": 2}, {"steps": 2}, {"release": True}, {"record": True}, {"reset": 4}):
            browser.send_json(order)
        steps = [unpack(browser.receive_bytes())[0]["step"] for _ in range(12)]
        assert 1 in steps, "the reset began a new count"
        assert client.get("/session/1.gif").headers["content-type"] == "image/gif"
        assert client.get("/session/1/dream.zip").headers["content-type"] == "application/zip"
        assert client.get("/session/1/sound.zip").status_code == 404
        browser.send_json({"ping": 12.5})
        while not (message := browser.receive()).get("text"):
            pass
        assert json.loads(message["text"]) == {"pong": 12.5}
        browser.send_json({"solver": "renoise"})
        browser.send_json({"press": 9})
        browser.send_text("no json")
        browser.send_json({"fly": 1})
        errors: list[str] = []
        while len(errors) < 3:
            message = browser.receive()
            if message.get("text"):
                errors.append(json.loads(message["text"])["error"])
        assert "action: expected 0 to 4, got 9" in errors[0]
        assert "got fly" in errors[2]
    assert client.get("/session/1.gif").status_code == 404


def test_sessions_are_their_own_and_limited(client: TestClient) -> None:
    with client.websocket_connect("/play") as one, client.websocket_connect("/play") as two:
        assert (one.receive_json()["session"], two.receive_json()["session"]) == (1, 2)
        two.send_json({"reset": 9})
        one_frames = [unpack(one.receive_bytes())[1] for _ in range(4)]
        two_frames = [unpack(two.receive_bytes())[1] for _ in range(8)]
        assert not any(np.array_equal(one_frames[-1], frame) for frame in two_frames)
        with client.websocket_connect("/play") as three:
            assert "all 2 places are taken" in three.receive_json()["error"]
            with pytest.raises(WebSocketDisconnect):
                three.receive_json()


def test_the_rate_is_capped() -> None:
    with TestClient(make_app(make_world(), PlayLimits(fps=10))) as client, client.websocket_connect("/play") as browser:
        browser.receive_json()
        browser.receive_bytes()
        began = time.monotonic()
        for _ in range(5):
            browser.receive_bytes()
        assert time.monotonic() - began > 0.4


def test_a_port_in_use_is_said_before_a_model_is_loaded() -> None:
    from rqvae.commands.play import run

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(BadInput, match=f"--port: expected a free port on 127.0.0.1, got {port}"):
            run(["nowhere", "--port", port])


def test_what_is_not_ours_or_out_of_range_is_refused(client: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/play", headers={"origin": "http://elsewhere"}):
        pass
    with client.websocket_connect("/play", headers={"origin": "http://testserver"}) as browser:
        browser.receive_json()
        browser.send_text('{"press": 1e400}')
        browser.send_text('{"reset": Infinity}')
        errors = 0
        while errors < 2:
            errors += bool(browser.receive().get("text"))


def test_a_played_session_is_a_recording_that_trains(tmp_path: Path) -> None:
    """Every episode as it was shown, read back by the dataset that models are trained on."""
    session, world = Session(make_world(), seed=1), make_world()
    shown: dict[str, list[list[np.ndarray]]] = {"dream": [], "real": []}
    keys = [2, 1, 4, 3, 2, 2]
    session.tick()  # before the recording
    session.record(True)
    for seed in (2, 3, 4):
        session.reset(seed)
        start = world.starts(seed)
        dream, real = [start.frames[-1]], [start.frames[-1]]
        for key in keys:
            session.press(key)
            tick = session.tick()
            dream.append(tick.dream)
            if tick.real is not None:
                real.append(tick.real)
        shown["dream"].append(dream)
        shown["real"].append(real)
    session.record(False)
    session.tick()
    for what, episodes in shown.items():
        archive = session.recorded(what).zipped(world.action_names, session.seed)
        zipfile.ZipFile(io.BytesIO(archive)).extractall(tmp_path / what)
        whole = []
        for split in ("train", "val", "test"):
            data = GameFrames(split, root=str(tmp_path / what), size=32, history=2, context=True)
            data.open()
            whole += [data.episode(k) for k in range(data.episodes)]
        assert len(whole) == 3
        for frames in episodes:
            found = next(actions for stored, actions in whole if np.array_equal(stored, frames[:-1]))
            assert list(found) == keys[: len(frames) - 1]
    with pytest.raises(BadInput, match="recording of the dream: expected frames, got none"):
        Session(world).recorded("dream").zipped(world.action_names, 0)
    with pytest.raises(BadInput, match="recording: expected one of dream, real, got sound"):
        session.recorded("sound")


def test_the_real_games_end_ends_its_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording("real")
    frames = [np.full((32, 32, 3), k, np.uint8) for k in range(4)]
    recording.begin(frames[0])
    recording.begin(frames[0])  # a reset before any key
    recording.add(1, frames[1], 1.0)
    recording.add(2, None, 0.0)
    recording.add(3, frames[2])  # nobody plays
    recording.begin(frames[2])
    recording.add(4, frames[3])
    recording.end()
    assert not recording.full
    monkeypatch.setattr("rqvae.play.recording.MOST", 3 * frames[0].nbytes)
    assert recording.full
    recording.begin(frames[0])
    recording.add(0, frames[1])
    rows = recording.rows.arrays()
    assert list(rows["action"]) == [1, 2, 4]
    assert list(rows["episode"]) == [0, 0, 1]
    assert list(rows["done"]) == [False, True, False]
    assert list(rows["reward"]) == [1.0, 0.0, 0.0]
    assert [int(frame[0, 0, 0]) for frame in rows["frames"]] == [0, 1, 2]
