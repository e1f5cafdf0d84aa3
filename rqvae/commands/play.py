"""Play inside a world model in the browser: arrow keys in, dreamed frames out, the real game beside it."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rqvae.commands.options import (
    Parser,
    find_solver,
    finite_number,
    load_world_model,
    open_recording,
    refuse_options,
    thread_count,
)
from rqvae.errors import BadInput
from rqvae.files import read_json

if TYPE_CHECKING:
    from rqvae.backends import Backend
    from rqvae.models.interfaces import DataSpec
    from rqvae.models.two_stage import TwoStage
    from rqvae.play.session import World


RUNTIMES = "who computes the network: compiled takes a minute first, onnx some seconds and the extra [onnx] (CPU only)"


SERVED = ("host", "port", "fps", "sessions", "backend", "runtime", "threads")
"""Options that a folder for any server of files cannot hear."""


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae play", description=__doc__)
    own.add_argument("model", metavar="RUN|NAME", help="run folder, exported folder or shipped name")
    own.add_argument(
        "--recording", metavar="DIR", help="begin from its test split, without a game beside: for games of others"
    )
    own.add_argument("--host", default="127.0.0.1", help="loopback by default: whoever reaches the port can play")
    own.add_argument("--port", type=int, default=8765, help="0 takes any free one")
    own.add_argument("--fps", type=finite_number, default=15.0, help="most frames a second")
    own.add_argument("--sessions", type=int, default=4, help="most players at once")
    own.add_argument("--ghosts", type=int, default=1, help="ghosts in the maze: as many as the recording had")
    own.add_argument("--steps", type=int, help="solver steps; the model's own by default")
    own.add_argument("--solver", help="name of a function of rqvae.diffusion.solvers; the page offers some too")
    own.add_argument(
        "--static", type=Path, metavar="OUT", help="write a folder that plays in a browser from any server of files"
    )
    own.add_argument(
        "--onnxruntime-web", type=Path, metavar="FOLDER", help="that npm package, for --static; else in node_modules"
    )
    own.add_argument("--backend", help="a name of the README's table; RQVAE_BACKEND or automatic by default")
    own.add_argument("--runtime", choices=("torch", "compiled", "onnx"), default="torch", help=RUNTIMES)
    own.add_argument(
        "--threads", type=thread_count, default=1, help="OpenMP threads; at batch 1 a second one does not help"
    )
    return own


def run(arguments: Sequence[str]) -> int:
    """Serve the page until Ctrl-C, or write it as a folder."""
    options = parser().parse_args(list(arguments))
    if options.recording:
        refuse_options(parser(), options, ("ghosts",), f"--recording {options.recording}")
    if options.static is not None:
        refuse_options(parser(), options, SERVED, f"--static {options.static}")
        return _write_site(options)
    if options.onnxruntime_web is not None:
        raise BadInput("--onnxruntime-web: expected --static OUT beside it")

    from rqvae import backends
    from rqvae.play.server import PlayLimits, make_app

    limits = PlayLimits(options.fps, options.sessions)
    listener = _listen(options.host, options.port)
    backend = backends.create(backends.choose(options.backend), threads=options.threads)
    try:
        spec, two_stage = _model(options)
        two_stage.to(backend.device)
        world = _world(options, spec, two_stage)
        _prepare(options, world, spec, backend)
        _serve(make_app(world, limits), listener)
    finally:
        backend.close()
        listener.close()
    return 0


def _model(options: argparse.Namespace) -> tuple[DataSpec, TwoStage]:
    """The model with the sampler that is asked for as its own."""
    from rqvae.api import change_sampler

    spec, two_stage = load_world_model(options.model)
    stage2: Any = two_stage.stage2
    stage2.sampler = change_sampler(two_stage, steps=options.steps, solver=find_solver(options.solver))
    return spec, two_stage


def _world(options: argparse.Namespace, spec: DataSpec, two_stage: TwoStage) -> World:
    """The model with the maze beside it; of a recording's game the model alone."""
    from rqvae.games.maze_chase import MazeChase
    from rqvae.play.session import World
    from rqvae.play.starts import starts_of_game, starts_of_recording
    from rqvae.trainers.dream import model_numbers

    if options.recording:
        recording = open_recording(options.recording, spec, "test")
        return World(two_stage, spec.num_actions, recording.action_names, starts_of_recording(recording, spec.history))
    try:
        numbers = model_numbers(spec.names, MazeChase.action_names)
    except BadInput as error:
        raise BadInput(f"{options.model}: {error}; play it with --recording DIR, frames of its own game") from None
    game = MazeChase(spec.image_shape[1], options.ghosts)
    starts = starts_of_game(game, spec.history)
    return World(two_stage, spec.num_actions, game.action_names, starts, game, numbers)


def _prepare(options: argparse.Namespace, world: World, spec: DataSpec, backend: Backend) -> None:
    """What --runtime asks for, and the first frame, before anybody plays."""
    from rqvae.models.stage2.diffusion import LatentDiffusion
    from rqvae.models.stage2.world_backbones import CausalBackbone
    from rqvae.play.onnx_runtime import use_onnx
    from rqvae.play.session import Session

    stage2 = world.two_stage.stage2
    if options.runtime != "torch" and not isinstance(stage2, LatentDiffusion):
        raise BadInput(f"--runtime: expected torch for {type(stage2).__name__}, got {options.runtime}")
    if options.runtime == "onnx":
        use_onnx(world.two_stage.cpu(), spec, options.threads)
    if options.runtime == "compiled":
        assert isinstance(stage2, LatentDiffusion)
        backbone = stage2.backbone
        # of windows of frames the network itself is called, for the context and for each step
        backend.compile(backbone.network if isinstance(backbone, CausalBackbone) else backbone)
    Session(world).tick()


def _write_site(options: argparse.Namespace) -> int:
    """Write the folder that needs no server of ours."""
    from rqvae.play.starts import numbered
    from rqvae.play.static_site import check_place, find_runtime, write_site

    runtime = find_runtime(options.onnxruntime_web)
    check_place(options.static)
    spec, two_stage = _model(options)
    world = _world(options, spec, two_stage)
    numbers = world.numbers or tuple(range(spec.num_actions))
    names = tuple(name for _, name in sorted(zip(numbers, world.action_names, strict=True)))
    starts = numbered(world.starts, numbers)
    write_site(options.static, two_stage.eval(), spec, names=names, starts=starts, runtime=runtime)
    if options.recording:  # its frames are in the folder
        sys.stdout.write(f"{read_json(Path(options.recording) / 'meta.json').get('licence', '')}\n")
    sys.stdout.write(f"{options.static}: play it from any server of files, for example: ")
    sys.stdout.write(f"{Path(sys.executable).name} -m http.server --directory {options.static}\n")
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """The port, taken before a model is loaded."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # from here on a browser waits for its answer, where it would be refused before
    except (OSError, OverflowError) as error:
        raise BadInput(f"--port: expected a free port on {host}, got {port} ({error}); choose another") from error
    return listener


def _serve(app: object, listener: socket.socket) -> None:
    import uvicorn

    host, port = listener.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    sys.stdout.write(f"play at http://{place}:{port}/ (Ctrl-C ends it)\n")
    sys.stdout.flush()
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])  # type: ignore[arg-type]
