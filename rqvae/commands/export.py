"""Write a trained model as a folder that loads anywhere, or that diffusers loads; put it on the Hugging Face hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rqvae.commands.options import Parser
from rqvae.errors import BadInput
from rqvae.files import read_json

if TYPE_CHECKING:
    from rqvae.api import Pipeline


FORMATS = "diffusers: KLVAE only; onnx: one step of a world model and its decoder, checked against torch"


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae export", description=__doc__)
    own.add_argument("run", metavar="RUN", help="run, checkpoint, exported or diffusers folder, or a hub id")
    own.add_argument("out", type=Path, metavar="OUT", help="new or empty folder")
    own.add_argument("--ema", metavar="NAME", help="weights of a run: model, or an average such as ema_0.9999")
    own.add_argument("--format", choices=("rqvae", "diffusers", "onnx"), default="rqvae", help=FORMATS)
    own.add_argument("--license", default="unknown", metavar="ID", help="of the model card, for example apache-2.0")
    own.add_argument("--push-to-hub", metavar="ID", help="upload OUT to owner/name, with the token of HF_TOKEN")
    own.add_argument("--private", action="store_true", help="a new repository on the hub is private")
    return own


def run(arguments: Sequence[str]) -> int:
    """Write a trained model as a folder that loads anywhere, or that diffusers loads; put it on the hub."""
    options = parser().parse_args(list(arguments))

    from rqvae.api import exported, sources
    from rqvae.api.card import write_card

    if options.push_to_hub:
        sources.check_hub_id(options.push_to_hub)
    exported.check_new(options.out)
    if options.format == "onnx":
        return _write_onnx(options)
    pipeline = _load(options.run, options.ema, native=options.format == "rqvae")
    if options.format == "diffusers":
        from rqvae.api.diffusers_folder import write_diffusers  # diffusers takes seconds to import

        write_diffusers(pipeline, options.out, options.license)
        whole = pipeline.two_stage is None
        note = "" if whole else "; the autoencoder alone, diffusers has no form of the generator"
    else:
        description = pipeline.description
        assert description is not None, "load describes what it loads"
        exported.write(options.out, description, pipeline.stage1, pipeline.two_stage)
        write_card(options.out, description, pipeline.stage1, pipeline.two_stage, options.license)
        note = ""
    sys.stdout.write(f"{options.out}: {_told(pipeline)}{note}\n")
    if options.push_to_hub:
        address = sources.upload(options.out, options.push_to_hub, options.private or None)
        sys.stdout.write(f"{address}\n")
    return 0


def _write_onnx(options: argparse.Namespace) -> int:
    """The two files of a world model, after they have answered as torch does."""
    from rqvae.api import load
    from rqvae.play.onnx_export import FILES, check_onnx, export_onnx

    if options.push_to_hub:
        raise BadInput("--push-to-hub: expected --format rqvae or diffusers, whose folders have a card, got onnx")
    pipeline = load(options.run, weights=options.ema)
    if pipeline.two_stage is None or not pipeline.spec.context:
        raise BadInput(f"--format onnx: expected a world model (frames of history as condition), got {options.run}")
    options.out.mkdir(parents=True, exist_ok=True)
    export_onnx(pipeline.two_stage.eval(), pipeline.spec, options.out)
    worst = check_onnx(pipeline.two_stage, pipeline.spec, options.out)
    sys.stdout.write(f"{options.out}: {' and '.join(FILES)}; onnxruntime differs from torch by {worst:.1e} at most\n")
    return 0


def _load(source: str, ema: str | None, *, native: bool) -> Pipeline:
    """The model; an `AutoencoderKL` of diffusers becomes our KLVAE where the native format is asked for."""
    from rqvae.api import exported, load, sources
    from rqvae.api.loading import is_diffusers_folder

    folder = sources.find(source)
    if not is_diffusers_folder(folder):
        return load(folder, weights=ema)
    if ema is not None:
        raise BadInput(f"--ema: expected none, as {folder} has one set of weights, got {ema}")
    if not native or read_json(folder / exported.CONFIG)["_class_name"] != "AutoencoderKL":
        return load(folder)
    from rqvae.api.diffusers_folder import read_as_klvae

    return read_as_klvae(folder)


def _told(pipeline: Pipeline) -> str:
    """Which weights of which step, in a few words."""
    source = {} if pipeline.description is None else pipeline.description.source
    name = type(pipeline.stage1 if pipeline.two_stage is None else pipeline.two_stage.stage2).__name__
    return f"{name}, weights {source['weights']} of step {source['step']}" if "step" in source else name
