"""Files of weights: those that others publish, fetched once, checked by sha256 and read without running code, and our
own. A leaf."""

from __future__ import annotations

import os
import pickle
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.files import file_sha256

_HASHED = re.compile(r"-([0-9a-f]{8,64})\.pth$")


@dataclass(frozen=True)
class WeightFile:
    """A state dict on the disk, or at a URL and then in `torch.hub.get_dir()`/checkpoints.

    A name that ends in -HEX.pth is checked against the file's sha256, which must begin with HEX.

    Args:
        key: what errors call it, as a config key.
        source: a path, or a URL whose name ends in -HEX.pth.
        published: the URL that an error names where the file is missing.
        remedy: the end of the sentence "download it to there, ...", how to do without.
    """

    key: str
    source: str
    published: str
    remedy: str

    @property
    def url(self) -> str | None:
        """Where it is fetched from, or None for a path."""
        return self.source if self.source.startswith(("http://", "https://")) else None

    @property
    def path(self) -> Path:
        """Where it lies, or will lie once it is fetched."""
        if self.url is None:
            return Path(self.source)
        return Path(torch.hub.get_dir(), "checkpoints", self.url.rsplit("/", 1)[1])

    def fetch(self) -> None:
        """Download it where it is not on the disk yet; on one process of a host, before `read`.

        Raises:
            BadInput: the URL cannot be reached, or gives another file than its name says.
        """
        url, path = self.url, self.path
        if path.is_file() or url is None:
            return
        stated = _HASHED.search(path.name)
        if stated is None:
            raise BadInput(f"{self.key}: {url}: expected a name that ends in -SHA256.pth")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=stated[1])
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
            reason = str(error).partition("\n")[0]
            raise BadInput(
                f"{self.key}: {path}: no such file, and {url} (sha256 {stated[1]}...) cannot be had ({reason}); "
                f"place it there, {self.remedy}"
            ) from error

    def read(self) -> dict[str, Tensor]:
        """Its tensors by name, on the host.

        Raises:
            BadInput: a missing or unreadable file, or one whose sha256 is not that of its name.
        """
        path = self.path
        stated = _HASHED.search(path.name)
        if not path.is_file():
            digest = f" (sha256 {stated[1]}...)" if stated else ""
            raise BadInput(f"{self.key}: {path}: no such file; download {self.published}{digest} to it, {self.remedy}")
        if stated and not (digest := file_sha256(path)).startswith(stated[1]):
            raise BadInput(
                f"{self.key}: {path}: expected sha256 {stated[1]}..., got {digest[:16]}...; "
                f"download {self.published} again, {self.remedy}"
            )
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise BadInput(f"{self.key}: {path}: expected a state dict of tensors: {reason}") from error
        if not isinstance(state, dict):
            raise BadInput(f"{self.key}: {path}: expected a state dict of tensors, got {type(state).__name__}")
        return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any other new file.

    `safetensors` 0.8 writes to a temporary file first, which only its owner may read, and leaves it so: nobody else on
    a cluster could load a checkpoint.

    Args:
        tensors: contiguous, on the host, no two of them sharing memory.
        path: where to; an existing file is replaced.
        metadata: for the file's header.

    Raises:
        OSError: it cannot be written; a full disk has its number.
        SafetensorError: tensors that the format does not take.
    """
    probe = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.partial")
    try:
        probe.touch()
        mode = probe.stat().st_mode
    finally:
        probe.unlink(missing_ok=True)
    try:
        save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        number = int(found[1])  # of the operating system, which the library gives as text
        raise OSError(number, os.strerror(number), str(path)) from error
    path.chmod(mode)
