"""The page and its WebSocket: the server streams frames at a capped rate, keys are sent and forgotten.

The protocol: the browser sends JSON `{"press": action}`, `{"release": true}`, `{"reset": seed}`, `{"steps": n}`,
`{"solver": name|null}`, `{"pause": true|false}`, `{"record": true|false}`, `{"ping": n}`. The server first sends JSON
with the world's facts, then for every frame one binary message: a JSON header, its length in four bytes (big-endian)
before it, the dream as PNG, and the real game as PNG where there is one. A ping is answered by `{"pong": n}` between
two frames, where keys are heard too; what the server refuses by `{"error": words}`, as a session that cannot begin or
go on, whose socket is closed after that.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import struct
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, TypeVar

from rqvae.errors import BadInput, RunFailed
from rqvae.metrics.animations import gif_bytes
from rqvae.play.session import Session, Tick, World, png

try:
    from fastapi import FastAPI, Response, WebSocket, WebSocketDisconnect
    from fastapi.responses import HTMLResponse
except ImportError as error:
    raise BadInput("play: expected the packages of the extra [play], got none; pip install 'mae-dit[play]'") from error


T = TypeVar("T")

INBOX = 64
"""Orders of a browser that wait for the next frame."""


@dataclass(frozen=True)
class PlayLimits:
    """How much the server gives away.

    Args:
        fps: most frames a second of a session.
        sessions: most sessions at once.
    """

    fps: float = 15.0
    sessions: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.fps < math.inf or self.sessions < 1:
            raise BadInput(f"--fps, --sessions: expected > 0 and >= 1, got {self.fps}, {self.sessions}")


@dataclass
class _Player:
    """One socket and its session."""

    number: int
    session: Session
    paused: bool = False
    inbox: deque[str | None] = field(default_factory=deque)

    def obey(self) -> list[dict[str, Any]]:
        """Do what the browser has sent since the last frame, between two frames; returns the answers to it."""
        return [answer for answer in (self._obey(self.inbox.popleft()) for _ in range(len(self.inbox))) if answer]

    def _obey(self, message: str | None) -> dict[str, Any] | None:
        try:
            if message is None:
                raise BadInput("message: expected text, got bytes")
            order = json.loads(message)
            if not isinstance(order, dict) or len(order) != 1:
                raise BadInput(f"message: expected an object with one order such as press, got {message[:80]}")
            name, value = next(iter(order.items()))
            if name == "ping":
                if not math.isfinite(value):
                    raise BadInput(f"ping: expected a finite number, got {value}")
                return {"pong": float(value)}
            self._do(name, value)
        except (BadInput, ValueError, TypeError, OverflowError, RecursionError) as error:
            return {"error": str(error)}
        return None

    def _do(self, name: str, value: Any) -> None:
        session = self.session
        orders = {
            "press": lambda: session.press(int(value)),
            "release": session.release,
            "reset": lambda: session.reset(int(value)),
            "steps": lambda: session.set_steps(int(value)),
            "solver": lambda: session.set_solver(value),
            "pause": lambda: setattr(self, "paused", bool(value)),
            "record": lambda: session.record(bool(value)),
        }
        if name not in orders:
            raise BadInput(f"message: expected one of {', '.join(orders)}, got {name}")
        orders[name]()


def make_app(world: World, limits: PlayLimits) -> FastAPI:
    """The server of one world.

    Args:
        world: the model and where to begin.
        limits: rate and number of sessions.
    """
    app = FastAPI(title="MAE-DiT play", docs_url=None, redoc_url=None, openapi_url=None)
    players: dict[int, _Player | None] = {}
    numbers = itertools.count(1)
    turn = asyncio.Lock()  # one model, one frame at a time: sessions take turns

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return files("rqvae.play").joinpath("page.html").read_text()

    @app.get("/keys.js")
    def keys() -> Response:
        return Response(files("rqvae.play").joinpath("keys.js").read_text(), media_type="text/javascript")

    _add_downloads(app, players, turn)

    @app.websocket("/play")
    async def play(socket: WebSocket) -> None:
        if not _same_origin(socket):
            await socket.close(1008)  # a page of elsewhere, which the browser lets reach this machine
            return
        await socket.accept()
        if len(players) >= limits.sessions:
            await socket.send_json({"error": f"all {limits.sessions} places are taken, try again later"})
            await socket.close(1013)
            return
        number = next(numbers)
        players[number] = None  # the place is taken before the session is made
        facts = {"session": number, "actions": world.action_names, "fps": limits.fps, "real": world.game is not None}
        listener: asyncio.Task[None] | None = None
        try:
            async with turn:
                player = _Player(number, await asyncio.to_thread(Session, world))
            players[number] = player
            listener = asyncio.create_task(_listen(socket, player))
            await _send(socket, facts)
            await _stream(socket, player, turn, limits.fps, listener)
        except WebSocketDisconnect:
            pass
        except (BadInput, RunFailed) as error:
            await _close(socket, str(error))
        finally:
            if listener is not None:
                listener.cancel()
            del players[number]

    return app


def _add_downloads(app: FastAPI, players: dict[int, _Player | None], turn: asyncio.Lock) -> None:
    """What a session has shown, as files, while its socket is open."""
    encoding = asyncio.Lock()  # one file at a time: it may take seconds of a core that the model needs too

    async def answer(number: int, kind: str, take: Callable[[Session], T], make: Callable[[T], bytes]) -> Response:
        player = players.get(number)
        if player is None:
            return Response("no such session", status_code=404)
        try:
            async with encoding:
                async with turn:  # no frame is added meanwhile
                    taken = await asyncio.to_thread(take, player.session)
                content = await asyncio.to_thread(make, taken)
        except BadInput as error:
            return Response(str(error), status_code=404)
        return Response(content, media_type=kind)

    @app.get("/session/{number}.gif")
    async def gif(number: int) -> Response:
        return await answer(number, "image/gif", Session.film, lambda film: gif_bytes(film, fps=10, scale=8))

    @app.get("/session/{number}/{what}.zip")
    async def recording(number: int, what: str) -> Response:
        def take(session: Session) -> Callable[[], bytes]:
            recording = session.recorded(what)
            return lambda: recording.zipped(session.world.action_names, session.seed)

        return await answer(number, "application/zip", take, lambda make: make())


def _same_origin(socket: WebSocket) -> bool:
    """Whether the page that opens the socket is ours; programs that are no browser send no origin."""
    origin = socket.headers.get("origin")
    return origin is None or origin.partition("://")[2] == socket.headers.get("host")


async def _listen(socket: WebSocket, player: _Player) -> None:
    """Orders into the inbox until the browser goes; a full inbox makes it wait, as a lost release holds a key."""
    while (message := await socket.receive())["type"] != "websocket.disconnect":
        player.inbox.append(message.get("text"))
        while len(player.inbox) >= INBOX:
            await asyncio.sleep(0.01)


async def _close(socket: WebSocket, words: str) -> None:
    with suppress(WebSocketDisconnect):
        await _send(socket, {"error": words})
        await socket.close(1011)


async def _send(socket: WebSocket, message: dict[str, Any] | bytes) -> None:
    """One message; WebSocketDisconnect where the browser has gone, which starlette may say by a RuntimeError."""
    try:
        await (socket.send_bytes(message) if isinstance(message, bytes) else socket.send_json(message))
    except RuntimeError as error:
        raise WebSocketDisconnect from error


async def _stream(
    socket: WebSocket, player: _Player, turn: asyncio.Lock, fps: float, listener: asyncio.Task[None]
) -> None:
    """Frames until the browser goes, at most `fps` a second; a late frame does not make the next ones hurry."""
    due, rate = time.monotonic(), 0.0
    while not listener.done():
        if player.inbox:
            async with turn:  # a reset encodes frames, and no frame may be made meanwhile
                answers = await asyncio.to_thread(player.obey)
            for answer in answers:
                await _send(socket, answer)
        now = time.monotonic()
        if player.paused or now < due:
            await asyncio.sleep(0.02 if player.paused else due - now)
            continue
        since, due = due, max(due + 1 / fps, now)
        async with turn:
            tick = await asyncio.to_thread(player.session.tick)
        spent = max(time.monotonic() - since, 1 / fps)
        rate = 1 / spent if not rate else 0.9 * rate + 0.1 / spent
        await _send(socket, pack(tick, rate, player.session))
    listener.result()


def pack(tick: Tick, rate: float, session: Session) -> bytes:
    """A frame as one binary message, with how much is recorded."""
    recording = session.recordings["dream"]
    dream = png(tick.dream)
    real = b"" if tick.real is None else png(tick.real)
    facts: dict[str, float] = {"step": tick.step, "ms": round(tick.milliseconds, 2), "fps": round(rate, 1)}
    facts |= {"recording": session.is_recorded, "recorded": len(recording), "episodes": recording.episodes}
    facts |= {"full": recording.full, "dream": len(dream)}
    header = json.dumps(facts).encode()
    return struct.pack(">I", len(header)) + header + dream + real
