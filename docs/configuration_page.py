"""docs/configuration.md: every key of a config, and every class that a config can name, from their docstrings."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import sys
import typing
from collections.abc import Iterator
from types import ModuleType

from docs.docstrings import Argument, anchor, arguments, summary
from rqvae.callbacks.interfaces import Intervention, Observer
from rqvae.diffusion import solvers
from rqvae.diffusion.guidance import Guidance
from rqvae.diffusion.paths import Path
from rqvae.diffusion.sampling import Sampler
from rqvae.diffusion.timesteps import TimestepLaw
from rqvae.diffusion.weighting import Weighting
from rqvae.img_datasets.interfaces import LabeledImageDataset, Transform
from rqvae.metrics.extractors import Extractor
from rqvae.models.interfaces import Stage1Model, Stage2Model, base_connector
from rqvae.models.losses.interfaces import ImageLoss
from rqvae.run import Stage1Run, Stage2Run
from rqvae.trainers.schedules import Schedule

# Arguments that the framework gives: a config never writes them.
GIVEN = {"split", "latent_shape", "data_spec", "spec"}
USABLE_BASES = {base_connector}
PLAIN = ("int", "float", "str", "bool", "list", "dict", "tuple", "Literal", "DurationText")
FAMILIES: dict[str, tuple[str, type]] = {
    "Datasets": ("`data.dataset`", LabeledImageDataset),
    "Transforms": ("`data.train_transform`, `data.val_transform`, `data.test_transform`", Transform),
    "Stage1 models": ("`stage1`", Stage1Model),
    "Connectors": ("`connector`", base_connector),
    "Stage2 models": ("`stage2`", Stage2Model),
    "Losses": ("an entry of `losses`", ImageLoss),
    "Paths": ("`stage2.init_args.path`", Path),
    "Laws of training times": ("`stage2.init_args.timesteps`", TimestepLaw),
    "Weightings of the error": ("`stage2.init_args.weighting`", Weighting),
    "Guidance": ("`stage2.init_args.sampler.guidance`", Guidance),
    "Learning-rate schedules": ("`updates.NAME.schedule`", Schedule),
    "Feature extractors": ("`online_eval.extractor`", Extractor),
    "Observers": ("an entry of `observers`", Observer),
    "Interventions": ("an entry of `interventions`", Intervention),
}

INTRODUCTION = """\
# Configuration

This page is generated from the code (`make docs`); a test fails where the two differ.

A config is a YAML file whose keys are the fields of `rqvae.run.Stage1Run` or, where it has a section `stage2`, of
`rqvae.run.Stage2Run`. Several files are merged, later ones over earlier ones. Every key is an option of the command
line too: `--train.steps 20k`, and for the arguments of a class `--stage1.init_args.width 64`. `--print-config` prints
every key with its value, and a mistake is one line that names file and key.

Where a key takes a class, the config names it by its import path, your own package included:

```yaml
stage1:
  class_path: rqvae.models.stage1.kl_vae.KLVAE
  init_args: {latent_channels: 4}
```

A *duration* is `500` (optimizer steps), `20k steps`, `5M images`, `0.5 epochs` or `10%` of the run.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [INTRODUCTION, "## Sections of a config\n"]
    for schema in (Stage1Run, Stage2Run):
        parts.append(f"### Stage {schema.stage}\n\n{summary(schema)}\n\n{_table(_top_rows(schema))}")
    parts.append("## Keys of the sections\n")
    parts += [_section(name, found) for name, found in sections().items()]
    parts.append("## Classes\n\nWhat ships with the package; `class_path` is the whole name.\n")
    for title, family in FAMILIES.items():
        parts.append(_family(title, *family))
        if title == "Stage2 models":
            parts.append(_networks())
    parts.append(_sampling())
    return "\n".join(parts)


def sections() -> dict[str, list[type]]:
    """Dotted name of every section, in the order of the schemas, and its dataclass, or one for each stage."""
    found: dict[str, list[type]] = {}
    for schema in (Stage1Run, Stage2Run):
        for name, cls in _nested(schema, ""):
            if cls not in found.setdefault(name, []):
                found[name].append(cls)
    return found


def classes(base: type) -> list[type]:
    """The package's public subclasses of `base` that a config can name, by module and name."""
    found = {
        cls
        for module in modules()
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, base) and cls.__module__ == module.__name__
    }
    return sorted((cls for cls in found if _can_be_named(cls, base)), key=lambda c: (c.__module__, c.__qualname__))


def networks() -> dict[str, list[type]]:
    """What is no subclass of an interface: backbones and discriminators."""
    return {
        "Backbones": [c for c in _own_modules("rqvae.models.stage2") if "data_spec" in inspect.signature(c).parameters],
        "Discriminators": [c for c in _own_modules("rqvae.models.losses") if _judges_images(c)],
    }


def modules() -> Iterator[ModuleType]:
    """Every module of the rooms whose classes a config names, by name."""
    for room in ("img_datasets", "models", "diffusion", "metrics", "callbacks", "trainers"):
        package = importlib.import_module(f"rqvae.{room}")
        yield package
        for info in sorted(pkgutil.walk_packages(package.__path__, f"{package.__name__}."), key=lambda i: i.name):
            yield importlib.import_module(info.name)


def _can_be_named(cls: type, base: type) -> bool:
    """Public, not an interface, and without arguments that only the trainer can give (a function, a duration)."""
    derived = bool(cls.__subclasses__())
    if cls.__name__.startswith("_") or inspect.isabstract(cls) or (cls is base and cls not in USABLE_BASES):
        return False
    if issubclass(cls, Stage1Model) and cls.encode is Stage1Model.encode:  # a part of models
        return False
    required = [
        p
        for name, p in inspect.signature(cls).parameters.items()
        if p.default is p.empty and name not in GIVEN and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if issubclass(cls, Observer):
        return all(str(p.annotation).startswith(PLAIN) for p in required)
    made_of_objects = any(str(p.annotation) in ("Any", "Path") for p in required)
    return not (derived and made_of_objects)


def _own_modules(package: str) -> list[type]:
    from torch import nn

    found = []
    for module in modules():
        if module.__name__.startswith(package):
            found += [
                cls
                for name, cls in vars(module).items()
                if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__
                and not name.startswith("_") and not issubclass(cls, Stage2Model)
            ]  # fmt: skip
    return found


def _judges_images(cls: type) -> bool:
    """No loss of an interface, nor one with weights of its own (LPIPS), which has a section of the config."""
    return not issubclass(cls, ImageLoss) and not hasattr(cls, "fetch")


def _nested(cls: type, prefix: str) -> Iterator[tuple[str, type]]:
    for f in dataclasses.fields(cls):
        kind = _field_type(cls, f.name)
        if kind is not None:
            yield f"{prefix}{f.name}", kind
            yield from _nested(kind, f"{prefix}{f.name}.")


def _field_type(cls: type, name: str) -> type | None:
    """The settings dataclass of a field; None where it takes a value or a class."""
    hint = typing.get_type_hints(cls, vars(sys.modules[cls.__module__]))[name]
    options = typing.get_args(hint) if typing.get_origin(hint) is not None else (hint,)
    settings = [t for t in options if inspect.isclass(t) and dataclasses.is_dataclass(t) and "." in t.__module__]
    named_by_path = (Schedule, Path, Guidance, TimestepLaw, Weighting, Observer, Intervention)
    return next((t for t in settings if not issubclass(t, named_by_path)), None)


def _top_rows(schema: type) -> list[Argument]:
    return [_linked(row, row.name) for row in arguments(schema)]


def _section(name: str, found: list[type]) -> str:
    texts = [f"{summary(cls)}\n\n{_table([_linked(a, f'{name}.{a.name}') for a in arguments(cls)])}" for cls in found]
    return "\n".join([f"### {name}\n", *texts])


def _linked(row: Argument, key: str) -> Argument:
    """The row under its whole key; a section's refers to its own table, which has the defaults."""
    if key not in sections():
        return dataclasses.replace(row, name=f"`{key}`")
    default = "" if row.default == row.kind else row.default
    return dataclasses.replace(row, name=f"[`{key}`](#{anchor(key)})", default=default)


def _family(title: str, key: str, base: type) -> str:
    found = classes(base)
    head = f"### {title}\n\nFor {key}: a `{base.__module__}.{base.__qualname__}`.\n"
    return "\n".join([head, *map(_class, found)]) if found else f"{head}\nNone ships with the package.\n"


def _networks() -> str:
    keys = {"Backbones": "`stage2.init_args.backbone`", "Discriminators": "`gan.discriminator`"}
    return "\n".join(
        part
        for title, found in networks().items()
        for part in (f"### {title}\n\nFor {keys[title]}: a `torch.nn.Module`.\n", *map(_class, found))
    )


def _sampling() -> str:
    head = "### Sampler and solvers\n\nFor `stage2.init_args.sampler` (its keys directly, without class_path).\n"
    functions = [
        f"- `rqvae.diffusion.solvers.{name}`: {summary(item).splitlines()[0]}"
        for name, item in vars(solvers).items()
        if inspect.isfunction(item) and item.__module__ == solvers.__name__ and not name.startswith("_")
    ]
    own = [c for c in vars(solvers).values() if inspect.isclass(c) and c.__module__ == solvers.__name__]
    listing = "Solvers without settings, by name:\n\n" + "\n".join(functions) + "\n"
    return "\n".join([head, _class(Sampler), listing, *map(_class, own)])


def _class(cls: type) -> str:
    rows = [dataclasses.replace(a, name=f"`{a.name}`") for a in arguments(cls) if a.name not in GIVEN]
    table = _table(rows) if rows else "No arguments.\n"
    return f"#### {cls.__qualname__}\n\n`{cls.__module__}.{cls.__qualname__}`\n\n{summary(cls)}\n\n{table}"


def _table(rows: list[Argument]) -> str:
    lines = [f"| {row.name} | {row.kind} | {row.default} | {row.meaning} |" for row in rows]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *lines, ""])
