"""The checks, by family: every module of this folder is a family, every `Check` in it is used."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules

from rqvae.health.finding import Check


@lru_cache(maxsize=1)
def all_checks() -> tuple[Check, ...]:
    """All checks, in the order of their modules and within them of the file."""
    found: dict[str, Check] = {}
    for module in sorted(info.name for info in iter_modules(__path__)):
        for value in vars(import_module(f"{__name__}.{module}")).values():
            if isinstance(value, Check):
                found.setdefault(value.id, value)
    return tuple(found.values())
