"""Repositories of the Hugging Face Hub: their folder on this machine, or the reason why there is none and the remedy."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import requests
from huggingface_hub import HfApi, constants, errors, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import filter_repo_objects

from common import UserError, reason


class HubError(UserError):
    """A repository that cannot be had."""


def fetch(name: str, revision: str | None = None, patterns: list[str] | None = None, repo_type: str = "model") -> Path:
    """The folder of a repository, downloaded where it is not on this machine yet; says how much that is.

    patterns: of the files that are needed; None for all
    raises: HubError
    """
    try:
        info = HfApi().repo_info(name, revision=revision, repo_type=repo_type, files_metadata=True)
    except Exception as error:  # the client has many: of its own, of requests, of the system
        try:
            return Path(snapshot_download(name, revision=revision, repo_type=repo_type, local_files_only=True))
        except (OSError, ValueError):
            raise HubError(explain(error, name, revision, repo_type)) from None
    wanted = filter_repo_objects(info.siblings or (), allow_patterns=patterns, key=lambda file: file.rfilename)
    files = {file.rfilename: file.size or 0 for file in wanted}
    missing = [
        file
        for file in files
        if not isinstance(try_to_load_from_cache(name, file, revision=info.sha, repo_type=repo_type), str)
    ]
    size, cache = sum(files[file] for file in missing), Path(constants.HF_HUB_CACHE)
    if size:
        print(
            f"fetching {name}: {size / 1e9:.1f} GB from {constants.ENDPOINT} into {cache} (HF_HOME names another place)",
            file=sys.stderr,
        )
    if size > (free := shutil.disk_usage(_existing(cache)).free):
        room = f"{size / 1e9:.1f} GB to fetch, but {free / 1e9:.1f} GB free in {cache}"
        raise HubError(f"{name}: {room}; make room, or name a folder on another disk with HF_HOME=")
    try:
        return Path(snapshot_download(name, revision=revision, repo_type=repo_type, allow_patterns=patterns))
    except Exception as error:
        raise HubError(
            f"{explain(error, name, revision, repo_type)}; the same command goes on where the download stopped"
        ) from None


def why_not(name: str) -> str:
    """Why the Hub does not give a model, "" where it does or where the name is of a folder."""
    if Path(name).exists():
        return ""
    try:
        HfApi().repo_info(name)
    except Exception as error:
        return explain(error, name)
    return ""


def explain(error: Exception, name: str, revision: str | None = None, repo_type: str = "model") -> str:
    """What kept a repository from being fetched, and the remedy; gated and missing ones are kinds of the same error."""
    status = error.response.status_code if isinstance(error, requests.HTTPError) and error.response is not None else 0
    empty = f"{constants.HF_HUB_CACHE} holds no copy"
    page = f"{constants.ENDPOINT}/{'datasets/' * (repo_type == 'dataset')}{name}"
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return f"{name}: HF_HUB_OFFLINE is set and {empty}; unset it, or name another cache with HF_HOME="
    if isinstance(error, errors.HFValidationError):
        return f"{name}: neither a folder nor a repository (OWNER/NAME)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: the repository has no revision {revision}"
    if isinstance(error, errors.GatedRepoError):
        who = "and wait: your account is not let in" if huggingface_hub.get_token() else "then HF_TOKEN=, or `hf auth login`"
        return f"{name}: the repository is gated; accept its terms on {page}, {who}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name}: no such repository on {constants.ENDPOINT}; check the name (a private one needs HF_TOKEN=)"
    if status in (401, 403):
        token = "HF_TOKEN" if os.environ.get("HF_TOKEN") else constants.HF_TOKEN_PATH
        return f"{name}: the Hub refuses the token of {token} (status {status}); `hf auth login` makes another"
    if status:
        return f"{name}: the Hub answers with status {status}; try again later, or another mirror with HF_ENDPOINT="
    if isinstance(error, (requests.RequestException, errors.LocalEntryNotFoundError)):
        return f"{name}: no connection to {constants.ENDPOINT}, and {empty}; HF_ENDPOINT= names a mirror, HF_HOME= a folder with a copy"
    return f"{name}: {reason(error)}"


def _existing(folder: Path) -> Path:
    """The folder, or the closest one above it that exists."""
    return next(path for path in (folder, *folder.resolve().parents) if path.exists())
