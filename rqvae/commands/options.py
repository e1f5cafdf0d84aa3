"""What the commands' options share."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rqvae import remote
from rqvae.errors import BadInput

if TYPE_CHECKING:
    from rqvae.img_datasets.game_frames import GameFrames
    from rqvae.img_datasets.interfaces import DataSpec, Split
    from rqvae.models.two_stage import TwoStage


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are BadInput, and whose options may be spelt with _ or -."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise BadInput(f"{self.prog}: {message}")

    def split(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """This command's own arguments, and the config overrides (`--train.steps 20`, `--train.steps=20`)."""
        own: list[str] = []
        overrides: list[str] = []
        tokens = [t for t in arguments if t != "--"]
        while tokens:
            token = tokens.pop(0)
            name, equals, value = token.partition("=")
            known = name.replace("_", "-") if name.startswith("--") else name
            if not name.startswith("--") or known in self._option_string_actions:
                own.append(known + equals + value if name.startswith("--") else token)
                action = self._option_string_actions.get(known)
                if action is not None and action.nargs != 0 and not equals and tokens:
                    own.append(tokens.pop(0))
                continue
            overrides.append(token)
            if not equals and tokens and not tokens[0].startswith("--"):
                overrides.append(tokens.pop(0))
        return self.parse_args(own), overrides


def yes(text: str) -> bool:
    """The value of True or False, as the shell scripts spell them."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text}")
    return text.lower() == "true"


def add_job_options(parser: Parser) -> None:
    """What every command on a config takes."""
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="YAML files, later ones over earlier ones")
    parser.add_argument("--config", action="append", default=[], help="the same as CONFIG")
    parser.add_argument(
        "--save-dir", default="runs", metavar="SAVE_DIR", help="folder or URL (s3://, gs://) of all runs"
    )
    parser.add_argument("--run-name", metavar="RUN_NAME", help="name of the run; the first config's name by default")
    parser.add_argument("--world-size", type=int, default=1, help="processes on this host")
    parser.add_argument("--resume-ckpt", help="run or checkpoint folder, or URL, to start from, full state")
    parser.add_argument("--resume-wandb-id", help="Weights & Biases id to go on with")
    parser.add_argument("--backend", help="a name of the README's table; RQVAE_BACKEND or automatic by default")
    parser.add_argument("--threads", type=thread_count, default=0, help="OpenMP threads of a process")


def config_files(options: argparse.Namespace) -> list[str]:
    """CONFIG and --config, in order."""
    return [*options.configs, *options.config]


def check_world_size(options: argparse.Namespace) -> int:
    """--world-size; BadInput where it is below 1."""
    if options.world_size < 1:
        raise BadInput(f"WORLD_SIZE: expected at least 1, got {options.world_size}")
    return options.world_size


def refuse_options(
    parser: argparse.ArgumentParser, options: argparse.Namespace, names: Sequence[str], beside: str
) -> None:
    """Raise BadInput where an option that would not be heard has another value than its default."""
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            option = "--" + name.replace("_", "-")
            raise BadInput(f"{option}: expected none beside {beside}, got {getattr(options, name)}")


def open_recording(root: str, spec: DataSpec, split: Split) -> GameFrames:
    """A split of a recording for a world model, with the model's numbers of the actions.

    Raises:
        BadInput: no recording, or one of another size or of other actions.
    """
    from rqvae.img_datasets.game_frames import GameFrames

    names = list(spec.names) or None
    which: dict[str, Any] = {"size": spec.image_shape[1], "history": spec.history, "num_actions": spec.num_actions}
    dataset = GameFrames(split, root=root, action_names=names, **which)
    dataset.open()
    return dataset


def finite_number(text: str) -> float:
    """The value of an option that is neither NaN nor infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
    return value


def thread_count(text: str) -> int:
    """The value of --threads."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a number of threads, 0 for torch's choice, got {text}")
    return int(text)


def json_object(text: str) -> dict[str, Any]:
    """The value of an option that takes a JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return found


def folder_at(place: str, snapshots: bool = False) -> Path:
    """The folder that an option names by its path or its URL, on this machine.

    Args:
        place: path or URL of a run, a checkpoint or an exported model.
        snapshots: bring a run's snapshots of its averages too.
    """
    if not remote.is_url(place):
        return Path(place)
    from rqvae.trainers.fetching import fetched  # imports torch, seconds that a path need not wait

    return fetched(place, snapshots)


def numbers(text: str) -> tuple[int, ...]:
    """The value of an option that takes whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,2,3, got {text}") from None


def find_solver(name: str | None) -> Callable[..., Any] | None:
    """--solver; BadInput where `rqvae.diffusion.solvers` has none of that name."""
    from rqvae.diffusion import solvers

    if not name:
        return None
    functions = (solvers.euler, solvers.heun, solvers.dpm_solver_pp_2m, solvers.renoise)
    known = {solver.__name__: solver for solver in functions}
    classes = {kind.__name__: kind for kind in (solvers.DDIM, solvers.EulerMaruyama)}
    if name not in known and name not in classes:
        raise BadInput(f"--solver: expected one of {', '.join([*known, *classes])}, got {name}")
    return known[name] if name in known else classes[name]()


def load_world_model(name: str) -> tuple[DataSpec, TwoStage]:
    """The world model of a run, an exported folder or a shipped name, and what its data are, on the host.

    Raises:
        BadInput: nothing there, or a model that does not continue frames.
    """
    from rqvae.api import load

    pipeline = load(name)
    if pipeline.two_stage is None or not pipeline.spec.context:
        raise BadInput(f"{name}: expected a world model (frames of history as condition), got another run")
    return pipeline.spec, pipeline.two_stage
