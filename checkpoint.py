"""The training state in and out: OUTPUT/checkpoints/step_N, safetensors and JSON only.

Each rank writes the rows it owns while training goes on. A checkpoint gets its name only when it is whole, and loads on any
number of ranks.

    python checkpoint.py OUTPUT      # the training checkpoints of a run, and whether they are whole
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common import CheckpointError, read_json, sha256_of, write_text
from distributed import gather, own_rows
from export import pretrained
from export.pretrained import DCP_PIECES, STATE_FILE
from process.command import says_errors

FORMAT = 2  # of training checkpoints; 1 had no "format", no lineage, no checksum of state.json and no base/
COMPANIONS = "base"  # folder in a checkpoint and in OUTPUT: the base's files beside its weights


class Saver:
    """Writes training states while training goes on; keeps the newest ones and the best.

    `start` copies this rank's rows to the host and returns; one thread per rank writes them. `commit` gives the checkpoint its
    name once every rank has written its part, or removes it if one of them failed. The threads take part in no collective.

    Until it is committed, a checkpoint costs each rank host memory for its rows of what trains: 12 bytes a parameter
    (master weight and two moments), divided by the number of ranks.

    folder:    OUTPUT/checkpoints
    keep_last: checkpoints to keep; 0: all
    identity:  what each checkpoint says about its run; see process/lineage.py
    """

    def __init__(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, keep_last: int = 0, identity: dict | None = None
    ):
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self.keep_last = keep_last
        self.identity = identity or {}
        self.newest: Path | None = None  # the last one started
        self._thread = ThreadPoolExecutor(1, "save")
        self._state: dict = {}
        self._written: Future[dict] | None = None

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing its part."""
        return self._written is not None and not self._written.done()

    def start(self, state: dict) -> None:
        """Begin a checkpoint of what trains and of `state` (JSON), which has at least a "step". Collective.

        An earlier one is committed first. Random numbers need no saving: train.py derives them from (seed, step, micro-batch).

        raises: CheckpointError if the disk is too small or the earlier one failed; other checkpoints are untouched then
        """
        self.commit()
        folder = self.folder / f"step_{state['step']}"
        rows, offsets = _copy_own_rows(_training_tensors(self.model, self.optimizer))
        _start_writing(_unfinished(folder), sum(tensor.nbytes for tensor in rows.values()))
        self._state, self.newest = state, folder
        self._written = self._thread.submit(self._write, _unfinished(folder), rows, offsets)

    def commit(self) -> Path | None:
        """Wait for the checkpoint that is being written, if any, and give it its name, which is returned. Collective.

        raises: CheckpointError if the disk is full or fails; earlier checkpoints are untouched then
        """
        if self._written is None:
            return None
        written, self._written = self._written, None
        error, own = None, {}
        try:
            own = written.result()
        except (OSError, SafetensorError) as caught:
            error = str(caught)
        errors, parts = zip(*gather((error, own)))
        files = {name: description for part in parts for name, description in part.items()}
        error = next(filter(None, errors), None) or _on_main(lambda: self._finish(files))
        if error:
            _on_main(lambda: shutil.rmtree(_unfinished(self.newest), ignore_errors=True))
            raise CheckpointError(f"{self.newest}: cannot be written ({error}); earlier checkpoints are untouched")
        return self.newest

    def amend(self, state: dict) -> None:
        """Note in the newest checkpoint, which has been committed, what is known by now; if there is one. Collective."""
        if self.newest is None:
            return

        def write() -> None:
            self._state = state
            self._write_state(self.newest, state | {"files": read_state(self.newest)["files"]})
            self._remove_old()  # the best may be another one now

        error = _on_main(write)
        if error:
            raise CheckpointError(f"{self.newest}: cannot be written ({error})")

    def discard(self) -> None:
        """Remove the newest checkpoint."""
        if self.newest and dist.get_rank() == 0:
            shutil.rmtree(self.newest, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # if it is empty

    def _write(self, folder: Path, rows: dict[str, Tensor], offsets: dict[str, list[int]]) -> dict[str, dict]:
        """This rank's files, and from rank 0 the base's companions, which make the checkpoint complete by itself."""
        files = _write_rows(folder, rows, offsets)
        companions = self.folder.parent / COMPANIONS
        if dist.get_rank() == 0 and companions.is_dir():
            shutil.copytree(companions, folder / COMPANIONS)
            files |= {f"{COMPANIONS}/{path.name}": _describe(path) for path in (folder / COMPANIONS).iterdir()}
        return files

    def _finish(self, files: dict[str, dict]) -> None:
        """The last file, then the name; then remove what is not to be kept."""
        temporary = _unfinished(self.newest)
        self._write_state(temporary, self._state | {"files": files})
        shutil.rmtree(self.newest, ignore_errors=True)
        os.replace(temporary, self.newest)
        _fsync(self.folder)
        self._remove_old()

    def _write_state(self, folder: Path, state: dict) -> None:
        state = json.loads(json.dumps(state | self.identity | {"format": FORMAT}))  # as it will be read
        write_text(folder / STATE_FILE, json.dumps(state | {"sha256": _checksum(state)}, indent=2))
        _fsync(folder / STATE_FILE)

    def _remove_old(self) -> None:
        """Keep the newest whole checkpoints and the best; damaged ones do not count, and go with the old ones."""
        if not self.keep_last:
            return
        whole = [state for state in list_states(self.folder) if not find_damage(state, sizes_only=True)]
        best = self.folder / f"step_{(self._state.get('best') or {}).get('step')}"
        for old in set(list_states(self.folder)) - {*whole[-self.keep_last :], self.newest, best}:
            try:
                os.replace(old, _unfinished(old))  # no half checkpoint, should the run be killed now
                shutil.rmtree(_unfinished(old))
            except OSError as error:
                print(f"warning: {old}: cannot be removed: {error}", file=sys.stderr, flush=True)


def _unfinished(folder: Path) -> Path:
    """The name of a checkpoint while it is not whole."""
    return folder.with_name(f".{folder.name}.tmp")


def _copy_own_rows(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Copies on the host of the rows that this rank writes, and their offsets in the whole tensor.

    Rows that several ranks hold are written by the first of them.
    """
    rows, offsets = {}, {}
    for name, tensor in tensors.items():
        local = own_rows(tensor)
        if isinstance(tensor, DTensor):
            (chunk,) = tensor.__create_chunk_list__()  # what DCP asks a tensor for
            where = zip(tensor.placements, tensor.device_mesh.get_coordinate())
            is_mine = local.numel() > 0 and all(index == 0 for placement, index in where if placement.is_replicate())
            offset = list(chunk.offsets)
        else:
            is_mine, offset = dist.get_rank() == 0, [0] * local.ndim
        if is_mine:
            copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            rows[name], offsets[name] = copy.copy_(local, non_blocking=True), offset
    if any(own_rows(tensor).is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return rows, offsets


def _write_rows(folder: Path, rows: dict[str, Tensor], offsets: dict[str, list[int]]) -> dict[str, dict]:
    """Write this rank's file, in the form `dcp.HuggingFaceStorageReader` reads; returns its size and hash by its name.

    Not `dcp.HuggingFaceStorageWriter`: it first copies all rows into one bytes object under Python's lock, and no step runs
    meanwhile (1.2 s per 400 MB). `save_file` writes them from where they are.
    """
    path = folder / f"shard-{dist.get_rank() + 1:05d}-of-{dist.get_world_size():05d}.safetensors"
    pieces = {name: {"saved_offsets": offset} for name, offset in offsets.items()}
    pretrained.save_tensors(rows, path, metadata={DCP_PIECES: json.dumps(pieces), "DCP_VERSION": "1.0", "format": "pt"})
    return {path.name: _describe(path)}


def _on_main(work: Callable[[], object]) -> str | None:
    """Let rank 0 do something on the disk; returns on every rank what failed, if it did. Collective."""
    error = None
    if dist.get_rank() == 0:
        try:
            work()
        except (OSError, CheckpointError) as caught:
            error = str(caught)
    return gather(error)[0]


def _start_writing(temporary: Path, num_bytes: int) -> None:
    """Make an empty folder, if the disk has room for every rank's `num_bytes`. Collective."""
    total = sum(gather(num_bytes))

    def make() -> None:
        for left in temporary.parent.glob(".step_*.tmp"):  # of runs that were killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(temporary.parent).free
        if free < total:
            raise CheckpointError(f"{total / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free")
        temporary.mkdir()

    error = _on_main(make)
    if error:
        raise CheckpointError(f"{temporary.parent}: no checkpoint can be written: {error}; earlier ones are untouched")


def _describe(path: Path) -> dict:
    """A file's size and sha256, after it has reached the disk."""
    _fsync(path)
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": sha256_of(file).hex()}


def find_damage(folder: Path, part: slice = slice(None), sizes_only: bool = False) -> str | None:
    """What is wrong with a checkpoint's files, or None.

    part:       of the files, so that ranks can share the reading
    sizes_only: do not read their content
    """
    try:
        files = read_state(folder)["files"]
    except CheckpointError as error:
        return str(error)
    for path in (*folder.glob("*.safetensors"), *folder.glob("state*.json")):
        if path.name not in files and path.name != STATE_FILE:
            return f"{path.name} is not part of this checkpoint; move it away"
    for name, expected in list(files.items())[part]:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if not sizes_only and _describe(path)["sha256"] != expected["sha256"]:
            return f"{name} has changed (its sha256 differs)"
    return None if files else "it lists no files"


def check_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """CheckpointError unless the checkpoint has the very tensors that train."""
    read_state(folder)  # damaged, or of a later version?
    targets, stored = _training_tensors(model, optimizer), pretrained.Stored(folder).shapes
    different = sorted(targets.keys() ^ stored.keys())
    if different:
        raise CheckpointError(f"--resume {folder}: {len(different)} tensors are not the same, first {different[0]}")
    pretrained.check_shapes(folder, targets, stored)


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore what a `Saver` wrote, on any number of ranks. Collective; `check_state` first."""
    pretrained.load(_training_tensors(model, optimizer), folder)


def read_state(folder: Path) -> dict:
    """What a training checkpoint says about itself; CheckpointError if that is missing, damaged or of a later version."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    try:
        state = read_json(folder / STATE_FILE)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not a whole training checkpoint: {error}") from None
    version = state.get("format", 1) if isinstance(state, dict) else None
    if not isinstance(version, int) or not isinstance(state.get("step"), int) or not _are_described(state.get("files")):
        raise CheckpointError(f"{folder} is not a training checkpoint: {STATE_FILE} does not describe one")
    if version > FORMAT:
        raise CheckpointError(f"{folder} was saved by a later version (format {version}, here {FORMAT}); update this code")
    if version > 1 and state.get("sha256") != _checksum(state):
        raise CheckpointError(f"{folder}: {STATE_FILE} has changed (its sha256 differs)")
    return state


def _are_described(files: object) -> bool:
    """Whether these are files of a checkpoint by their names, each with its size and hash."""
    return isinstance(files, dict) and all(
        isinstance(about, dict) and about.keys() == {"bytes", "sha256"} and ".." not in name and not name.startswith("/")
        for name, about in files.items()
    )


def _checksum(state: dict) -> str:
    """Of everything that the state says, however the file is formatted."""
    rest = {name: value for name, value in state.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def list_states(folder: Path) -> list[Path]:
    """The checkpoints in OUTPUT/checkpoints, oldest first; they may be damaged."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and (p / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """References to everything that training changes; loading writes into them."""
    create_state(optimizer)
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter in optimizer.state, f"{name} is gathered now; call model_patch.reshard after evaluation"
            tensors[f"model.{name}"] = parameter.data
            tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Make a fresh optimizer allocate its state, by a step that changes nothing."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    for state in optimizer.state.values():
        state["step"].zero_()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# What a run has saved


@says_errors
def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("export", "merge", "average", "show"):
        raise CheckpointError(f"python checkpoint.py {argv[0]} is now: bash launch.sh {argv[0]}")
    if len(argv) != 1:
        raise CheckpointError("usage: python checkpoint.py OUTPUT; models: bash launch.sh show, export, merge, average")
    for folder in list_states(Path(argv[0]) / "checkpoints"):
        print(f"{folder}: {find_damage(folder) or 'whole'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
