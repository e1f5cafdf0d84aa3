"""What the log itself lacks or has too much of, and the warnings in it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rqvae.health.finding import Evidence, Found, NotAssessed, check
from rqvae.health.subject import Subject

_VERBOSE = 10_000
_TABLES = {
    "guided-csv", "guided-json", "lightning-csv", "rqvae", "stats-jsonl", "tensorboard", "trainer-state", "wandb-csv",
}  # fmt: skip
"""Formats that have no room for what a program prints."""
_FRAME = re.compile(r"^(?P<path>\S+?):\d+: (?P<kind>\w*Warning): (?P<text>.*)")
_PACKAGE = re.compile(r"(?:site|dist)-packages[/\\]([\w.-]+)")


def _missing(subject: Subject, roles: tuple[str, ...], what: str) -> Iterator[Found]:
    if subject.train_loss is None:
        raise NotAssessed("log the training loss")
    if not any(subject.all(role) for role in roles):
        yield Found(f"the log has no {what}", confidence=0.95, power="all series were looked at")


@check(
    "LOG.MISSING_LR",
    "the learning rate is not logged",
    "info",
    needs=("train_loss",),
    threshold="no series of a learning rate; where config or source name the schedule, the report draws it",
    recommendation=("log optimizer.param_groups[0]['lr'] after each step",),
    verify="the log has a learning rate",
)
def missing_lr(subject: Subject) -> Iterator[Found]:
    """No learning rate."""
    from rqvae.health.schedules import schedule_of

    schedule = schedule_of(subject)
    for found in _missing(subject, ("lr", "lr_d"), "learning rate"):
        words = (
            f"; config and source give a {schedule.name} schedule with a peak of {schedule.peak:g}" if schedule else ""
        )
        yield Found(found.message + words, confidence=found.confidence, power=found.power)


@check(
    "LOG.MISSING_GRAD",
    "the gradient norm is not logged",
    "info",
    needs=("train_loss",),
    threshold="no series of a gradient norm",
    recommendation=("log what clip_grad_norm_ returns, without reading it at every step",),
    verify="the log has a gradient norm",
)
def missing_grad(subject: Subject) -> Iterator[Found]:
    """No gradient norm."""
    yield from _missing(subject, ("grad_norm", "grad_d"), "gradient norm")


@check(
    "LOG.MISSING_T_BINS",
    "the loss is not logged by timestep",
    "info",
    needs=("train_loss", "diffusion"),
    threshold="a diffusion whose log has no loss by timestep",
    recommendation=(
        "log the loss in quarters of the timesteps: most of the noise of a diffusion's loss is the timestep",
    ),
    verify="the log has loss_q0 to loss_q3",
)
def missing_bins(subject: Subject) -> Iterator[Found]:
    """No loss by timestep."""
    yield from _missing(subject, ("t_bin",), "loss by timestep")


@check(
    "LOG.VERBOSITY",
    "the log says too much",
    "minor",
    needs=(),
    threshold="more than 10 kB of log a step",
    recommendation=(
        "print debug blocks for the first batch only, or behind a switch",
        "min, max and unique of device tensors wait for the device: log them rarely",
    ),
    verify="below 1 kB a step",
)
def verbosity(subject: Subject) -> Iterator[Found]:
    """Bytes a step."""
    loss, log = subject.train_loss, subject.log
    if loss is None or not len(loss) or log.unit != "step":
        raise NotAssessed("log the training loss with its step")
    if log.format in ("tensorboard", "trainer-state", "wandb-csv"):
        return
    steps = max(float(loss.steps[-1] - loss.steps[0]), float(len(loss)), 1.0)
    rate = log.size / steps
    if rate > _VERBOSE or (rate > _VERBOSE / 2 and log.format == "dm"):
        yield Found(
            f"{rate / 1000:.1f} kB of log a step ({log.size / 1000:.0f} kB, {steps:.0f} steps)",
            confidence=0.95,
            power="all lines were read",
        )


def _warnings(subject: Subject) -> dict[tuple[str, str, str], list[int]]:
    """(package, kind, text) -> lines."""
    if subject.log.format in _TABLES:
        raise NotAssessed("keep what the program prints, warnings included, and give that text")
    found: dict[tuple[str, str, str], list[int]] = {}
    for event in subject.log.of_kind("warning"):
        frame = _FRAME.match(event.text)
        if frame:
            package = _PACKAGE.search(frame["path"])
            key = (package[1] if package else frame["path"].rpartition("/")[2], frame["kind"], frame["text"][:80])
            found.setdefault(key, []).append(event.line)
    return found


@check(
    "LOG.WARNING.TORCH_LOAD",
    "torch.load with pickle",
    "info",
    needs=(),
    threshold="a FutureWarning about torch.load and weights_only; attributed to the package of its frame",
    recommendation=("in a dependency: upgrade it, or load .safetensors; in your own code: weights_only=True",),
    verify="the warning is gone",
)
def torch_load(subject: Subject) -> Iterator[Found]:
    """Warnings on torch.load, by package."""
    hits = {key: lines for key, lines in _warnings(subject).items() if "torch.load" in key[2]}
    if hits:
        packages = ", ".join(sorted({key[0] for key in hits}))
        where = tuple(Evidence("", line) for lines in hits.values() for line in lines[:1])
        yield Found(
            f"torch.load with weights_only=False in {packages}", where, confidence=0.95, power="all lines were read"
        )


@check(
    "LOG.WARNING.OTHER",
    "warnings",
    "info",
    needs=(),
    threshold="any other Python warning, counted once for each package, kind and text",
    recommendation=("read them once",),
    verify="no warning, or each is known",
)
def warnings(subject: Subject) -> Iterator[Found]:
    """All other warnings, deduplicated."""
    hits = {key: lines for key, lines in _warnings(subject).items() if "torch.load" not in key[2]}
    for (package, kind, text), lines in list(hits.items())[:10]:
        yield Found(
            f"{kind} from {package}, {len(lines)} time(s): {text}",
            (Evidence("", lines[0]),),
            power="all lines were read",
        )
