"""Channel tracking in a training run: observes, stores, logs, and where it is asked to, acts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rqvae.backends import Backend
from rqvae.backends.sharded import whole
from rqvae.callbacks.channels.classifier import DEAD, STATES, scores
from rqvae.callbacks.channels.interventions import act, all_of, check_trained, forget
from rqvae.callbacks.channels.layers import Layer, find_layers
from rqvae.callbacks.channels.settings import InterventionSettings, TrackingSettings
from rqvae.callbacks.channels.snapshot import Snapshot
from rqvae.callbacks.channels.storage import Store
from rqvae.callbacks.channels.tracker import ChannelTracker, is_compiled
from rqvae.callbacks.channels.wiring import Wire
from rqvae.callbacks.interfaces import Intervention, Observer, RunView, UpdateView
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import LabeledImageData
from rqvae.randomness import fold
from rqvae.shards import is_sharded


def check_settings(model: nn.Module, tracking: TrackingSettings, intervention: InterventionSettings) -> None:
    """That the layers are there; no weights are needed.

    Raises:
        BadInput: a pattern that names nothing; an intervention without tracking, or on layers that are not trained.
    """
    if intervention.strategy != "none" and not tracking.enabled:
        raise BadInput("intervention.strategy: expected none without tracking.enabled, got " + intervention.strategy)
    if tracking.enabled:
        try:
            layers = find_layers(model, tracking.layers)
        except BadInput as error:
            raise BadInput(f"tracking.{error}") from None
        if intervention.strategy != "none":
            check_trained(layers, [p for p in model.parameters() if p.requires_grad])


class ChannelDynamics(Observer, Intervention):
    """Observes one module's channels in RUN/channels and the log, and acts on them.

    The states of a snapshot that was taken after step s lead to an act before the update of step s + 2 on every device,
    since a device that is not waited for knows them only then. Its own state is part of a checkpoint, so that a run
    that goes on acts as one that was never stopped.

    Args:
        model: the bare module; on its device, compiled and split as it will be trained.
        tracking: what is observed.
        intervention: what is done.
        backend: this rank.
        seed: of the run.

    Raises:
        BadInput: see `check_settings`; an intervention on a model that is split over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        tracking: TrackingSettings,
        intervention: InterventionSettings,
        backend: Backend,
        seed: int,
    ) -> None:
        check_settings(model, tracking, intervention)
        sharded = any(is_sharded(p) for p in model.parameters())
        if sharded and intervention.strategy != "none":
            raise BadInput(
                f"intervention.strategy: expected none with train.parallel: sharded, got {intervention.strategy}"
            )
        self.model, self.tracking, self.settings = model, tracking, intervention
        self._backend, self._seed = backend, seed
        several = backend.world_size > 1
        self.tracker = ChannelTracker(
            model,
            tracking.layers,
            tracking.every,
            thresholds=tracking.thresholds,
            latent=tracking.latent,
            pairs=tracking.pairs,
            probing=sharded or is_compiled(model),
            dtype=backend.widest_float,
            reduce=(lambda flat: backend.all_reduce(flat)) if several else None,
            world_size=backend.world_size,
            whole=whole,
        )
        count = self.tracker.layers[-1].stop
        self._waiting: list[tuple[int, Tensor, Tensor]] = []
        self._acted_at = torch.full((count,), -1, dtype=torch.int64)
        self._frozen = torch.zeros(count, dtype=torch.bool)
        self._last_act = -1
        self._taken: tuple[Tensor, Callable[[Tensor], Snapshot]] | None = None
        self._store: Store | None = None
        self._described = False

    def on_fit_start(self, run: RunView) -> None:
        self.tracker.go_on_at(run.clock.step)
        if run.is_main:
            self._store = Store(run.folder / "channels", self.tracker.layers)
            self._store.trim(run.clock.step)

    def before_step(self, run: RunView, micros: list[LabeledImageData]) -> None:  # noqa: ARG002
        if self.tracker.probing and self.tracker.watching:
            with self.tracker.uncompiled():
                for micro in micros:
                    with self._backend.autocast():
                        self.model(micro)

    def after_backward(self, run: RunView, update: UpdateView) -> None:  # noqa: ARG002
        if update.module is not self.model:
            return
        # the model has been seen whole: here and not after the step, since where steps are traced the sums are part
        # of the step's program, and with a checkpoint behind it would otherwise be one more
        self.tracker.step()
        window = self.tracking.every * self.tracking.window
        if self.tracker.steps % window == 0:
            self._taken = self.tracker.take()

    def after_step(self, run: RunView, losses: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        if self._taken is not None:
            (flat, read), self._taken = self._taken, None
            self._backend.when_read(lambda host: self._take_in(run, read(host)), flat)

    def on_fit_end(self, run: RunView) -> None:  # noqa: ARG002
        if self._store is not None:
            self._store.write_regions(self.tracker.classifier.regions())
        self.tracker.close()

    def _take_in(self, run: RunView, snapshot: Snapshot) -> None:
        """A snapshot has reached the host: classify it, log it, store it, and keep what it leads to."""
        classifier = self.tracker.classifier
        classifier.observe(snapshot)
        run.log_scalars(self._summary(snapshot))
        if self.settings.strategy != "none":
            self._waiting.append((snapshot.step, classifier.state.clone(), classifier.score.clone()))
        if self._store is not None:
            if not self._described:
                facts = {"tracking": dataclasses.asdict(self.tracking), "intervention": vars(self.settings)}
                self._store.describe(self.tracker.wires or {}, facts)
                self._described = True
            self._store.add(snapshot, classifier.state.numpy())
            self._store.write_regions(classifier.regions())

    def _summary(self, snapshot: Snapshot) -> dict[str, float]:
        """Fractions of the layers' channels by state, and what the latent says."""
        states = self.tracker.classifier.state[: len(self._frozen)]
        shares = torch.bincount(states, minlength=len(STATES)).double() / len(states)
        named = dict(zip(STATES, shares.tolist(), strict=True))
        dormant = scores(snapshot, self.tracking.thresholds)[2][: len(states)]
        values = {f"channels/{name}": share for name, share in named.items() if name not in ("active", "inactive")}
        values["channels/dead_fraction"] = sum(named[name] for name in DEAD)
        values["channels/dormant"] = float((dormant <= self.tracking.thresholds.silent).double().mean())
        if snapshot.latent is not None:
            active = snapshot.latent.variance > self.tracking.thresholds.active_unit
            values["channels/active_units"] = float(active.sum())
            values["channels/latent_kl"] = float(snapshot.latent.kl.mean())
        return values

    def before_update(self, run: RunView, update: UpdateView) -> None:
        if update.module is not self.model or self.settings.strategy == "none":
            return
        if self._waiting and self._waiting[0][0] < run.clock.step:
            _, states, score = self._waiting.pop(0)
            chosen = self._choose(run.clock.step, states, score)
            if chosen.any():
                self._act(run, update, chosen, states, score)
        if self.settings.strategy == "freeze" and self._frozen.any():
            for layer, wire, chosen_c in self._by_layer(self._frozen):
                forget(all_of(layer, wire), chosen_c, update.optimizer)

    def _choose(self, step: int, states: Tensor, score: Tensor) -> Tensor:
        """(N,) bool: the channels to act on before the update of step number `step` (0 is the first)."""
        settings, count = self.settings, len(self._frozen)
        none = torch.zeros(count, dtype=torch.bool)
        if step < settings.start or (settings.stop is not None and step > settings.stop):
            return none
        if self._last_act >= 0 and step - self._last_act < settings.every:
            return none
        wanted = torch.tensor([STATES.index(name) for name in settings.states])
        rested = (self._acted_at < 0) | (step - self._acted_at >= settings.cooldown)
        chosen = torch.isin(states[:count], wanted) & rested & ~self._frozen
        for layer in self.tracker.layers:
            if not layer.is_norm:
                chosen[layer.start : layer.stop] = False
        if 0 < settings.max_channels < int(chosen.sum()):
            order = torch.where(chosen, score[:count], torch.inf).argsort(stable=True)
            chosen = none.index_fill(0, order[: settings.max_channels], True)
        return chosen

    def _act(self, run: RunView, update: UpdateView, chosen: Tensor, states: Tensor, score: Tensor) -> None:
        step, settings = run.clock.step, self.settings
        self._last_act = step
        self._acted_at = torch.where(chosen, step, self._acted_at)
        if not settings.dry_run:
            if settings.strategy == "freeze":
                self._frozen = self._frozen | chosen
            else:
                for layer, wire, chosen_c in self._by_layer(chosen):
                    act(layer, wire, chosen_c, settings, update.optimizer, fold(self._seed, "recycle", step))
        if self._store is not None:
            rows = [
                [layer.name, int(c), STATES[int(states[layer.start + c])], float(score[layer.start + c])]
                for layer in self.tracker.layers
                for c in chosen[layer.start : layer.stop].nonzero().flatten().tolist()
            ]
            self._store.note_act(
                {"step": step, "strategy": settings.strategy, "dry_run": settings.dry_run, "channels": rows}
            )

    def _by_layer(self, chosen: Tensor) -> list[tuple[Layer, Wire, Tensor]]:
        """Layer, wire and (C,) mask on the device, of the layers with a chosen channel."""
        rows = []
        for layer in self.tracker.layers:
            part = chosen[layer.start : layer.stop]
            if part.any():
                device = layer.module.get_parameter("weight").device
                rows.append((layer, (self.tracker.wires or {}).get(layer.name, Wire()), part.to(device)))
        return rows

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, on the host."""
        steps = [step for step, _, _ in self._waiting]
        rows = [torch.stack([states.double(), score]) for _, states, score in self._waiting]
        return {
            **self.tracker.classifier.state_dict(),
            "acted_at": self._acted_at.clone(),
            "frozen": self._frozen.clone(),
            "last_act": torch.tensor(self._last_act),
            "waiting_steps": torch.tensor(steps, dtype=torch.int64),
            "waiting": torch.stack(rows) if rows else torch.zeros(0, 2, len(self.tracker.classifier.state)),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a checkpoint left off.

        Raises:
            BadInput: it tracked other layers.
        """
        own = ("acted_at", "frozen", "last_act", "waiting_steps", "waiting")
        self.tracker.classifier.load_state_dict({k: v for k, v in state.items() if k not in own})
        self._acted_at, self._frozen = state["acted_at"].clone(), state["frozen"].clone()
        self._last_act = int(state["last_act"])
        self._waiting = [
            (int(step), rows[0].long(), rows[1].double())
            for step, rows in zip(state["waiting_steps"], state["waiting"], strict=True)
        ]
