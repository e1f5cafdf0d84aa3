"""The door to Hugging Face's `datasets`: imported when asked for, and its errors in one line that says what to do."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from rqvae.errors import BadInput

T = TypeVar("T")
_INSTALL = "pip install 'datasets>=2.20,<5'"


def library() -> Any:
    """The package `datasets`.

    Raises:
        BadInput: it is not installed, or a folder of that name in the current one stands before it.
    """
    try:
        package = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise BadInput(f"data.dataset: expected the package datasets, got none ({error}): {_INSTALL}") from error
    if not hasattr(package, "load_dataset"):
        place = next(iter(getattr(package, "__path__", [])), "?")
        raise BadInput(f"data.dataset: expected the package datasets, got {place}; rename that folder, or {_INSTALL}")
    # A line for every request: they hold signed addresses, which are secrets for an hour.
    for name in ("httpx", "urllib3", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return package


def ask(name: str, action: Callable[[], T]) -> T:
    """`action()`, which may ask the hub for the dataset `name`.

    Raises:
        BadInput: it cannot be had; says why and what to do, and never holds the token.
    """
    try:
        return action()
    except BadInput:
        raise
    except Exception as error:  # what is raised is that of httpx, requests, fsspec or pyarrow, by version
        raise BadInput(f"data.dataset: {name}: {_advice(name, error)}") from None


def _advice(name: str, error: Exception) -> str:
    chain = list(_chain(error))
    kinds = {base.__name__ for e in chain for base in type(e).__mro__}
    status = next((s for e in chain if (s := getattr(getattr(e, "response", None), "status_code", None))), None)
    words = " ".join(str(error).split())
    refused = f"the hub refuses it ({status})" if status else "the hub refuses it"
    token = "the token has no access to it" if _token() else "set HF_TOKEN (or hf auth login)"
    if "GatedRepoError" in kinds or status == 403 or re.search(r"\bgated\b", words.lower()):
        return f"{refused}: accept its terms at https://huggingface.co/datasets/{name} while logged in; {token}"
    if status == 401:
        return f"{refused}: it is private, or has another name; {token}"
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"} or status == 404:
        return f"no such dataset on the hub, or a private one: check the name; if private, {token}"
    if (
        kinds & {"ConnectionError", "TransportError", "OfflineModeIsEnabled", "TimeoutException"}
        or (status or 0) >= 500
    ):
        return (
            f"the hub cannot be reached ({type(error).__name__}): check the network, or fetch it elsewhere with "
            f"hf download --repo-type dataset {name} --local-dir DIR and give dataset_name: DIR"
        )
    return f"{type(error).__name__}: {_without_token(words)[:300]}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _token() -> str | None:
    """The one that the library would send: of HF_TOKEN, or of a login."""
    from huggingface_hub import get_token

    return get_token()


def _without_token(words: str) -> str:
    """A library's words, in which a token could stand, without the one that is set."""
    token = _token()
    return words.replace(token, "***") if token else words
