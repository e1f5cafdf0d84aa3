"""Folders at URLs (`s3://`, `gs://`, whatever fsspec knows), each with a copy on this machine. A leaf.

    s3://bucket/runs/p/r_20260102-030405  <->  $RQVAE_CACHE/remote/s3/bucket/runs/p/r_20260102-030405

Programs read and write the copy, as any folder: libraries map files into memory, append to them and lock them, which no
object store has. What the copy holds is sent and fetched here, object by object. An object appears whole or not at all;
a folder does not, so the order in which its objects are written is its writer's matter.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rqvae.errors import BadInput, RunFailed
from rqvae.files import replacing

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_CONNECTIONS = 8


def is_url(place: str | Path) -> bool:
    """Whether a place is given as a URL; a `Path` never is, since it turns `s3://x` into `s3:/x`."""
    return isinstance(place, str) and _URL.fullmatch(place) is not None


def copies() -> Path:
    """The folder of all copies, `$RQVAE_CACHE/remote`; RQVAE_CACHE is ~/.cache/rqvae where it is not set."""
    return Path(os.environ.get("RQVAE_CACHE") or "~/.cache/rqvae").expanduser().absolute() / "remote"


def folder_of(url: str) -> Path:
    """Where the copy of a URL is.

    Raises:
        BadInput: a local file's URL, a chain of file systems, or a path with `.` or `..` in it.
    """
    match = _URL.fullmatch(url)
    protocol, place = match.groups() if match else ("", url)
    parts = [part for part in place.split("/") if part]
    if protocol in ("", "file", "local"):
        raise BadInput(f"{url}: expected a folder's path, or a URL of an object store such as s3://bucket/runs")
    if not parts or {".", ".."} & {*parts} or "::" in url:
        raise BadInput(f"{url}: expected a URL such as s3://bucket/runs, without . or .. or ::")
    return copies().joinpath(protocol, *parts)


def url_of(folder: Path) -> str | None:
    """The URL of which a folder is, or is in, the copy; None for a folder of this machine alone."""
    place, top = folder.resolve(), copies().resolve()
    if top not in place.parents:
        return None
    protocol, *parts = place.relative_to(top).parts
    return f"{protocol}://{'/'.join(parts)}" if parts else None


def place_of(place: str | Path) -> Path:
    """The folder to write what is to be at `place`: its copy for a URL, else itself."""
    return folder_of(str(place)) if is_url(place) else Path(place)


def absolute(place: str | Path) -> str:
    """A path or a URL, spelt so that the same one reads the same."""
    return str(place).rstrip("/") if is_url(place) else str(Path(place).resolve())


def _in_words(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def in_parallel(action: Callable[[Any], None], items: Iterable[Any]) -> None:
    """`action` of each item, several at a time: an object takes a round trip. The first error is raised."""
    with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="objects") as pool:
        for _ in pool.map(action, items):
            pass


class Store:
    """The objects below a URL, by their names relative to it.

    Keys, endpoints and proxies are the file system's own: AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, or what
    fsspec reads (`FSSPEC_S3_...`, ~/.config/fsspec). What cannot be read is BadInput, what cannot be written RunFailed.

    Args:
        url: of a folder.

    Raises:
        BadInput: a URL of a kind that fsspec does not know, or whose package is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec  # a URL alone needs it

        self.url = url.rstrip("/")
        folder_of(self.url)
        try:
            self._fs, self._root = fsspec.url_to_fs(self.url)
        except ImportError as error:
            raise BadInput(f"{url}: {_in_words(error)}; `pip install 'mae-dit[remote]'` has s3fs and gcsfs") from error
        except ValueError as error:
            raise BadInput(f"{url}: expected a URL that fsspec knows: {_in_words(error)}") from error

    @contextlib.contextmanager
    def _reading(self, name: str = "") -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  (clients of stores share no class of errors: botocore, aiohttp, google)
            raise BadInput(f"{self._named(name)}: cannot be read: {_in_words(error)}") from error

    @contextlib.contextmanager
    def _writing(self, name: str = "") -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  (as above)
            raise RunFailed(f"{self._named(name)}: cannot be written: {_in_words(error)}") from error

    def _named(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _key(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def folders(self) -> list[str]:
        """Names of what is right below the URL."""
        with self._reading():
            self._fs.invalidate_cache()
            try:
                return sorted(path.rstrip("/").rsplit("/", 1)[1] for path in self._fs.ls(self._root, detail=False))
            except FileNotFoundError:
                return []

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of every object by name, or of those whose name begins with the folder `below`."""
        with self._reading(below):
            self._fs.invalidate_cache()  # others write here too
            try:
                found = dict(self._fs.find(self._key(below) if below else self._root, detail=True))
            except FileNotFoundError:
                return {}
        start = len(self._root.rstrip("/")) + 1
        named = {path[start:]: int(info["size"]) for path, info in found.items() if info["type"] == "file"}
        # a key may hold anything; one that leads out of the copy is none of ours
        return {name: size for name, size in named.items() if name and ".." not in name.split("/")}

    def read(self, name: str) -> bytes | None:
        """An object's content; None where there is none."""
        with self._reading(name):
            try:
                return self._fs.cat_file(self._key(name))
            except FileNotFoundError:
                return None

    def age(self, name: str, than: str) -> float | None:
        """Seconds by which `name` is older than `than` by the store's own clock; None where there is no `name`."""
        with self._reading(name):
            try:
                self._fs.invalidate_cache()
                return (self._fs.modified(self._key(than)) - self._fs.modified(self._key(name))).total_seconds()
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Give an object this content."""
        with self._writing(name):
            self._fs.pipe_file(self._key(name), content)

    def send(self, file: Path, name: str) -> None:
        """Write an object from a file that does not change meanwhile."""
        with self._writing(name):
            self._fs.put_file(str(file), self._key(name))

    def fetch(self, name: str, file: Path) -> None:
        """Write a file, whole or not at all, from an object."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._reading(name), replacing(file) as temporary:
            self._fs.get_file(self._key(name), str(temporary))

    def remove(self, names: Collection[str]) -> None:
        """Remove objects; those that are not there do not count."""
        for name in names:
            with self._writing(name), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._key(name))

    def check_writable(self, what: str) -> None:
        """Raise BadInput, with `what` it is for, unless objects can be written, read and removed here."""
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.write(probe, b"")
            self.read(probe)
            self.remove([probe])
        except (BadInput, RunFailed) as error:
            raise BadInput(f"{what} {self.url}: expected a place that can be written: {error}") from error
