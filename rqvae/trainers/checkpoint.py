"""Checkpoints: a folder of safetensors whose COMPLETE file, written last, says what must be in it.

    checkpoints/step_00000500/{model,ema_0.999,optimizer}/NAME.safetensors  meta.json  COMPLETE

Groups of which each process holds a part are together in shards/, see `rqvae/backends/shard_files.py`.
A folder is good when COMPLETE is there and true (sizes and sha256). There is no rename: object stores have none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor, nn

from rqvae.backends import shard_files
from rqvae.backends.sharded import split_like
from rqvae.errors import BadInput, RunFailed
from rqvae.files import file_sha256
from rqvae.shards import is_sharded
from rqvae.weight_files import write_tensors

Tensors = Mapping[str, Tensor]
Like = Callable[[str], "Tensor | None"]
SHARDS = "shards"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def tensors_sha256(tensors: Tensors) -> str:
    """sha256 over names, shapes and bytes: the identity of weights, whatever file they come from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.ndim else value.numpy().tobytes())
    return digest.hexdigest()


def size_of(tensors: Mapping[str, Tensors]) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(value.nbytes for group in tensors.values() for value in group.values())


def free_bytes(folder: Path) -> int | None:
    """What may be written where `folder` is or is to be; None where the file system does not say, as buckets may."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(nearest)
    return usage.free if usage.total else None


def in_words(size: int) -> str:
    """A number of bytes to be read by people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def check_room(folder: Path, tensors: Mapping[str, Tensors]) -> None:
    """Raise RunFailed where the disk has less room than the tensors take, before a byte is written."""
    needed, free = size_of(tensors), free_bytes(folder)
    if free is not None and free < needed:
        raise RunFailed(
            f"{folder}: checkpoint not written: the disk is full (expected {in_words(needed)} free, got "
            f"{in_words(free)}); earlier checkpoints are untouched"
        )


def begin(folder: Path, tensors: Mapping[str, Tensors]) -> None:
    """Make an empty folder for shards that all ranks are to write; one process calls it.

    Raises:
        RunFailed: the disk has no room for the tensors, split ones and others, or cannot be written.
    """
    if folder.exists():
        shutil.rmtree(folder)
    check_room(folder, tensors)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise RunFailed(f"{folder}: checkpoint not written: {error.strerror}") from error


def write_shards(folder: Path, tensors: Mapping[str, Tensors]) -> None:
    """Write these groups into a folder that was begun; every rank calls it, and `save` comes after it.

    Raises:
        RunFailed: on every rank, where one could not write.
    """
    flat = {f"{name}:{key}": value.detach() for name, group in tensors.items() for key, value in group.items()}
    shard_files.write(folder / SHARDS, flat)


def save(
    folder: Path,
    tensors: Mapping[str, Tensors],
    meta: Mapping[str, Any],
    copied: bool = False,
    begun: bool = False,
    elsewhere: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint: `tensors` maps `model/stage1` to named tensors. COMPLETE is written last.

    Args:
        folder: to write; one that is there already is removed.
        tensors: by file and name.
        meta: what meta.json is to hold.
        copied: the tensors are on the host, contiguous, and share no memory.
        begun: the folder holds the shards of other groups, which stay.
        elsewhere: what COMPLETE is to list of files that other hosts hold.

    Raises:
        RunFailed: the disk is full or cannot be written; what was begun is removed, other checkpoints are untouched.
    """
    if folder.exists() and not begun:
        shutil.rmtree(folder)
    check_room(folder, tensors)
    try:
        for name, group in tensors.items():
            file = folder / f"{name}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            # copies: safetensors refuses tensors that share memory, as tied weights do
            own = dict(group) if copied else {k: v.detach().cpu().contiguous().clone() for k, v in group.items()}
            write_tensors(own, file)
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        listing = {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": file_sha256(p)} for p in files}
        listing |= elsewhere or {}
        (folder / "COMPLETE").write_text(json.dumps(listing, indent=1))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        full = getattr(error, "errno", None) in _FULL or "No space left" in str(error) or "os error 27" in str(error)
        why = "the disk is full" if full else str(error).splitlines()[0]
        raise RunFailed(f"{folder}: checkpoint not written: {why}; earlier checkpoints are untouched") from error


def is_good(folder: Path) -> bool:
    """Whether the folder's COMPLETE is there and every file it lists has the size it lists."""
    try:
        listing = json.loads((folder / "COMPLETE").read_text())
        return all((folder / name).stat().st_size == entry["size"] for name, entry in listing.items())
    except (OSError, ValueError):
        return False


def verify(folder: Path) -> None:
    """Raise BadInput unless every file has the sha256 that COMPLETE lists."""
    if not is_good(folder):
        raise BadInput(f"{folder}: expected a complete checkpoint, found one without a true COMPLETE file")
    for name, entry in json.loads((folder / "COMPLETE").read_text()).items():
        if file_sha256(folder / name) != entry["sha256"]:
            raise BadInput(f"{folder / name}: expected sha256 {entry['sha256'][:12]}..., the file is damaged")


def is_undamaged(folder: Path) -> bool:
    """Whether `verify` finds nothing; reads every byte."""
    try:
        verify(folder)
    except BadInput:
        return False
    return True


def in_run(run: Path) -> list[Path]:
    """The good checkpoints of a run folder, oldest first."""
    return [p for p in sorted((run / "checkpoints").glob("step_*")) if is_good(p)]


def find(path: Path) -> Path:
    """The checkpoint that `path` names: a checkpoint folder, or a run folder (its newest good one).

    Raises:
        BadInput: there is none.
    """
    if not path.exists():
        raise BadInput(f"{path}: no such checkpoint or run folder")
    if (path / "meta.json").exists():
        verify(path)
        return path
    found = in_run(path)
    if not found:
        raise BadInput(f"{path}: expected a run or checkpoint folder with a complete checkpoint, found none")
    verify(found[-1])
    return found[-1]


def read(folder: Path, name: str, like: Like = lambda _: None) -> dict[str, Tensor]:
    """The tensors of one group, for example `model/stage1`, whole and on the host but where `like` says otherwise.

    Args:
        folder: of the checkpoint, written by any number of processes.
        name: of the group.
        like: of a tensor's name the one that it is to be split like, on the same device; None for a whole one.

    Raises:
        BadInput: no such group, or a file that is damaged.
    """
    file = folder / f"{name}.safetensors"
    if not file.exists():
        return _read_shards(folder, name, like)
    tensors = _load_file(file)
    targets = {key: _fitting(like(key), tuple(value.shape)) for key, value in tensors.items()}
    return {
        key: value if (target := targets[key]) is None else split_like(value, target) for key, value in tensors.items()
    }


def _load_file(file: Path) -> dict[str, Tensor]:
    try:
        try:
            return load_file(file)
        except OSError:
            # It maps the file into memory, which some mounted buckets refuse (ENODEV, mmap(2)); its errors carry no
            # number to tell that by. Whatever else was wrong is wrong again, and then raised.
            return load(file.read_bytes())
    except SafetensorError as error:
        raise BadInput(f"{file}: expected safetensors, {error}") from error


def _read_shards(folder: Path, name: str, like: Like) -> dict[str, Tensor]:
    prefix = f"{name}:"
    stored = shard_files.entries(folder / SHARDS) if (folder / SHARDS).is_dir() else {}
    tensors = {}
    for full, (shape, dtype) in stored.items():
        if full.startswith(prefix):
            target = _fitting(like(full.removeprefix(prefix)), shape)
            tensors[full] = torch.empty(shape, dtype=dtype) if target is None else torch.empty_like(target, dtype=dtype)
    if not tensors:
        file = folder / f"{name}.safetensors"
        raise BadInput(f"{file}: no such file; the checkpoint has {', '.join(groups(folder)) or 'none'}")
    shard_files.read_into(folder / SHARDS, tensors)
    return {full.removeprefix(prefix): value for full, value in tensors.items()}


def _fitting(like: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """`like`, where it is split and of this shape."""
    return like if like is not None and is_sharded(like) and tuple(like.shape) == shape else None


def groups(folder: Path) -> list[str]:
    """The names of a checkpoint's groups of tensors: its files, without suffix, and those in its shards."""
    files = {str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.safetensors")}
    split = shard_files.entries(folder / SHARDS) if (folder / SHARDS).is_dir() else {}
    return sorted(files | {name.partition(":")[0] for name in split})


def read_meta(folder: Path) -> dict[str, Any]:
    """A checkpoint's meta.json."""
    return json.loads((folder / "meta.json").read_text())


def weights_of(folder: Path, wish: str | None = None) -> str:
    """The folder of a checkpoint's weights: `model` or an average.

    Args:
        folder: of the checkpoint.
        wish: its name, where `0.999` is `ema_0.999`; None is what the run evaluates.

    Raises:
        BadInput: the checkpoint has no such weights; the line lists those it has.
    """
    if wish is None:
        return read_meta(folder)["evaluate"]
    known = sorted({Path(name).parts[0] for name in groups(folder)} - {"optimizer", "log"})
    for name in (wish, f"ema_{wish}"):
        if name in known:
            return name
    raise BadInput(f"{folder}: expected weights {', '.join(known)}, got {wish}")


def check_architecture(module: nn.Module, tensors: Tensors, where: str) -> None:
    """Raise BadInput with the first three mismatches unless `tensors` are exactly the module's, by name and shape."""
    own = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in tensors.items()}
    wrong = [
        f"{k} expected {own.get(k, 'nothing')}, got {given.get(k, 'nothing')}"
        for k in [*own, *(k for k in given if k not in own)]
        if own.get(k) != given.get(k)
    ]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise BadInput(f"{where}: weights of another architecture than {type(module).__name__}: {shown}")


def load_into(module: nn.Module, tensors: Tensors, where: str) -> None:
    """Check the architecture, then load."""
    check_architecture(module, tensors, where)
    module.load_state_dict(dict(tensors))


def prune(run: Path, rule: Callable[[Collection[str], Collection[str]], list[str]]) -> None:
    """Remove the checkpoints that `rule`, of all names and of the good ones, says need not stay; see `outdated`."""
    found = [folder.name for folder in (run / "checkpoints").glob("step_*")]
    good = [folder.name for folder in in_run(run)]
    for name in rule(found, good):
        folder = run / "checkpoints" / name
        # COMPLETE goes first, so that a removal cut short leaves no folder that looks whole
        (folder / "COMPLETE").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def outdated(
    found: Collection[str], good: Collection[str], saved: str, keep_last: int, keep: Collection[str]
) -> list[str]:
    """Names of all but the newest `keep_last` good checkpoints and those in `keep`; older half-written ones go too.

    Newer ones than `saved`, the one just written, are damaged ones that a resumed run has passed over: they count for
    nothing, and are written anew when the run gets there.

    Args:
        found: names of all checkpoints.
        good: those of them that are good.
        saved: the one just written.
        keep_last: how many of the newest stay.
        keep: names of others that stay.
    """
    stay = {*sorted(name for name in good if name <= saved)[-keep_last:], *keep}
    return [name for name in found if name not in stay and name < saved]
