"""Where a model is: a folder, a name that the package ships, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rqvae import remote, shipped
from rqvae.errors import BadInput
from rqvae.trainers.fetching import fetched

# What an exported model consists of; pickled weights beside them are neither fetched nor read.
PATTERNS = ("config.json", "README.md", "*.safetensors", "*/config.json", "*/*.safetensors", "*.safetensors.index.json")
_HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")


def find(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a model.

    Args:
        source: a URL that fsspec knows, a folder, a name of `rqvae.shipped`, or a hub id `owner/name`, looked for in
            this order. A `Path` is a folder only.
        revision: branch, tag or commit of a hub id.

    Raises:
        BadInput: none of the three; a hub that cannot be reached or refuses.
    """
    if remote.is_url(source):
        return fetched(source)
    text = os.fspath(source)
    folder = Path(text).expanduser()
    if folder.exists():
        return folder
    if isinstance(source, str) and text in shipped.names():
        return shipped.folder(text)
    if isinstance(source, Path) or not _HUB_ID.fullmatch(text) or text.startswith("."):
        known = ", ".join(shipped.names()) or "none in this version"
        raise BadInput(
            f"{text}: expected a run or exported folder, a shipped name ({known}) or a hub id owner/name, "
            "found no such folder"
        )
    return download(text, revision)


def check_hub_id(hub_id: str) -> None:
    """Raise BadInput unless the text has the form `owner/name`."""
    if not _HUB_ID.fullmatch(hub_id):
        raise BadInput(f"hub id: expected owner/name, got {hub_id!r}")


def download(hub_id: str, revision: str | None = None) -> Path:
    """The local snapshot of a hub repository; cache (HF_HOME), token (HF_TOKEN) and offline mode are the hub's own.

    Raises:
        BadInput: one line that says what to do.
    """
    from huggingface_hub import snapshot_download  # a second that a local folder need not wait

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(PATTERNS)))
    # Releases below 1 pass on the errors of requests, later ones those of httpx; they share no base class.
    except Exception as error:
        by_hand = "or download it by hand and give the folder's path"
        if _refused(error):
            raise BadInput(
                f"{hub_id}: no such folder here, and the hub has no such repository for this token (not found, "
                f"private or gated): check the name, accept its terms and set HF_TOKEN, {by_hand}"
            ) from error
        raise BadInput(
            f"{hub_id}: no such folder here, and the Hugging Face hub could not be reached ({type(error).__name__}): "
            f"connect once with HF_HUB_OFFLINE unset, {by_hand}"
        ) from error


def upload(folder: Path, hub_id: str, private: bool | None = None) -> str:
    """Put a folder into a hub repository, which is made where there is none; returns its address.

    Args:
        folder: an exported model.
        hub_id: `owner/name`.
        private: of a new repository; None is the owner's default.

    Raises:
        BadInput: one line that says what to do; the folder stays.
    """
    check_hub_id(hub_id)
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(hub_id, repo_type="model", private=private, exist_ok=True))
        api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Upload of an exported model")
    except Exception as error:
        if _refused(error):
            raise BadInput(f"{hub_id}: the hub refused: set HF_TOKEN to a token that may write there") from error
        raise BadInput(
            f"{hub_id}: not uploaded to the Hugging Face hub ({type(error).__name__}): connect with HF_HUB_OFFLINE "
            "unset and push again"
        ) from error
    return address


def _refused(error: Exception) -> bool:
    """Whether the hub answered, and said no."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, RepositoryNotFoundError | GatedRepoError) or status in (401, 403, 404)
