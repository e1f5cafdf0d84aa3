"""What goes wrong while somebody plays is said, to the player or to who started the server, and harms nobody else."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rqvae.diffusion import heun
from rqvae.errors import BadInput, RunFailed
from rqvae.play import server
from rqvae.play.recording import Recording
from rqvae.play.session import Session
from rqvae.play.static_site import check_place
from tests.test_play import SPEC, make_world, unpack

fastapi = pytest.importorskip("fastapi")
from fastapi.testclient import TestClient  # noqa: E402
from starlette.websockets import WebSocketDisconnect  # noqa: E402


def connected() -> TestClient:
    return TestClient(server.make_app(make_world(), server.PlayLimits(fps=60)))


def test_an_error_of_the_program_is_not_taken_for_a_browser_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(session: Session) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Session, "tick", broken)

    def play() -> None:
        with connected().websocket_connect("/play") as player:
            player.receive_json()
            player.receive_bytes()

    with pytest.raises(RuntimeError, match="out of memory"):
        play()


def test_a_model_that_is_not_finite_is_no_black_picture() -> None:
    world = make_world()
    for p in world.two_stage.stage2.parameters():
        torch.nn.init.constant_(p, float("nan"))
    session = Session(world)
    with pytest.raises(RunFailed, match="frame of the dream 0 .* not finite"):
        session.tick()
    with TestClient(server.make_app(world, server.PlayLimits())).websocket_connect("/play") as player:
        player.receive_json()
        assert "not finite" in player.receive_json()["error"]
        with pytest.raises(WebSocketDisconnect):
            player.receive_json()


def test_a_session_that_cannot_begin_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(session: Session, seed: int) -> None:
        raise BadInput("history + horizon: expected windows, got none")

    monkeypatch.setattr(Session, "reset", none)
    with connected().websocket_connect("/play") as player:
        assert "expected windows" in player.receive_json()["error"]


def test_what_is_no_order_is_answered() -> None:
    with connected().websocket_connect("/play") as player:
        player.receive_json()
        player.send_bytes(b"press")
        player.send_text("[" * 200_000)
        said: list[str] = []
        while len(said) < 2:
            said += [text for text in [player.receive().get("text")] if text]
        assert "expected text, got bytes" in said[0]
        player.send_text('{"press": 2}')
        assert unpack(player.receive_bytes())[0]["step"] > 0


def test_no_order_is_lost_when_the_model_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many orders within one frame the last one, a release, is heard too."""
    heard: list[str] = []
    tick, release = Session.tick, Session.release
    monkeypatch.setattr(Session, "tick", lambda session: (time.sleep(0.1), tick(session))[1])
    monkeypatch.setattr(Session, "set_steps", lambda session, steps: heard.append("steps"))
    monkeypatch.setattr(Session, "release", lambda session: (heard.append("release"), release(session)))
    with connected().websocket_connect("/play") as player:
        player.receive_json()
        for _ in range(5 * server.INBOX):
            player.send_text('{"steps": 3}')
        player.send_text('{"release": true}')
        while heard[-1:] != ["release"] or len(heard) < 10:
            player.receive()
    assert heard.count("steps") == 5 * server.INBOX


def test_others_play_on_while_one_saves_a_film(monkeypatch: pytest.MonkeyPatch) -> None:
    """The film is held up for as long as it takes the other to see ten more frames."""
    goes_on = threading.Event()

    def slow(film: np.ndarray, fps: float, scale: int) -> bytes:
        assert goes_on.wait(30)
        return b"GIF89a"

    monkeypatch.setattr(server, "gif_bytes", slow)
    with connected() as client, client.websocket_connect("/play") as player:
        number = player.receive_json()["session"]
        answer: list[int] = []
        saving = threading.Thread(target=lambda: answer.append(client.get(f"/session/{number}.gif").status_code))
        saving.start()
        first = unpack(player.receive_bytes())[0]["step"]
        while unpack(player.receive_bytes())[0]["step"] < first + 10:
            assert not answer
        goes_on.set()
        saving.join(30)
        assert answer == [200]


def test_a_long_episode_is_cut_so_that_a_recording_has_some_for_each_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqvae.play.recording.LONGEST", 3)
    recording = Recording("dream")
    frames = [np.full((32, 32, 3), k, np.uint8) for k in range(9)]
    recording.begin(frames[0])
    for k in range(1, 8):
        recording.add(1, frames[k])
    kept = recording.copy()
    recording.add(1, frames[8])
    rows = kept.rows.arrays()
    assert [int(frame[0, 0, 0]) for frame in rows["frames"]] == [0, 1, 2, 3, 4, 5, 6]
    assert list(rows["episode"]) == [0, 0, 0, 1, 1, 1, 2]
    assert list(rows["done"]) == [False, False, True, False, False, True, False]
    assert (kept.episodes, len(kept), len(recording)) == (3, 7, 8)


def test_the_button_shows_what_the_server_does() -> None:
    session = Session(make_world())
    tick = session.tick()
    shown = [unpack(server.pack(tick, 10.0, session))[0]]
    session.record(True)
    shown.append(unpack(server.pack(session.tick(), 10.0, session))[0])
    assert [(facts["recording"], facts["episodes"]) for facts in shown] == [(False, 0), (True, 1)]


def test_a_film_is_encoded_frame_by_frame() -> None:
    film = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    gif = Image.open(io.BytesIO(server.gif_bytes(film, fps=10, scale=3)))
    assert (gif.n_frames, gif.size) == (5, (24, 24))


def test_a_folder_to_play_in_is_checked_before_a_model_is_loaded(tmp_path: Path, monkeypatch, cli, capfd) -> None:
    monkeypatch.setattr("rqvae.play.static_site.find_runtime", lambda given: tmp_path)
    (tmp_path / "file").write_text("")
    assert cli("play", "nowhere", "--static", tmp_path / "file" / "below") == 2
    assert "expected a folder that can be made" in capfd.readouterr().err
    assert cli("play", "nowhere", "--static", tmp_path) == 2
    assert "expected a new or empty folder" in capfd.readouterr().err
    assert cli("play", "nowhere", "--static", tmp_path / "out", "--threads", 2) == 2
    assert f"--threads: expected none beside --static {tmp_path / 'out'}, got 2" in capfd.readouterr().err


def test_a_folder_to_play_in_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from rqvae.play import static_site

    world = make_world()
    out = {"names": world.action_names, "starts": world.starts, "runtime": tmp_path / "no_runtime", "count": 2}

    def half(two_stage: object, spec: object, folder: Path) -> None:
        (folder / "step.onnx").write_bytes(b"half")

    monkeypatch.setattr(static_site, "export_onnx", half)
    monkeypatch.setattr(static_site, "check_onnx", lambda *_: None)
    with pytest.raises(FileNotFoundError):
        static_site.write_site(tmp_path / "out", world.two_stage, SPEC, **out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())
    check_place(tmp_path / "out")
    stage2 = world.two_stage.stage2
    stage2.sampler = replace(stage2.sampler, solver=heun)
    with pytest.raises(BadInput, match=r"--static: expected the solver euler or renoise \(--solver\), got heun"):
        static_site.write_site(tmp_path / "out", world.two_stage, SPEC, **out)


def test_the_server_says_an_address_that_a_browser_takes(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import uvicorn

    from rqvae.commands import play

    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    with play._listen("::1", 0) as listener:
        play._serve(object(), listener)
        assert f"http://[::1]:{listener.getsockname()[1]}/" in capsys.readouterr().out
