"""The output folder of a run: who uses it, and which checkpoint a run continues from."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

import checkpoint
from common import CheckpointError, read_json
from config import Config
from distributed import Dist, log


def lock(output_dir: Path) -> IO:
    """Keep other runs out of the folder while the returned file is open; the lock ends with the process.

    raises: CheckpointError if another run holds it, or it cannot be written
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = open(output_dir / ".lock", "a+")
    except OSError as error:
        raise CheckpointError(f"--output_dir {output_dir}: cannot be written: {error}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: the loader's workers would inherit that
    except OSError:
        file.seek(0)
        raise CheckpointError(f"--output_dir {output_dir}: in use by another run ({file.read() or 'unknown'})") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def choose_resume(cfg: Config, dist: Dist) -> Path | None:
    """The checkpoint to continue from, if any. Collective.

    After a torchrun restart (--max_restarts), resume automatically, but only if this launcher started the run.

    raises: CheckpointError, on all ranks, for a folder in use without --resume, or a checkpoint that cannot be used
    """
    output_dir = Path(cfg.output_dir)
    is_restart = dist.is_restart_of(read_launch(output_dir))
    if cfg.resume == "none" and not is_restart:
        dist.together(lambda: refuse_used(output_dir))
        return None
    found, passed_over = find_resume(output_dir, "auto" if is_restart else cfg.resume, dist)
    for damage in passed_over:
        log(dist, f"passed over {damage}")
    if is_restart and not found and cfg.resume not in ("none", "auto"):
        found, _ = find_resume(output_dir, cfg.resume, dist)
    return found


def refuse_used(output_dir: Path) -> None:
    """CheckpointError for a folder that holds a run already."""
    if output_dir.exists() and not output_dir.is_dir():
        raise CheckpointError(f"--output_dir {output_dir}: this is a file")
    if any((output_dir / name).exists() for name in ("metrics.jsonl", "checkpoints", "final")):
        raise CheckpointError(
            f"--output_dir {output_dir}: holds a run already; choose another folder, or continue it with --resume auto"
        )


def find_resume(output_dir: Path, resume: str, dist: Dist) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from: the one named, or with "auto" the newest whole one. Collective.

    returns: the checkpoint, if any, and what is wrong with the newer ones that were passed over
    raises:  CheckpointError, on all ranks, if the named checkpoint is damaged or ranks see different folders
    """
    named = resume != "auto"
    candidates = [Path(resume)] if named else checkpoint.list_states(output_dir / "checkpoints")[::-1]
    if len(set(map(tuple, dist.gather(candidates)))) > 1:
        raise CheckpointError(
            f"--output_dir {output_dir}: ranks see different checkpoints; all nodes have to share this folder"
        )
    passed_over = []
    share = slice(dist.rank, None, dist.world_size)
    for folder in candidates:
        damage = next((found for found in dist.gather(checkpoint.find_damage(folder, share)) if found), None)
        if damage and named:
            raise CheckpointError(f"--resume {folder}: {damage}")
        if not damage:
            return folder, passed_over
        passed_over.append(f"{folder}: {damage}")
    return None, passed_over


def read_launch(output_dir: Path) -> str | None:
    """The id of the launcher that started the run in this folder, by its config.json."""
    try:
        return read_json(output_dir / "config.json").get("launch")
    except (OSError, ValueError):
        return None
