"""From a checked config to a finished run: which folder, which checkpoint, the trainer, and how it ended."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rqvae import remote
from rqvae.backends import Backend
from rqvae.callbacks.interfaces import Observer
from rqvae.callbacks.online_eval import OnlineEval
from rqvae.callbacks.pictures import Pictures
from rqvae.callbacks.throughput import Progress
from rqvae.durations import Duration
from rqvae.errors import BadInput
from rqvae.img_datasets.feed import Feed, Positions, check_batch
from rqvae.img_datasets.interfaces import LabeledImageDataset, LabeledImageDatasetWrapper
from rqvae.models.interfaces import ImageShape, Stage1Model
from rqvae.run import AnyRun, GanSettings, Stage1Run
from rqvae.trainers import stage1_trainer, stage2_trainer
from rqvae.trainers.cache_latents import open_cache
from rqvae.trainers.choice import Choice, TrainRequest, choose, on_this_host
from rqvae.trainers.clock import Clock
from rqvae.trainers.ema_snapshots import snapshots_of
from rqvae.trainers.initial_weights import only_at_its_start
from rqvae.trainers.joint_start import check_shared, job_start
from rqvae.trainers.logging import RunLog, setup_text_log
from rqvae.trainers.measuring import measures, parse_window
from rqvae.trainers.meter import Meter
from rqvae.trainers.mirror import mirror_of
from rqvae.trainers.online_scores import check_online_eval, row_names
from rqvae.trainers.parallel import check_parallel
from rqvae.trainers.part_checks import check_generator, check_parts
from rqvae.trainers.parts import Parts, check_blocks, on_main
from rqvae.trainers.run_folder import (
    RunLock,
    describe_environment,
    make_folder,
    note_wandb_id,
    write_new,
)
from rqvae.trainers.sampler_check import check_vis_sampler
from rqvae.trainers.session import Session
from rqvae.trainers.state import TrainState
from rqvae.trainers.trainer import Trainer

log = logging.getLogger(__name__)


def check(run: AnyRun, world_size: int) -> None:
    """Everything that can be checked before a process, a device or a data set is touched; `run` is on `meta`."""
    check_batch(run.data.batch_size, run.train.accumulate, world_size)
    check_parts(run)
    parse_window(run.profile)
    check_best(run, online_eval=True)
    check_parallel(run)
    spec = run.data.make("train")[0].spec
    image_shape = spec.image_shape
    run.stage1.check_data(spec)
    check_online_eval(run, spec)
    if isinstance(run, Stage1Run):
        if run.data.cache:
            raise BadInput("data.latents: expected null for Stage1 (it is trained on images)")
        run.stage1.latent_shape(image_shape)
        check_blocks(run.stage1, run.train)
        stage1_trainer.check_companions(run)
        if run.gan:
            check_gan(run.gan, run.stage1, image_shape)
    else:
        if run.train.channels_last:
            raise BadInput("train.channels_last: expected false for Stage2 (it is for convolutional autoencoders)")
        with torch.device("meta"):
            two_stage = stage2_trainer.make_two_stage(run)
        check_generator(two_stage.stage2)
        check_blocks(two_stage.stage2, run.train)
        check_vis_sampler(run, two_stage)
        stage2_trainer.join_draws(two_stage.stage2.draws(two_stage.latent_shape))
        if run.data.cache and (two_stage.stage2.in_pixels or two_stage.stage2.needs_images):
            named = "data.latents" if run.data.latents else "data.dataset vae"
            raise BadInput(f"{named}: expected null for a Stage2 that noises or compares pixels, got latents")
        open_cache(run.data, run.stage1)


def check_best(run: AnyRun, online_eval: bool) -> None:
    """That something will write `checkpoint.best.metric`; the names of train/ are checked at the first row."""
    rule, evaluation = run.checkpoint.best, run.online_eval
    if rule is None or rule.metric.startswith("train/") or run.observers:
        return
    names = list(row_names(evaluation).values()) if evaluation.every and online_eval else []
    if rule.metric not in names:
        named = ", ".join(names)
        raise BadInput(
            f"checkpoint.best.metric: expected a score of online_eval ({named or 'it is off'}) or a name of train/, "
            f"got {rule.metric}"
        )


def check_gan(gan: GanSettings, stage1: Stage1Model, image_shape: ImageShape) -> None:
    """That the discriminator takes the images, and that the model has the layer that the weighting asks for."""
    try:
        gan.discriminator(torch.empty(1, *image_shape, device="meta"))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"gan.discriminator: does not take images {image_shape}: {reason}") from error
    if gan.weighting == "last_layer":
        try:
            stage1.get_last_layer()
        except NotImplementedError as error:
            raise BadInput(f"gan.weighting: {error}") from error


@dataclass
class TrainingJob:
    """One rank's part of a training run, from the config to the exit code.

    Args:
        run: the experiment.
        config: its resolved config.
        backend: this rank.
        request: what the user asked for besides.
        folder: of the run, known from `execute` on.
    """

    run: AnyRun
    config: dict[str, Any]
    backend: Backend
    request: TrainRequest
    folder: Path | None = field(default=None, init=False)
    _lock: RunLock | None = field(default=None, init=False)

    def execute(self) -> int:
        """Train; every rank calls it.

        Returns:
            0, or 128 + signal when a signal ended the run after a checkpoint.
        """
        try:
            return self._execute()
        finally:  # a notebook keeps the error, and with it this job, after the call
            if self._lock is not None:
                self._lock.release()

    def _execute(self) -> int:
        setup_text_log(self.backend.rank)
        check_best(self.run, self.request.online_eval)
        if not self.request.online_eval:
            self.run = replace(self.run, online_eval=replace(self.run.online_eval, every=None))
        stream, clock = self._open_data()
        fingerprint = stream.dataset.fingerprint()
        since = job_start(self.backend) if self.request.fresh else None
        choice: Choice = on_main(self.backend, lambda: choose(self.request, self.config, fingerprint, since))
        choice = on_this_host(choice, self.backend)
        self.folder = choice.folder
        for line in choice.words if self.backend.rank == 0 else ():
            log.info("%s", line)
        if choice.finished:
            return 0
        if not choice.new:
            self._take(choice, {})  # before its checkpoint is read: nobody else may be writing there
        self.run = only_at_its_start(self.run, resumed=choice.load is not None)
        build = stage1_trainer.build if isinstance(self.run, Stage1Run) else stage2_trainer.build
        watching = measures(self.run, self.backend, clock)
        parts: Parts = build(self.run, self.backend, clock)  # type: ignore[arg-type]
        stream.draws = parts.draws if self.run.train.noise == "per_sample" else {}
        if parts.latents:
            parts.latents.check_data(stream.dataset.encoded_images().fingerprint())
            stream.latents = parts.latents
        self.run, meter = parts.join(self.run), Meter(self.backend)
        state = TrainState(self.backend, parts.modules, parts.ema, parts.updates, meter, parts.facts, parts.must_match)
        state.extras = parts.extras
        if choice.load:
            state.load(choice.load, clock)
            if clock.step >= clock.total_steps and choice.new:
                raise BadInput(
                    f"--resume-ckpt {choice.load}: is at step {clock.step}; expected train.steps to be more, got "
                    f"{clock.total_steps}"
                )
        elif parts.before_start:
            parts.before_start()
        if self._lock is None:  # a new folder is made only now: a wrong checkpoint leaves nothing behind
            counts = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.counted.items()}
            spec = stream.dataset.spec  # whose recording may not be there when the model is loaded
            named = {"action_names": list(spec.names)} if spec.num_actions else {}
            self._take(choice, {"parameters": counts, "data": fingerprint, **named})
        return self._fit(choice, parts, state, clock, stream, watching)

    def _open_data(self) -> tuple[LabeledImageDatasetWrapper, Clock]:
        """The train split as a stream, and the clock that its size makes."""
        run = self.run
        check_batch(run.data.batch_size, run.train.accumulate, self.backend.world_size)
        dataset, transform = run.data.make("train")
        self._open(dataset)
        if run.pictures.every or run.online_eval.every:
            self._open(run.data.make("val")[0])
        if len(dataset) == 0:
            raise BadInput("data.dataset: the train split is empty")
        clock = Clock(run.data.batch_size, len(dataset))
        clock.total_steps = clock.steps_of(Duration.parse(run.train.steps))
        return LabeledImageDatasetWrapper(dataset, transform, {}, run.train.seed, shuffle=True), clock

    def _open(self, dataset: LabeledImageDataset) -> None:
        """Rank 0 first: it reports what is wrong, and fills caches."""
        on_main(self.backend, dataset.open)
        if self.backend.rank:
            dataset.open()

    def _take(self, choice: Choice, facts: dict[str, Any]) -> None:
        """Make the folder where it is new, with `facts` in environment.json, and hold its lock on rank 0."""

        def take() -> None:
            if choice.new:
                source = remote.absolute(self.request.resume_ckpt) if self.request.resume_ckpt else None
                backend = self.backend
                place = {"backend": backend.name, "device": backend.device_name, "world_size": backend.world_size}
                place |= {"resumed_from": source}
                write_new(choice.folder, self.config, describe_environment(**place, **facts))
            lock = RunLock(choice.folder)
            lock.acquire()
            self._lock = lock

        on_main(self.backend, take)
        if remote.url_of(choice.folder):
            make_folder(choice.folder, "RQVAE_CACHE")  # each host has a copy of its own
        else:
            check_shared(self.backend, choice.folder)
        if self._lock is None:
            self._lock = RunLock(choice.folder)  # not held: rank 0 holds it for the job

    def _fit(
        self,
        choice: Choice,
        parts: Parts,
        state: TrainState,
        clock: Clock,
        stream: LabeledImageDatasetWrapper,
        watching: Sequence[Observer],
    ) -> int:
        run, backend, folder = self.run, self.backend, choice.folder
        assert self._lock is not None
        setup_text_log(backend.rank, folder / "log.txt")
        run_log = None
        if backend.rank == 0:
            run_log = RunLog(folder, run.logging, self.request.place.project, choice.wandb_id, clock.step, self.config)
            note_wandb_id(folder, run_log.wandb_id)
            _banner(run, backend, parts, clock, folder)
        state.mirror = mirror = mirror_of(folder)
        if mirror:
            on_main(backend, mirror.start)
        positions = Positions(
            clock.images, None, run.data.batch_size, run.train.accumulate, backend.rank, backend.world_size
        )
        trainer = Trainer(
            backend=backend,
            updates=parts.updates,
            ema=parts.ema,
            feed=Feed(stream, positions, run.data.workers, backend.feed, pin_memory=backend.pin_memory),
            clock=clock,
            state=state,
            session=Session(folder, self._lock, run.train.stop_check_seconds),
            run_log=run_log,
            train=run.train,
            checkpoints=run.checkpoint,
            observers=[
                *_observers(run, parts, watching),
                *self._snapshots(parts),
                *(each for each in run.interventions if isinstance(each, Observer)),
            ],
            interventions=run.interventions,
            rank_draws=parts.draws if run.train.noise == "per_rank" else {},
        )
        try:
            finished = trainer.fit()
        except BaseException:
            if mirror and backend.rank == 0:
                mirror.settle()
            raise
        finally:
            if run_log:
                run_log.close()
        if skipped := getattr(stream.dataset, "skipped", 0):
            log.warning("%d images could not be read and were skipped", skipped)
        if finished:
            on_main(backend, lambda: (folder / "FINISHED").write_text(f"step {clock.step}\n"))
        if mirror:
            on_main(backend, mirror.finish)
        return 0 if finished else 128 + trainer.session.signal

    def _snapshots(self, parts: Parts) -> list[Observer]:
        settings, module = self.run.ema, next(iter(parts.modules))
        return snapshots_of(self.backend, module, parts.ema, settings.snapshot_every, settings.snapshot_dtype)


def _observers(run: AnyRun, parts: Parts, watching: Sequence[Observer]) -> Sequence[Observer]:
    """Those of the run's costs, the other built-in ones that the config asks for, then the user's own."""
    observers = [*watching]
    if run.logging.progress:
        observers.append(Progress())
    if run.pictures.every:
        name, draw = parts.picture
        observers.append(Pictures(name, Duration.parse(run.pictures.every), parts.evaluated, draw))
    if run.online_eval.every and parts.evaluate:
        observers.append(OnlineEval(Duration.parse(run.online_eval.every), parts.evaluated, parts.evaluate))
    return [*observers, *run.observers]


def _banner(run: AnyRun, backend: Backend, parts: Parts, clock: Clock, folder: Path) -> None:
    """What is about to run, with the parameters of each part."""
    for name, module in parts.counted.items():
        total = sum(p.numel() for p in module.parameters())
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        log.info("%s %s: %s parameters, %s trainable", name, type(module).__qualname__, f"{total:,}", f"{trainable:,}")
    log.info(
        "%s on %d x %s, %s: step %d of %d, %d images a step, %d images an epoch",
        folder.name,
        backend.world_size,
        backend.name,
        run.train.precision,
        clock.step,
        clock.total_steps,
        clock.batch_size,
        clock.epoch_size,
    )
