"""A folder that plays in a browser, served by any server of files: the model runs there, and makes every frame."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from rqvae.errors import BadInput
from rqvae.models.interfaces import DataSpec
from rqvae.models.stage2.diffusion import LatentDiffusion
from rqvae.models.two_stage import TwoStage
from rqvae.play.onnx_export import check_onnx, export_onnx, solver_table
from rqvae.play.starts import Starts
from rqvae.trainers.dream import Dream
from rqvae.trainers.run_folder import make_folder

RUNTIME = {"ort.wasm.bundle.min.mjs": "ort.js", "ort-wasm-simd-threaded.wasm": "ort.wasm"}
"""What the page needs of the npm package onnxruntime-web, its API for WebAssembly and the WebAssembly, and the names
that they get: not every server of files knows that .mjs is JavaScript."""

SOLVERS = ("euler", "renoise")
"""What the page can solve by: both are a step x <- a x + b prediction + c noise."""

STEPS = (1, 2, 4, 8)
"""Solver steps that the page offers, and the model's own."""


def find_runtime(given: Path | None) -> Path:
    """The folder with the files of onnxruntime-web.

    Args:
        given: the package or its `dist`; None looks for `node_modules/onnxruntime-web` here and in the folders above.

    Raises:
        BadInput: they are not there; names them.
    """
    if given is not None:
        places = [given, given / "dist"]
    else:
        here = Path.cwd()
        places = [folder / "node_modules" / "onnxruntime-web" / "dist" for folder in (here, *here.parents)]
    for place in places:
        if all((place / name).is_file() for name in RUNTIME):
            return place
    where = f"in {given} or its dist" if given else "in a node_modules folder"
    raise BadInput(
        f"--onnxruntime-web: expected {' and '.join(RUNTIME)} {where}, found none; they are in the npm package "
        "onnxruntime-web (npm install onnxruntime-web), name its folder"
    )


def write_site(
    out: Path,
    two_stage: TwoStage,
    spec: DataSpec,
    *,
    names: tuple[str, ...],
    starts: Starts,
    runtime: Path,
    count: int = 16,
) -> None:
    """Write the folder: whole, or not at all.

    Args:
        out: new or empty folder.
        two_stage: a world model in eval mode, on the host.
        spec: of its data.
        names: of the actions in the model's order.
        starts: real frames that dreams begin from; their latents are written, no game is.
        runtime: of `find_runtime`.
        count: starts that are written.

    Raises:
        BadInput: a folder with files in it, a sampler with guidance or of another solver, or no exporter installed.
        RunFailed: the files do not answer as the model does.
    """
    out = out.resolve()
    check_place(out)
    stage2 = two_stage.stage2
    if not isinstance(stage2, LatentDiffusion):
        raise BadInput(f"--static: expected a LatentDiffusion such as WorldModel, got {type(stage2).__name__}")
    own = stage2.sampler
    if (name := getattr(own.solver, "__name__", "")) not in SOLVERS:
        raise BadInput(f"--static: expected the solver {' or '.join(SOLVERS)} (--solver), got {name}")
    tables = {
        solver: {str(steps): solver_table(stage2, solver, own, steps) for steps in sorted({*STEPS, own.steps})}
        for solver in SOLVERS
    }
    latents, actions, frames = _encoded(two_stage, spec.num_actions, starts, count)
    facts = {
        "actions": list(names),
        "latent_shape": list(two_stage.latent_shape),
        "image_shape": list(spec.image_shape),
        "history": spec.history,
        "starts": actions.tolist(),
        "solvers": tables,
        "solver": name,
        "steps": own.steps,
    }
    contents: dict[str, bytes] = {"starts.bin": latents.astype("<f4").tobytes(), "frames.bin": frames.tobytes()}
    contents["world.json"] = json.dumps(facts).encode()
    for name, here in {"static.html": "index.html", "dream.js": "dream.js", "keys.js": "keys.js"}.items():
        contents[here] = files("rqvae.play").joinpath(name).read_bytes()
    with _becoming(out) as folder:
        export_onnx(two_stage, spec, folder)
        check_onnx(two_stage, spec, folder)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        for name, here in RUNTIME.items():
            shutil.copyfile(runtime / name, folder / here)


def check_place(out: Path) -> None:
    """BadInput unless a folder can be written there: a new one, or one without files."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise BadInput(f"--static {out}: expected a new or empty folder, got one with files in it")
    make_folder(out, "--static")


@contextmanager
def _becoming(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place once all is written; is removed where that fails."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        yield folder
        folder.replace(out)


def _encoded(
    two_stage: TwoStage, num_actions: int, starts: Starts, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents (N, K, C, h, w), the actions (N, K - 1) between them, and last frames (N, H, W, 3) uint8 of N starts."""
    found = [starts(seed) for seed in range(count)]
    latents = []
    for start in found:
        frames = torch.from_numpy(start.frames).permute(0, 3, 1, 2).float() / 255
        dream = Dream.begin(two_stage, frames[None], torch.from_numpy(start.actions)[None], num_actions)
        latents.append(dream.context_bkchw[0].numpy())
    last = np.stack([start.frames[-1] for start in found])
    return np.stack(latents), np.stack([start.actions for start in found]), last
