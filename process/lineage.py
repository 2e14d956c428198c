"""The lineage of a run: its output folder, which checkpoint it continues from, and whether that belongs to it.

A checkpoint says of its run (`identify`): the run's id and the step that it continued from, all settings, what the tensors mean
(`run`), which samples come in which order (`data`), the base checkpoint's fingerprint, and the commit of the code. A resumed run
is compared with all of that (`compare`). Later checkpoints of the branch that it leaves are set aside, never removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING

import checkpoint
from checkpoint import COMPANIONS
from common import CheckpointError, read_json, write_text
from config import OPEN, SAMPLES, Config, checked, code_commit, recipe
from distributed import Dist, launch_id, log
from export import pretrained

if TYPE_CHECKING:
    from data import Loader

# Settings that give the saved tensors their meaning. Batch size, ranks, learning rate, epochs and the like may change.
SAME = ("lora_r", "lora_alpha", "use_rslora", "use_dora", "lora_targets", "quantize", "freeze", "ema")
LAG_SEC = 120.0  # how long a shared folder may show different files to different nodes

# ---------------------------------------------------------------------------------------------------------------------
# The output folder


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
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(f"note: {output_dir}: two runs in it would not notice each other: {error}", file=sys.stderr, flush=True)
            return file
        file.seek(0)
        raise CheckpointError(f"--output_dir {output_dir}: in use by another run ({file.read() or 'unknown'})") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def locked(output_dir: Path, dist: Dist) -> contextlib.AbstractContextManager:
    """The context in which the folder is this run's. Collective. raises: CheckpointError, on all ranks; see `lock`"""
    return dist.together(lambda: lock(output_dir) if dist.is_main else contextlib.nullcontext())


def choose_resume(cfg: Config, dist: Dist) -> Path | None:
    """The checkpoint to continue from, if any. Collective.

    After a torchrun restart (--max_restarts), resume automatically, but only if this launcher started the run.

    raises: CheckpointError, on all ranks, for a folder in use without --resume, or a checkpoint that cannot be used
    """
    output_dir = Path(cfg.output_dir)
    is_restart = dist.is_restart_of(read_config(output_dir).get("launch"))
    if cfg.resume == "none" and not is_restart:
        dist.together(lambda: refuse_used(output_dir))
        return None
    is_named = cfg.resume not in ("none", "auto")
    if is_restart or not is_named:
        found = find_newest(output_dir, dist)
        if found or (is_restart and not is_named):
            return found
    if is_named:
        found = find_named(Path(cfg.resume), dist)
        dist.together(lambda: None if is_restart or is_own(found, output_dir) else refuse_used(output_dir))
        return found
    steps_done = dist.together(lambda: refuse_unsaved(output_dir, cfg.save_steps))
    if steps_done:
        log(dist, f"{output_dir}: ended after step {steps_done}, before its first checkpoint; the run begins again")
    return None


def inherit(cfg: Config, folder: Path | None) -> Config:
    """The settings with those of the run that is continued, where they are not given; ConfigError if they contradict."""
    if folder is None:
        return cfg
    run = checkpoint.read_state(folder).get("settings") or read_config(folder.resolve().parent.parent)
    kept = {name: run.get(name, 0) for name in OPEN if getattr(cfg, name) is None}
    if cfg.batch_size is None:
        kept |= {"batch_size": run.get("batch_size", SAMPLES), "max_tokens": cfg.max_tokens or run.get("max_tokens", 0)}
    return checked(dataclasses.replace(cfg, **kept))


def refuse_used(output_dir: Path) -> None:
    """CheckpointError for a folder that holds a run already."""
    if output_dir.exists() and not output_dir.is_dir():
        raise CheckpointError(f"--output_dir {output_dir}: this is a file")
    if any((output_dir / name).exists() for name in ("metrics.jsonl", "checkpoints", "final")):
        raise CheckpointError(
            f"--output_dir {output_dir}: holds a run already; choose another folder, or continue it with --resume auto"
        )


def refuse_unsaved(output_dir: Path, save_steps: int | None) -> int:
    """CheckpointError if `--resume auto` would begin again where a run has left results that it cannot continue.

    returns: the steps of a run that was killed before its first checkpoint, which may begin again
    """
    checkpoints = output_dir / "checkpoints"
    has_results = (output_dir / "final").exists() or any(checkpoints.glob("step_*")) or any(checkpoints.glob("set_aside/*"))
    steps_done, epoch = (_last(output_dir / "metrics.jsonl", name) for name in ("step", "epoch"))
    # The second checkpoint begins when the first is whole.
    if has_results or (epoch > 1 if save_steps is None else steps_done > 2 * save_steps):
        raise CheckpointError(
            f"--resume auto: {output_dir} holds a run, but no whole checkpoint to continue from; choose another folder"
        )
    return steps_done


def _last(metrics: Path, name: str) -> int:
    """The last "step" or "epoch" that a run has logged."""
    found = re.findall(rb'"%s": (\d{1,15})' % name.encode(), metrics.read_bytes()) if metrics.is_file() else []
    return max(map(int, found), default=0)


def find_newest(output_dir: Path, dist: Dist) -> Path | None:
    """The newest whole checkpoint in the folder, if any; says which newer ones are damaged. Collective.

    raises: CheckpointError, on all ranks, if ranks see different folders
    """
    deadline = time.monotonic() + LAG_SEC
    while True:
        candidates = checkpoint.list_states(output_dir / "checkpoints")[::-1]
        if len(set(map(tuple, dist.gather(candidates)))) == 1:
            break
        if dist.any(time.monotonic() > deadline):
            raise CheckpointError(
                f"--output_dir {output_dir}: ranks see different checkpoints; all nodes have to share this folder"
            )
        time.sleep(1)
    for folder in candidates:
        damage = _find_damage(folder, dist)
        if not damage:
            return folder
        log(dist, f"passed over {folder}: {damage}")
    return None


def find_named(folder: Path, dist: Dist) -> Path:
    """The checkpoint of that name; CheckpointError, on all ranks, if it is damaged. Collective."""
    damage = _find_damage(folder, dist)
    if damage:
        raise CheckpointError(f"--resume {folder}: {damage}")
    return folder


def _find_damage(folder: Path, dist: Dist) -> str | None:
    """`checkpoint.find_damage`; ranks share the reading. Collective."""
    mine = checkpoint.find_damage(folder, slice(dist.rank, None, dist.world_size))
    return next((found for found in dist.gather(mine) if found), None)


def is_own(folder: Path, output_dir: Path) -> bool:
    """Whether a checkpoint is one of the run in `output_dir`, or a copy of one."""
    if (output_dir / "checkpoints").resolve() in folder.resolve().parents:
        return True
    run_id = checkpoint.read_state(folder).get("run_id")
    return run_id is not None and run_id == read_config(output_dir).get("run_id")


def set_aside(output_dir: Path, step: int) -> list[Path]:
    """Move the checkpoints after `step` to checkpoints/set_aside; returns where they are now."""
    moved = []
    for old in sorted((output_dir / "checkpoints").glob("step_*")):
        number = old.name.removeprefix("step_")
        if number.isdecimal() and int(number) > step:
            aside = old.parent / "set_aside" / old.name
            names = [aside, *(aside.with_name(f"{aside.name}.{i}") for i in range(1, 1000))]
            aside = next(path for path in names if not path.exists())
            aside.parent.mkdir(exist_ok=True)
            moved.append(old.rename(aside))
    return moved


def write_config(cfg: Config, dist: Dist, **facts: object) -> dict:
    """OUTPUT/config.json: the resolved settings and what they ran with, which are returned too; and recipe.yaml. Collective."""
    packages = ("torch", "transformers", "peft", "boson-multimodal", "safetensors", "numpy")
    record = dataclasses.asdict(cfg) | {
        "lr": cfg.peak_lr,
        **facts,
        "world_size": dist.world_size,
        "device": dist.device.type,
        "git_commit": code_commit(),
        "versions": {name: version(name) for name in packages},
        "launch": launch_id(),
    }
    if dist.is_main:
        write_text(Path(cfg.output_dir) / "config.json", json.dumps(record, indent=2) + "\n")
        write_text(Path(cfg.output_dir) / "recipe.yaml", recipe(cfg))
    return record


def read_config(output_dir: Path) -> dict:
    """OUTPUT/config.json, {} if there is none."""
    try:
        return dict(read_json(output_dir / "config.json"))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# What belongs together


def identify(cfg: Config, loader: Loader, val_loader: Loader | None, base: Path, dist: Dist) -> dict:
    """What checkpoints of this run say about it. Collective.

    raises: CheckpointError, on all ranks, if they see different base checkpoints
    """
    prints = dist.gather(pretrained.fingerprint(base))
    if len(set(prints)) > 1:
        raise CheckpointError(f"--base_ckpt {cfg.base_ckpt}: rank {_first_other(prints)} has other weights there than rank 0")
    lengths = loader.batching.lengths
    return {
        "run": {name: getattr(cfg, name) for name in SAME},
        "data": {
            "seed": cfg.seed,
            "max_tokens": cfg.max_tokens,
            "long": cfg.long,
            "training_samples": loader.num_samples,
            "weights": loader.weights,
            "records": loader.dataset.records.digest,
            "lengths": lengths is not None and hashlib.sha256(lengths.tobytes()).hexdigest(),
        },
        "validation": val_loader and val_loader.dataset.records.digest,
        "base": {"name": cfg.base_ckpt, "folder": str(base.resolve()), "fingerprint": prints[0]},
        "code": code_commit(),
    }


def _first_other(values: list) -> int:
    return next(index for index, value in enumerate(values) if value != values[0])


DIGESTS = {
    "records": "the training records have changed, or are in another order",
    "lengths": "the records' lengths have changed (by another tokenizer, codec or --long)",
}


def compare(folder: Path, now: dict, allow: bool) -> tuple[dict, list[str]]:
    """Compare a checkpoint with the run that is to continue it; see `identify` for `now`.

    allow:   take other data or another base, as long as the tensors fit; the epoch then begins again
    returns: the checkpoint's state, and what is worth saying
    raises:  CheckpointError
    """
    kept = checkpoint.read_state(folder)
    try:
        then = {**kept.get("run", {}), **kept.get("data", {})}  # format 1 has no "data"
        base = {"name": "unknown", **kept.get("base", now["base"])}
        epoch, _ = map(int, kept["position"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"--resume {folder}: its state.json does not describe a run: {error!r}") from None
    run = [_change(name, then[name], value) for name, value in now["run"].items() if then.get(name, value) != value]
    if run:
        raise CheckpointError(f"--resume {folder}: this is not the same run: {', '.join(run)}")
    data = [_change(name, then[name], value) for name, value in now["data"].items() if then.get(name, value) != value]
    changes = data + [f"the base checkpoint {now['base']['name']} is not that of the run, {base['name']}"] * (
        base.get("fingerprint") != now["base"]["fingerprint"]
    )
    if changes and not allow:
        raise CheckpointError(
            f"--resume {folder}: this is not the same run: {', '.join(changes)}. With --resume_changed it is continued all the "
            "same"
        )
    notes = [f"continued with changes: {', '.join(changes)}"] if changes else []
    if data:
        kept |= {"position": [epoch, 0], "best": {}, "samples": {}}
        notes.append(f"epoch {epoch + 1} begins again, with the data as it is now")
    if kept.get("validation", now["validation"]) != now["validation"]:
        kept |= {"best": {}, "samples": {}}
        notes.append("the validation records have changed: the best evaluation so far does not count")
    if "format" not in kept:
        notes.append("saved by an earlier version, which noted neither records nor base: whether they are the same is unknown")
    elif kept.get("code") != now["code"]:
        notes.append(f"saved by the code at commit {kept.get('code')}, continued at commit {now['code']}")
    return kept, notes


def _change(name: str, then: object, now: object) -> str:
    return DIGESTS.get(name, f"{name} was {then!r} and is {now!r}")


def ancestry(folder: Path | None, kept: dict, output_dir: Path) -> dict:
    """The id of the run, and the step that it continues: {"run_id": ..., "parent": {"run_id": ..., "step": ...} or None}."""
    if folder is None:
        return {"run_id": uuid.uuid4().hex, "parent": None}
    parent = {"run_id": kept.get("run_id"), "step": kept["step"]}
    run_id = kept.get("run_id") if is_own(folder, output_dir) else None
    return {"run_id": run_id or uuid.uuid4().hex, "parent": parent}


def prepare_folder(output_dir: Path, base: Path) -> None:
    """Copy the base's configuration and tokenizer into OUTPUT: each checkpoint and the end of the run need them.

    raises: CheckpointError if the folder cannot be written
    """
    temporary = output_dir / f".{COMPANIONS}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for path in base.iterdir():
            if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json") and path.is_file():
                shutil.copyfile(path, temporary / path.name)
        shutil.rmtree(output_dir / COMPANIONS, ignore_errors=True)
        os.replace(temporary, output_dir / COMPANIONS)
    except OSError as error:
        raise CheckpointError(f"--output_dir {output_dir}: cannot be written: {error}") from None
