"""Find the submodule of a VAE decoder, or the combination, that a compiler breaks; say what to do about it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rqvae.commands.options import Parser
from rqvae.errors import BadInput

if TYPE_CHECKING:
    import argparse

    from rqvae.diagnostics.subjects import LatentSource, Request
    from rqvae.trainers.vae_diagnostic import DiagnosticSettings, VaeDiagnostic

_MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
_PROMPT = "A picture of a dog in a bucket"
_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae diagnose", description=__doc__)
    own.add_argument("--output", type=Path, default=Path("vae_diagnostic_output"), help="folder of all results")
    own.add_argument("--device", default="auto", help="auto, or a device's name; auto prefers Habana's where it is")
    own.add_argument("--filter", choices=("all", "leaf", "non-leaf"), default="all", help="submodules to test")
    modes = ("single", "compile_except", "find_breaks")
    own.add_argument("--mode", choices=modes, default="single", help="each by itself; all but some; also cut graphs")
    own.add_argument("--exclude-path", metavar="PATHS", help="compile_except: file or list; bad_paths.txt by default")
    own.add_argument("--test-paths", metavar="PATHS", help="test only these: a file, or a list with commas")
    own.add_argument("--save-images", action="store_true", help="images of every submodule, not only of bad ones")
    own.add_argument("--model-name", help=f"pipeline, autoencoder or run: folder or hub id (default: {_MODEL})")
    own.add_argument("--gaudi-config", default="Habana/stable-diffusion", help="of a pipeline on a Gaudi device")
    own.add_argument("--use-tensorboard", action="store_true", help="write logs/tensorboard")
    own.add_argument("--use-wandb", action="store_true", help="write to Weights & Biases")
    own.add_argument("--wandb-project", default="vae_diagnostic", help="W&B project")
    own.add_argument("--wandb-run", default="run_vae_test", help="W&B run name")
    own.add_argument("--list-submodules", action="store_true", help="list the decoder's submodules and exit")
    own.add_argument("--batch-size", type=int, default=1, help="images decoded at once")
    own.add_argument("--seed", type=int, default=0, help="of the latent, and of random weights")
    own.add_argument("--prompt", default=_PROMPT, help="of a pipeline")
    own.add_argument("--steps", type=int, default=25, help="of a pipeline's denoiser")
    own.add_argument("--backend", help="compiler: torch.compile's name, a class path, or JSON with init_args")
    searches = ("auto", "shadow", "top_down", "naive")
    own.add_argument("--search", choices=searches, default="shadow", help="auto may stop after a healthy whole")
    own.add_argument("--isolate", choices=("none", "process"), default="none", help="survive crashes of compiled code")
    own.add_argument(
        "--timeout", type=float, default=600.0, help="seconds a submodule may take, with --isolate process"
    )
    own.add_argument("--resume", action="store_true", help="go on with an unfinished diagnosis, which must be there")
    own.add_argument("--baseline", type=Path, help="metrics.json of another diagnosis, to show the difference")
    own.add_argument("--dtype", choices=tuple(_TYPES), help="of the weights; the model's own by default")
    own.add_argument("--latent-size", type=int, default=0, help="side of a latent drawn at random; 0 is 16")
    own.add_argument("--root", default="decoder", help="name of the submodule that is diagnosed")
    own.add_argument("--blank-std", type=float, default=1e-4, help="standard deviation below which an image is blank")
    return own


def run(arguments: Sequence[str]) -> int:
    """Diagnose, print a table, and write metrics, images, lists, a compile plan and report.html."""
    options, unknown = parser().split(arguments)
    if unknown:
        raise BadInput(f"rqvae diagnose: unrecognized arguments: {' '.join(unknown)}")
    _check(options)
    if options.isolate == "process":
        return _isolated(options, arguments)

    diagnostic = _make(options)
    if options.list_submodules:
        units, file, words = diagnostic.list_submodules()
        sys.stdout.write(file.read_text() + f"{file}: {len(units)} modules of {words}\n")
        return 0

    from rqvae.reports.diagnostic_report import write_report

    bar = _Bar()
    diagnostic.progress = bar.show
    try:
        metrics = diagnostic.execute()
    finally:
        bar.close()
    retest = _retest(options)
    report = write_report(options.output, metrics, options.baseline, retest)
    _print(_latest(metrics) if diagnostic.mode == "compile_except" else metrics, retest)
    sys.stdout.write(f"{report}\n")
    return 0


def _check(options: argparse.Namespace) -> None:
    for name in ("batch_size", "steps"):
        if getattr(options, name) < 1:
            raise BadInput(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.baseline is not None:
        from rqvae.reports.diagnostic_report import read_baseline

        read_baseline(options.baseline)


def _make(options: argparse.Namespace) -> VaeDiagnostic:
    import torch

    from rqvae.backends import compilers as devices
    from rqvae.diagnostics.compilers import find_compiler
    from rqvae.diagnostics.subjects import Request
    from rqvae.trainers.vae_diagnostic import DiagnosticSettings, VaeDiagnostic

    name = options.device
    if name not in ("auto", *devices.device_names()):
        raise BadInput(f"--device: expected one of auto, {', '.join(devices.device_names())}, got {name}")
    settings = DiagnosticSettings(
        output=options.output,
        which=options.filter,
        mode=options.mode,
        exclude_path=options.exclude_path,
        test_paths=options.test_paths,
        search=options.search,
        save_images=options.save_images,
        blank_std=options.blank_std,
        resume=options.resume,
        tensorboard=options.use_tensorboard,
        wandb=(options.wandb_project, options.wandb_run) if options.use_wandb else None,
        model=options.model_name or _MODEL,
    )
    device_name, device = devices.open_device(name)
    text = options.backend or devices.DEFAULT_COMPILERS[device_name]
    compiler = find_compiler(text)
    compiler.check(device_name)
    request = Request(
        seed=options.seed,
        batch_size=options.batch_size,
        prompt=options.prompt,
        steps=options.steps,
        latent_size=options.latent_size,
        dtype=getattr(torch, _TYPES[options.dtype]) if options.dtype else None,
        device=device,
        root=options.root,
    )
    return VaeDiagnostic(_source(options, device_name, request), request, compiler, _with(settings, text))


def _with(settings: DiagnosticSettings, compiler: str) -> DiagnosticSettings:
    from dataclasses import replace

    return replace(settings, compiler=compiler)


def _source(options: argparse.Namespace, device_name: str, request: Request) -> LatentSource:  # noqa: ARG001
    from rqvae.backends import compilers as devices
    from rqvae.diagnostics.subjects import find_source

    name = options.model_name or _MODEL
    load = None
    if devices.needs_gaudi(device_name):

        def load() -> Any:
            return devices.gaudi_pipeline(name, options.gaudi_config)

    found = find_source(name, options.model_name is not None, load)
    return _run_source(found) if isinstance(found, Path) else found


def _run_source(folder: Path) -> LatentSource:
    """A Stage1 run of ours, by its folder or that of a checkpoint."""
    from rqvae import backends
    from rqvae.configuration import read
    from rqvae.run import Stage1Run
    from rqvae.trainers.vae_diagnostic import Stage1Source

    home = folder if (folder / "config.yaml").exists() else folder.resolve().parent.parent
    experiment = read([str(home / "config.yaml")], [], inference=True).instantiate()
    if not isinstance(experiment, Stage1Run):
        raise BadInput(f"--model_name {folder}: expected a Stage1 run, got one of Stage2")
    return Stage1Source(experiment, str(folder), backends.create("cpu"))


def _isolated(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from rqvae.trainers.diagnostic_isolation import run_isolated

    own = list(arguments)
    for name in ("--isolate", "--resume"):
        while (at := next((i for i, a in enumerate(own) if a.partition("=")[0] == name), None)) is not None:
            del own[at : at + (2 if name == "--isolate" and "=" not in own[at] else 1)]
    journal = options.output / "journal.jsonl"
    if options.resume and not journal.exists():
        raise BadInput(f"--resume: expected {journal} of this diagnosis, found none")
    return run_isolated(["diagnose", *own], journal, options.timeout)


def _retest(options: argparse.Namespace) -> str:
    """The command that compiles all but what was found bad."""
    words = ["python -m rqvae diagnose --mode compile_except"]
    subject = ("model_name", "root", "gaudi_config", "prompt", "steps", "batch_size", "latent_size", "seed", "dtype")
    for name in ("output", "device", "backend", "blank_std", *subject):
        if (value := getattr(options, name)) != parser().get_default(name):
            words.append(f"--{name} {shlex.quote(str(value))}")
    return " ".join(words)


class _Bar:
    """A progress bar with the current submodule."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, path: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, unit="module")
        self._bar.set_postfix_str(path, refresh=False)
        self._bar.update(max(0, done - self._bar.n))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _latest(metrics: dict[str, Any]) -> dict[str, Any]:
    """What compile_except did last, without the diagnosis that it is kept beside."""
    entry = list(metrics["summary"]["compile_except"].values())[-1]
    return {**entry, "config": metrics["config"]}


def _print(metrics: dict[str, Any], retest: str) -> None:
    from rich.console import Console
    from rich.table import Table

    summary = metrics["summary"]
    table = Table("path", "type", "status", "role", "notes", title=metrics["config"]["subject"])
    for row in (row for row in metrics["results"] if row["status"] not in ("OK", "CONTAINER")):
        table.add_row(row["path"], row["type"], row["status"], row["role"] or "", ", ".join(row["notes"]))
    console = Console()
    console.print(table)
    counts = ", ".join(f"{name} {summary[name]}" for name in ("total", "compiled", "failed", "blank", "untested"))
    console.print(counts)
    for name in ("culprits", "interactions", "suggested_graph_breaks"):
        if summary[name]:
            console.print(f"{name}: {summary[name]}", markup=False)
    for name, reason in summary.get("not_searched", {}).items():
        console.print(f"{name}: not searched: {reason}", markup=False)
    if summary["culprits"] or summary["interactions"]:
        console.print(f"retest: {retest}", markup=False)
