"""What is asked of the Hugging Face hub: what was fetched once is found without it, a refusal is told in a sentence."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from besa.machine.processes import rank

WAITS = (1, 2, 4)
"""Seconds between the tries where the hub is busy."""
_BUSY = (408, 429, 500, 502, 503, 504)
_LOG_IN = "log in by `hf auth login` or $HF_TOKEN"
_REASONS: dict[type[Exception], str] = {
    OfflineModeIsEnabled: "$HF_HUB_OFFLINE is set, and not all of it is in the cache; fetch it once without",
    GatedRepoError: f"it is gated; ask for access at {{page}}, and {_LOG_IN}",
    RepositoryNotFoundError: f"there is no {{page}}, or it is private; correct the name, or {_LOG_IN}",
    RevisionNotFoundError: "{page} has no such revision any more",
    EntryNotFoundError: "{page} lacks a file of it",
    HFValidationError: "{name!r} is no hub id; correct the name",
}
"""From special to general, with the way out."""


class Refused(Exception):
    """The hub did not deliver; its text says why, and what to do."""


class Late(tqdm):
    """A bar of what takes longer than a second, on one rank."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"delay": 1} | options | ({"disable": True} if rank() else {}))


def fetch(ask: Callable[..., str], name: str, *arguments: str, waits: tuple[int, ...] = WAITS, **options: Any) -> Path:
    """The files that a function of huggingface_hub delivers of a repository; asked again while the hub is busy.

    Args:
        waits: fewer for a function that asks again by itself.

    Raises:
        Refused: it delivers nothing, and not all is in its cache.
    """
    try:
        return Path(ask(name, *arguments, **options))
    except Exception as error:  # its transport, a disk, ... raise many kinds; each means that nothing came
        cause = _cause(error)
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if not waits or status not in _BUSY:
            raise Refused(f"the hub did not deliver it: {_reason(cause, name, status, options)}") from error
    time.sleep(waits[0])
    return fetch(ask, name, *arguments, waits=waits[1:], **options)


def _cause(error: BaseException) -> BaseException:
    """What made huggingface_hub look into its cache, in vain."""
    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error


def _reason(cause: BaseException, name: str, status: int | None, options: dict[str, Any]) -> str:
    """What happened, and the way out."""
    page = "/".join([constants.ENDPOINT, *["datasets"] * (options.get("repo_type") == "dataset"), name])
    for kind, reason in _REASONS.items():
        if isinstance(cause, kind) or (status in (401, 403) and kind is RepositoryNotFoundError):
            return reason.format(page=page, name=name)
    if status in _BUSY:
        return f"{constants.ENDPOINT} is busy (status {status}); try again later"
    said = ": ".join([type(cause).__name__, *str(cause).splitlines()[:1]])
    return f"{said} ({page}); the same call again continues"
