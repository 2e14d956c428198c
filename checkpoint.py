"""Weights in and out: the base checkpoint and the training state. safetensors and JSON only.

base         a Hugging Face folder or Hub repository in either layout (layouts.py), streamed into each rank's own shard
training     OUTPUT/checkpoints/step_N: every rank writes the rows it owns, beside training, in the safetensors form of DCP;
             a checkpoint has its final name only when it is whole, and loads on any number of ranks

What becomes of them is export.py's subject; its commands are

    python checkpoint.py FOLDER                            # what a folder holds
    python checkpoint.py export FOLDER OUT                 # a finished or half-finished model, in either layout
    python checkpoint.py merge ADAPTER BASE OUT            # an adapter's changes added to the base's weights
    python checkpoint.py average FOLDER FOLDER ... OUT     # the mean of several

`python checkpoint.py COMMAND --help` says more.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common import CheckpointError, read_json, sha256_of
from config import base_revision
from distributed import gather, own_rows
from export import layouts

T = TypeVar("T")

STATE_FILE = "state.json"
DCP_PIECES = "DCP_SHARDING_INFO"  # where DCP notes which rows of a tensor a safetensors file holds


# ---------------------------------------------------------------------------------------------------------------------
# The base checkpoint


def find_base(name_or_path: str, revision: str | None) -> Path:
    """The local folder of a checkpoint, downloaded from the Hub where it is not a folder (call on one rank per node first).

    revision: None stands for the original layout of the published checkpoint, and for the newest of any other
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path):
        raise CheckpointError(f"checkpoint {name_or_path}: neither a folder nor a Hub repository (owner/name)")
    from huggingface_hub import snapshot_download

    revision = base_revision(name_or_path, revision)
    try:
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # the Hub client has many: offline, no access, no such repository or revision
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"checkpoint {name_or_path} (revision {revision}): not a folder here, and the Hub gave no copy: {reason}"
        ) from None


def read_base_config(folder: Path) -> HiggsAudioConfig:
    """The checkpoint's configuration, in the original layout; CheckpointError if it is not a Higgs Audio v2 checkpoint."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {folder}: no config.json, so this is not a checkpoint folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: broken JSON: {error}") from None
    kind = values.get("model_type")
    if kind not in layouts.LAYOUTS:
        raise CheckpointError(f"checkpoint {folder}: model_type is {kind!r}, expected {' or '.join(layouts.LAYOUTS)}")
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(f"checkpoint {folder}: no *.safetensors files")
    if layouts.LAYOUTS[kind] == "boson":
        return HiggsAudioConfig.from_dict(values)
    tokenizer = load_tokenizer(folder)
    try:
        return layouts.to_boson(values, tokenizer)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; CheckpointError if it has none."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        # What transformers >= 5 calls the class that has read tokenizer.json all along.
        newer = settings.get("tokenizer_class") == "TokenizersBackend"
        return (PreTrainedTokenizerFast if newer else AutoTokenizer).from_pretrained(folder)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError or the parser's own
        raise CheckpointError(f"checkpoint {folder}: no usable tokenizer beside the weights: {error}") from None


def base_name(name: str) -> str:
    """A parameter's name in the base checkpoint: LoRA wraps a linear layer as `base_layer`."""
    return name.replace(".base_layer.", ".")


def is_lora(name: str) -> bool:
    return ".lora_" in name


def check_base(model: nn.Module, folder: Path) -> list[str]:
    """Whether the folder has every tensor of the model, in its shape; opens the files' headers only.

    returns: names of tensors in the checkpoint that the model has no use for
    raises:  CheckpointError
    """
    targets = _base_tensors(model)
    stored = {layouts.rename(name, "boson"): shape for name, shape in _stored_shapes(folder).items()}
    missing = sorted(targets.keys() - stored.keys())
    if missing:
        hint = "; the transformers class keeps its text head only with use_text_head=True" * ("text_lm_head" in missing[0])
        raise CheckpointError(f"{folder}: {len(missing)} of {len(targets)} tensors are missing, first {missing[0]}{hint}")
    _check_shapes(folder, targets, stored)
    return sorted(stored.keys() - targets.keys())


def load_base(model: nn.Module, folder: Path) -> None:
    """Stream the base weights into a sharded model; each rank reads its own rows only. Collective; `check_base` first."""
    stored_name = {layouts.rename(name, "boson"): name for name in _stored_shapes(folder)}
    targets = {stored_name[name]: tensor for name, tensor in _base_tensors(model).items()}
    dcp.load(targets, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {base_name(name): p.data for name, p in model.named_parameters() if not is_lora(name)}


def _check_shapes(folder: Path, targets: dict[str, Tensor], stored: dict[str, tuple[int, ...]]) -> None:
    for name, tensor in targets.items():
        if tuple(tensor.shape) != stored[name]:
            raise CheckpointError(f"{folder}: {name} has shape {stored[name]}, the model wants {tuple(tensor.shape)}")


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return Stored(folder).shapes


class Stored:
    """The tensors of a folder's safetensors files, read one at a time; of each, ranks may have written their own rows.

    raises: CheckpointError if a file is damaged
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[Any, list[int]]]] = {}  # by name: an open file, and where its piece begins
        for path in sorted(folder.glob("*.safetensors")):
            try:
                self._add(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: damaged: {error}") from None

    def _add(self, file) -> None:
        sharding = json.loads((file.metadata() or {}).get(DCP_PIECES, "{}"))
        for name in file.keys():  # noqa: SIM118
            shape = file.get_slice(name).get_shape()
            offsets = sharding[name]["saved_offsets"] if name in sharding else [0] * len(shape)
            ends = [offset + size for offset, size in zip(offsets, shape)]
            self.shapes[name] = tuple(map(max, ends, self.shapes.get(name, ends)))
            self._pieces.setdefault(name, []).append((file, offsets))

    def read(self, name: str) -> Tensor:
        (file, _), *others = self._pieces[name]
        if not others:
            return file.get_tensor(name)
        pieces = [(file.get_tensor(name), offsets) for file, offsets in self._pieces[name]]
        whole = pieces[0][0].new_empty(self.shapes[name])
        for piece, offsets in pieces:
            whole[tuple(slice(o, o + size) for o, size in zip(offsets, piece.shape))] = piece
        return whole


# ---------------------------------------------------------------------------------------------------------------------
# The training state


class Saver:
    """Writes training states while training goes on; keeps the newest ones and the best.

    `start` copies this rank's rows to the host and returns; a thread per rank writes them. `commit` makes the checkpoint
    appear under its name once every rank has written its part: never a moment before, and not at all if one of them failed.
    Threads take part in no collective, so nothing they do can cross training's own.

    Until it is committed, a checkpoint costs each rank host memory for its rows of what trains: 12 bytes a parameter
    (master weight and two moments), divided by the number of ranks.

    folder:    OUTPUT/checkpoints
    keep_last: checkpoints to keep; 0: all
    """

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, keep_last: int = 0):
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self.keep_last = keep_last
        self.newest: Path | None = None  # the last one started
        self._thread = ThreadPoolExecutor(1, "save")
        self._state: dict = {}
        self._written: Future[dict] | None = None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part is still on its way to the disk."""
        return self._written is not None and not self._written.done()

    def start(self, state: dict) -> None:
        """Begin a checkpoint of what trains and `state` (JSON), which holds at least its "step". Collective.

        An earlier one is committed first. Random numbers need no saving: train.py derives them from (seed, step, micro-batch).

        raises: CheckpointError if the disk is too small, or the earlier one failed; others are untouched then
        """
        self.commit()
        folder = self.folder / f"step_{state['step']}"
        rows, offsets = _copy_own_rows(_training_tensors(self.model, self.optimizer))
        _start_writing(_unfinished(folder), sum(tensor.nbytes for tensor in rows.values()))
        self._state, self.newest = state, folder
        self._written = self._thread.submit(_write_rows, _unfinished(folder), rows, offsets)

    def commit(self) -> None:
        """Wait for the checkpoint that is being written, if any, and give it its name. Collective.

        raises: CheckpointError if the disk is full or fails; earlier checkpoints are untouched then
        """
        if self._written is None:
            return
        written, self._written = self._written, None
        folder, error, own = self.newest, None, {}
        try:
            own = written.result()
        except (OSError, SafetensorError) as caught:
            error = str(caught)
        errors, parts = zip(*gather((error, own)))
        error = next(filter(None, errors), None)
        if dist.get_rank() == 0:
            try:
                if not error:
                    files = {name: description for part in parts for name, description in part.items()}
                    _finish_writing(folder, self._state | {"files": files})
                    self._remove_old()
            except OSError as caught:
                error = str(caught)
            if error:
                shutil.rmtree(_unfinished(folder), ignore_errors=True)
        error = gather(error)[0]
        if error:
            raise CheckpointError(f"{folder}: cannot be written ({error}); earlier checkpoints are untouched")

    def _remove_old(self) -> None:
        best = self._state.get("best") or {}
        for old in list_states(self.folder)[: -self.keep_last] if self.keep_last else []:
            if old.name != f"step_{best.get('step')}":
                os.replace(old, _unfinished(old))  # it goes as a whole, too
                shutil.rmtree(_unfinished(old))


def _unfinished(folder: Path) -> Path:
    """What a checkpoint is called while it is not whole."""
    return folder.with_name(f".{folder.name}.tmp")


def _copy_own_rows(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Copies on the host of the rows this rank writes, and where in the whole tensor they begin.

    What several ranks hold, the first of them writes.
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

    Not `dcp.HuggingFaceStorageWriter`: that turns all rows into one bytes object first, under Python's lock, during which
    no step runs (1.2 s per 400 MB), while `save_file` writes them from where they are.
    """
    path = folder / f"shard-{dist.get_rank() + 1:05d}-of-{dist.get_world_size():05d}.safetensors"
    pieces = {name: {"saved_offsets": offset} for name, offset in offsets.items()}
    save_tensors(rows, path, metadata={DCP_PIECES: json.dumps(pieces), "DCP_VERSION": "1.0", "format": "pt"})
    return {path.name: _describe(path)}


def _finish_writing(folder: Path, state: dict) -> None:
    """The last file, then the name."""
    temporary = _unfinished(folder)
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=2))
    _fsync(temporary / STATE_FILE)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    _fsync(folder.parent)


def _start_writing(temporary: Path, num_bytes: int) -> None:
    """Make an empty folder, if the disk has room for every rank's `num_bytes`. Collective."""
    total = sum(gather(num_bytes))
    error = None
    if dist.get_rank() == 0:
        try:
            for left in temporary.parent.glob(".step_*.tmp"):  # of runs that were killed
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
            free = shutil.disk_usage(temporary).free
            if free < total:
                temporary.rmdir()
                error = f"{total / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free"
        except OSError as caught:
            error = str(caught)
    error = gather(error)[0]
    if error:
        raise CheckpointError(f"{temporary.parent}: no checkpoint can be written: {error}; earlier ones are untouched")


def _describe(path: Path) -> dict:
    """A file's size and sha256, once it is on the disk."""
    _fsync(path)
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": sha256_of(file).hex()}


def find_damage(folder: Path, part: slice = slice(None)) -> str | None:
    """What is wrong with a checkpoint's files, or None; `part` of them, so that ranks can share the reading."""
    try:
        files = read_state(folder).get("files", {})
    except CheckpointError as error:
        return str(error)
    for name, expected in list(files.items())[part]:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _describe(path)["sha256"] != expected["sha256"]:
            return f"{name} has changed (its sha256 differs)"
    return None if files else "it lists no files"


def check_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: dict) -> dict:
    """Whether `folder` continues this very run: whole, of the same settings `run`, with the same tensors.

    returns: the `state` it was saved with
    raises:  CheckpointError
    """
    state = read_state(folder)
    saved = state.get("run", {})
    other = {name: saved.get(name) for name, value in run.items() if saved.get(name) != value}
    if other:
        found = ", ".join(f"{name} was {value!r} and is {run[name]!r}" for name, value in other.items())
        raise CheckpointError(f"--resume {folder}: this is not the same run: {found}")
    targets, stored = _training_tensors(model, optimizer), _stored_shapes(folder)
    different = sorted(targets.keys() ^ stored.keys())
    if different:
        raise CheckpointError(f"--resume {folder}: {len(different)} tensors are not the same, first {different[0]}")
    _check_shapes(folder, targets, stored)
    return state


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore what a `Saver` wrote, on any number of ranks. Collective; `check_state` first."""
    dcp.load(_training_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))


def read_state(folder: Path) -> dict:
    try:
        return json.loads((folder / STATE_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder} is not a whole training checkpoint: {error}") from None


def list_states(folder: Path) -> list[Path]:
    """Whole checkpoints in OUTPUT/checkpoints, oldest first."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and (p / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Live references to everything that training changes; loading writes into them."""
    create_state(optimizer)
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert isinstance(parameter, DTensor), f"{name} is not sharded now; call model_patch.reshard after evaluation"
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


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """safetensors' `save_file`, which makes files for their owner alone, with the permissions that the umask asks for."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder


def lock(output_dir: Path) -> IO:
    """Keep other runs out of the folder while the returned file is open; the lock goes with the process.

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


def refuse_used(output_dir: Path) -> None:
    """CheckpointError for a folder that holds a run already."""
    if output_dir.exists() and not output_dir.is_dir():
        raise CheckpointError(f"--output_dir {output_dir}: this is a file")
    if any((output_dir / name).exists() for name in ("metrics.jsonl", "checkpoints", "final")):
        raise CheckpointError(
            f"--output_dir {output_dir}: holds a run already; choose another folder, or continue it with --resume auto"
        )


def find_resume(output_dir: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from: the one named, or with "auto" the newest whole one. Collective.

    returns: the checkpoint, if any, and what is wrong with newer ones that were passed over
    raises:  CheckpointError, on all ranks, if the checkpoint named is damaged or ranks see different folders
    """
    named = resume != "auto"
    candidates = [Path(resume)] if named else list_states(output_dir / "checkpoints")[::-1]
    if len(set(map(tuple, gather(candidates)))) > 1:
        raise CheckpointError(
            f"--output_dir {output_dir}: ranks see different checkpoints; all nodes have to share this folder"
        )
    passed_over = []
    share = slice(dist.get_rank(), None, dist.get_world_size())
    for folder in candidates:
        damage = next((found for found in gather(find_damage(folder, share)) if found), None)
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
