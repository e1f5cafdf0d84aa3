"""Which of a run's costs are watched: its speed always, a profile of some steps where one is asked for."""

from __future__ import annotations

import re

from rqvae.backends import Backend
from rqvae.callbacks.interfaces import Observer
from rqvae.callbacks.profiler import Profiler
from rqvae.callbacks.throughput import Throughput, Work
from rqvae.durations import Duration
from rqvae.errors import BadInput
from rqvae.run import AnyRun, Stage1Run
from rqvae.trainers.clock import Clock
from rqvae.trainers.step_cost import step_work


def parse_window(text: str | None) -> tuple[int, int] | None:
    """`10:13` as (10, 13), None for None.

    Raises:
        BadInput: a text that is no window, or an empty one.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise BadInput(f"profile: expected START:STOP, two steps with START < STOP such as 10:13, got {text!r}")
    return int(match[1]), int(match[2])


def measures(run: AnyRun, backend: Backend, clock: Clock) -> list[Observer]:
    """The observers of a run's costs. Called before the models are wrapped, compiled or moved.

    Raises:
        BadInput: a window of the profiler that ends after the run's last step.
    """
    window = parse_window(run.profile)
    if window is None:
        return [_throughput(run, backend, clock)]
    if window[1] > clock.total_steps:
        raise BadInput(f"profile: expected START:STOP within the run's {clock.total_steps} steps, got {run.profile}")
    return [_throughput(run, backend, clock), Profiler(*window, backend)]


def _throughput(run: AnyRun, backend: Backend, clock: Clock) -> Throughput:
    notes, peak = [], run.train.peak_tflops or backend.peak_tflops()
    work: tuple[Work, ...] = ()
    try:
        starts = clock.starting_at(run.gan.disc_start) if isinstance(run, Stage1Run) and run.gan else 0
        work = step_work(run, starts)
    except RuntimeError as error:  # a foreign model may need numbers where there are only shapes
        reason = str(error).strip().partition("\n")[0]
        notes.append(f"train/tflops_per_s_device and train/mfu are left out: no count of operations on meta: {reason}")
    if work and peak is None:
        device = f"{backend.device_name} in {run.train.precision}"
        notes.append(f"train/mfu is left out: the peak of {device} is not known; train.peak_tflops sets it")
    return Throughput(Duration.parse(run.train.log_every), work, backend.world_size, peak, notes)
