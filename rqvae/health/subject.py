"""One run of a log, with all that is known about it: what a check is given."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

from rqvae.health.log import RunLog, Segment, Series
from rqvae.health.roles import PRIMARY, plain_name, primary_rank, role_of
from rqvae.health.settings import Setting, find
from rqvae.health.source import Source
from rqvae.health.statistics import Blocks, blocks

DIFFUSION_FORMATS = {"dit", "dm"}
_DIFFUSION_WORDS = re.compile(
    r"(?<![a-z])(diffusion|ddpm|ddim|timesteps|noise_schedule|dit|sit|lightningdit|edm2?|lognorm|flow.matching|"
    r"rectified|denois\w*|pred_noise)(?![a-z])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Level:
    """The loss of a prediction that knows nothing.

    Args:
        objective: eps, v, velocity, x0 or unknown.
        value: the loss of predicting zero everywhere.
        low: lower border of what is consistent with it.
        high: upper border.
        stated: whether the run states its objective, or it is what this kind of run usually does.
    """

    objective: str
    value: float
    low: float
    high: float
    stated: bool


@dataclass(frozen=True)
class Subject:
    """One run.

    Args:
        log: the file.
        segment: the run within it.
        config: leaves of a config file, () without one.
        source: the program's source, None without one.
        baseline: another run to compare with.
    """

    log: RunLog
    segment: Segment
    config: tuple[Setting, ...] = ()
    source: Source | None = None
    baseline: Subject | None = None
    _roles: dict[str, list[Series]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, series in self.segment.series.items():
            if (role := role_of(name)) is not None:
                self._roles.setdefault(role, []).append(series)

    def all(self, role: str) -> list[Series]:
        """All series of a role, points that were written again left out."""
        return [series.standing for series in self._roles.get(role, [])]

    def one(self, role: str) -> Series | None:
        """The series of a role that has most points."""
        found = self.all(role)
        return max(found, key=len) if found else None

    @cached_property
    def train_loss(self) -> Series | None:
        """What the run minimises, NaN and Inf kept.

        Beside a discriminator it is the reconstruction: a total jumps when the game begins.
        """
        found = self.all("train_loss")
        if not found:
            return None
        most = max(len(series) for series in found)
        if self._roles.get("gan_d"):
            rebuilt = [s for s in found if "rec" in plain_name(s.name) and len(s) >= most / 2]
            if rebuilt:
                return rebuilt[0]
        return min((s for s in found if len(s) >= most / 2), key=lambda s: (primary_rank(s.name), -len(s)))

    @cached_property
    def loss(self) -> Series | None:
        """The finite points of what the run minimises."""
        return self.train_loss.finite if self.train_loss is not None else None

    @cached_property
    def curve(self) -> Blocks | None:
        """The loss as medians of blocks; None without points."""
        return blocks(self.loss.values) if self.loss is not None and len(self.loss) else None

    @cached_property
    def stated(self) -> tuple[Setting, ...]:
        """The config's leaves, then what the log states."""
        facts = tuple(Setting(fact.key, fact.value, fact.file, fact.line) for fact in self.log.facts)
        return self.config + facts

    def setting(self, name: str) -> Setting | None:
        """A setting under any of its usual names, the config first (see settings.NAMES)."""
        return find(self.stated, name)

    def number(self, name: str) -> float | None:
        """A setting as a number."""
        found = self.setting(name)
        return found.number if found else None

    @cached_property
    def is_gan(self) -> bool:
        """Whether two networks play against each other and nothing else is minimised."""
        plays = bool(self._roles.get("gan_d")) and bool(self._roles.get("gan_g"))
        named = [s for s in self._roles.get("train_loss", []) if primary_rank(s.name) < len(PRIMARY)]
        return plays and not named

    @cached_property
    def is_diffusion(self) -> bool:
        """Whether the run says so: by its format, losses by timestep, or its settings. Never for a GAN."""
        if self.is_gan:
            return False
        if self.log.format in DIFFUSION_FORMATS or self._roles.get("t_bin"):
            return True
        return any(_DIFFUSION_WORDS.search(f"{s.key} {s.value}") for s in self.stated)

    @cached_property
    def starts_trained(self) -> Setting | None:
        """The setting that says the weights came from elsewhere."""
        return self.setting("pretrained")

    @cached_property
    def trivial(self) -> Level | None:
        """The loss of predicting nothing, for diffusion runs only.

        Unit-variance noise gives 1 for eps and v with a squared error and sqrt(2/pi) with an absolute one. A velocity
        noise - x0 gives 1 + Var(x0), where Var(x0) is that of normalised latents, taken as 1 within a factor 1.6.
        """
        if not self.is_diffusion:
            return None
        stated = self.setting("objective")
        words = " ".join(f"{f.key} {f.value}" for f in self.log.facts).lower()
        flow = any(word in words for word in ("sit parameters", "lightningdit", "lognorm"))
        text = str(stated.value).lower() if stated else "velocity" if flow else "eps"
        absolute = "l1" in str(getattr(self.setting("loss_type"), "value", "")).lower()
        if "velocity" in text or "flow" in text:
            return Level("velocity", 2.0, 1.6, 2.6, stated is not None)
        if "x0" in text or "x_start" in text or "sample" in text:
            return None
        value = 0.798 if absolute else 1.0
        known = stated is not None or self.log.format == "dit"
        return Level("v" if "v" in text.split("_") else "eps", value, 0.93 * value, 1.07 * value, known)

    @cached_property
    def total_steps(self) -> float | None:
        """How many steps the run was to take."""
        return self.number("steps")

    def power(self, series: Series | None = None) -> str:
        """What these points could have shown."""
        if series is not None and series is not self.loss:
            return f"{len(series)} points of {series.name}"
        if self.loss is None or self.curve is None:
            return "no points of a training loss"
        seen = max(0.2, 6 * self.curve.noise)
        block = f"blocks of {self.curve.size} points are known to {100 * self.curve.noise:.1f} %"
        if len(self.loss) < 8:
            return f"{len(self.loss)} points: no trend can be inferred"
        return f"{len(self.loss)} points; {block}: a lasting rise of {100 * seen:.0f} % would have been seen"
