"""An exported model: a folder that loads without the run, its data, its Stage1 run and its training config.

    OUT/config.json                      classes and arguments of the parts, the data's `DataSpec`, where it comes from
    OUT/{stage1,connector,stage2}/model.safetensors
    OUT/README.md                        model card

A Stage1 of diffusers is in its own format, `stage1/{config.json,diffusion_pytorch_model.safetensors}`. Classes of other
packages are recorded by their import path; no code is in the folder, and nothing is unpickled.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from rqvae.configuration import build
from rqvae.errors import BadInput
from rqvae.files import file_sha256, read_json
from rqvae.img_datasets.interfaces import DataSpec, LatentShape
from rqvae.models.interfaces import Stage1Model, Stage2Model, base_connector
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import kept
from rqvae.trainers import checkpoint
from rqvae.trainers.run_folder import check_can_write, make_folder
from rqvae.weight_files import write_tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT, VERSION = "mae-dit", 1
PARTS = ("stage1", "connector", "stage2")


@runtime_checkable
class SavesSource(Protocol):
    """A Stage1 whose constructor loads its weights from `source`, as the wrappers of diffusers' models do.

    A protocol and not their class: importing diffusers takes longer than all the rest of a command.
    """

    def save_source(self, folder: Path) -> None:
        """Write what the constructor takes as `source`, with the present weights."""
        ...


@dataclass(frozen=True)
class PartsSchema:
    """The constructors of an exported model.

    Args:
        stage1: the autoencoder.
        connector: between its latent and Stage2's; null is the identity.
        stage2: the generator; null for an autoencoder alone.
    """

    stage1: Stage1Model
    connector: base_connector | None = None
    stage2: Callable[[LatentShape, DataSpec], Stage2Model] | None = None


@dataclass(frozen=True)
class Description:
    """What config.json says.

    Args:
        data_spec: of the data that the model was trained on.
        parts: `class_path` and `init_args` of stage1, connector and stage2; null where there is none.
        source: where the weights are from: run, step, weights, data, command, scores.
    """

    data_spec: DataSpec
    parts: dict[str, Any]
    source: dict[str, Any] = field(default_factory=dict)


def check_new(folder: Path) -> None:
    """Raise BadInput unless the folder is new or empty and can be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: expected a new or empty folder to export to, got one with files")
    check_can_write(folder, "OUT")


def write(folder: Path, description: Description, stage1: Stage1Model, two_stage: TwoStage | None) -> None:
    """Write weights, then config.json, which makes the folder whole.

    Raises:
        BadInput: a folder with files in it, or one that cannot be made.
    """
    check_new(folder)
    make_folder(folder, "OUT")
    parts = dict(description.parts)
    modules: dict[str, nn.Module] = {"stage1": stage1}
    if two_stage is not None:
        modules |= {"connector": two_stage.connector, "stage2": two_stage.stage2}
    for name, module in modules.items():
        if isinstance(module, SavesSource):
            module.save_source(folder / name)
            inside = {"source": name, "subfolder": None, "revision": None}
            parts[name] = {**parts[name], "init_args": {**parts[name].get("init_args", {}), **inside}}
            continue
        (folder / name).mkdir()
        # copies: safetensors refuses tensors that share memory, as tied weights do
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
        write_tensors(tensors, folder / name / WEIGHTS, metadata={"format": "pt"})
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {
        "format": FORMAT,
        "format_version": VERSION,
        "data_spec": asdict(description.data_spec),
        "latent_shape": None if two_stage is None else list(two_stage.latent_shape),
        **parts,
        "source": description.source,
        "files": {path.relative_to(folder).as_posix(): file_sha256(path) for path in files},
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def read(folder: Path, trust_code: bool = True) -> tuple[Description, Stage1Model, TwoStage | None]:
    """An exported model in eval mode on the host.

    Args:
        folder: with config.json.
        trust_code: import classes of other packages than this one.

    Raises:
        BadInput: one line that names the file and the key: not such a folder, a class that cannot be imported,
            arguments it does not take, damaged or missing weights, weights of another architecture.
    """
    content = read_json(folder / CONFIG)
    if content.get("format") != FORMAT or content.get("format_version") != VERSION:
        got = f"{content.get('format')!r} version {content.get('format_version')!r}"
        raise BadInput(f"{folder / CONFIG}: expected format {FORMAT!r} version {VERSION}, got {got}")
    _verify(folder, content)
    spec = _data_spec(content.get("data_spec"), folder / CONFIG)
    description = Description(spec, {name: content.get(name) for name in PARTS}, content.get("source") or {})
    if not trust_code:
        _refuse_foreign_code(description.parts, folder)
    with kept():  # start weights are overwritten: loading draws no number of the caller's
        parts = build(PartsSchema, _with_sources(description.parts, folder), str(folder / CONFIG))
        two_stage = _assemble(parts, spec)
    if two_stage is not None and list(two_stage.latent_shape) != content.get("latent_shape"):
        got = f"{content.get('latent_shape')}, the parts make {list(two_stage.latent_shape)}"
        raise BadInput(f"{folder / CONFIG}: latent_shape: expected that of the parts, got {got}")
    for name in PARTS if two_stage is not None else ("stage1",):
        module = parts.stage1 if name == "stage1" else getattr(two_stage, name)
        if not isinstance(module, SavesSource):
            where = folder / name / WEIGHTS
            checkpoint.load_into(module, checkpoint.read(where.parent, where.stem), str(where))
    return description, parts.stage1.eval(), two_stage and two_stage.eval()


def _assemble(parts: PartsSchema, spec: DataSpec) -> TwoStage | None:
    if parts.stage2 is None:
        return None
    connector = parts.connector or base_connector()
    if (scale := parts.stage1.latent_statistics()) is not None:
        connector.use_latent_scale(*scale)
    latent_shape = connector.latent_shape(parts.stage1.latent_shape(spec.image_shape))
    return TwoStage(parts.stage1, connector, parts.stage2(latent_shape, spec), spec.image_shape)


def _verify(folder: Path, content: dict[str, Any]) -> None:
    """Raise BadInput unless every file that config.json lists is there, with the sha256 listed."""
    for name, sha256 in content.get("files", {}).items():
        if not (folder / name).is_file():
            raise BadInput(f"{folder / name}: expected the file that {CONFIG} lists, found none")
        if file_sha256(folder / name) != sha256:
            raise BadInput(f"{folder / name}: expected sha256 {sha256[:12]}..., the file is damaged")


def _refuse_foreign_code(parts: Mapping[str, Any], folder: Path) -> None:
    """BadInput where a value names a module of another package: importing it would run a stranger's code."""
    for key, text in _texts(parts):
        head, dot, _ = text.partition(".")
        if dot and head != "rqvae" and text.replace(".", "").isidentifier() and importlib.util.find_spec(head):
            where = f"{folder / CONFIG}: {key}"
            raise BadInput(f"{where}: expected a part of rqvae, got {text}; trust_code=True of rqvae.load imports it")


def _texts(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every text with the key it is under."""
    if isinstance(values, str):
        yield prefix.rstrip("."), values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _texts(value, f"{prefix}{key}.")
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, prefix)


def _with_sources(parts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The parts that there are, every class importable; a diffusers Stage1 is looked for inside the folder."""
    found = {name: part for name, part in parts.items() if part is not None}
    for key, path in _class_paths(found):
        module, _, name = path.rpartition(".")
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise BadInput(
                f"{folder / CONFIG}: {key}: expected {path} to be importable, got: {error}; install its package or put "
                "its folder on PYTHONPATH"
            ) from error
    stage1 = found.get("stage1") or {}
    source = stage1.get("init_args", {}).get("source")
    if source == "stage1" and (folder / source).is_dir():
        found["stage1"] = {**stage1, "init_args": {**stage1["init_args"], "source": str(folder / source)}}
    return found


def _class_paths(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every `class_path` with the key it is under."""
    if isinstance(values, list):
        for value in values:
            yield from _class_paths(value, prefix)
    elif isinstance(values, Mapping):
        for key, value in values.items():
            if key == "class_path" and isinstance(value, str):
                yield f"{prefix}{key}", value
            yield from _class_paths(value, f"{prefix}{key}.")


def _data_spec(values: Any, where: Path) -> DataSpec:
    try:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return DataSpec(**fields)
    except (AttributeError, TypeError) as error:
        raise BadInput(f"{where}: data_spec: expected the fields of DataSpec, got {values}") from error
