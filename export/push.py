"""A finished model on the Hugging Face Hub: only the files of its folder, with the user's own token."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token

from common import CheckpointError, ConfigError, reason
from export.read import Adapter, Full


def check(name: str, model: Full | Adapter, is_merged: bool) -> None:
    """ConfigError, before anything is written, for what cannot be pushed or what others could not load."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(f"--push {name}: expected OWNER/NAME, your name on the Hub and the model's")
    if isinstance(model, Adapter) and not is_merged and (not model.base or Path(model.base).is_dir()):
        raise ConfigError(
            f"--push {name}: others do not have this adapter's base, {model.base or 'unknown'}; add --layout boson to merge it"
        )
    if not get_token():
        raise ConfigError(
            f"--push {name}: no token; make one that may write (huggingface.co/settings/tokens), then HF_TOKEN=... bash launch.sh"
        )


def push(folder: Path, name: str, is_private: bool) -> None:
    """Says what becomes public and how large it is, then uploads the folder's files; CheckpointError if the Hub refuses."""
    api, files = HfApi(), sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    readers = "those who may read this private repository" if is_private else "everyone"
    listed = ", ".join(str(path.relative_to(folder)) for path in files)
    print(f"{api.endpoint}/{name} will show {readers} {len(files)} files, {size / 1e9:.3g} GB: {listed}", flush=True)
    try:
        api.create_repo(name, private=is_private, exist_ok=True)
        if is_private and not api.model_info(name).private:
            raise ValueError("this repository is public already")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="A model of the Higgs Audio v2 trainer")
    except Exception as error:  # the Hub client has many: offline, no access, a name that is taken
        again = f"{folder} is whole; try again: hf upload {name} {folder}"
        raise CheckpointError(f"--push {name}: {api.endpoint} did not take it: {reason(error)}; {again}") from None
    print(f"pushed: {api.endpoint}/{name}")
