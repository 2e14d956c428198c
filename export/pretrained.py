"""A checkpoint as it is stored: a Hugging Face folder or Hub repository in either layout. safetensors and JSON only.

Its configuration and tokenizer, its tensors one at a time, or streamed into each rank's own shard of a model.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch.distributed.checkpoint as dcp
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common import CheckpointError, read_json, reason
from config import BASE_NAMES, base_revision
from export import layouts
from layers import nf4
from prepare import hub

INDEX_FILE = "model.safetensors.index.json"
STATE_FILE = "state.json"  # of a training checkpoint; see checkpoint.py
DCP_PIECES = "DCP_SHARDING_INFO"  # the metadata in which DCP notes which rows of a tensor a safetensors file holds
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096  # of each weight file, for a base's fingerprint


def find_base(name_or_path: str, revision: str | None) -> Path:
    """The local folder of a checkpoint; a Hub repository is downloaded first (call on one rank per node before the others).

    revision: None is the original layout of the published checkpoint, and the newest revision of any other
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path):
        raise CheckpointError(f"checkpoint {name_or_path}: neither a folder nor a Hub repository (owner/name)")
    found = base_revision(name_or_path, revision)
    names = [name_or_path, *(name for name in BASE_NAMES if name_or_path in BASE_NAMES and name != name_or_path)]
    problems = []
    for name in names:
        try:
            return hub.fetch(name, found, ["*.json", "*.safetensors", "*.jinja"])
        except hub.HubError as error:
            problems.append(str(error))
    raise CheckpointError(f"checkpoint {name_or_path} (revision {found}): not a folder here; {problems[0]}")


def read_base_config(folder: Path) -> HiggsAudioConfig:
    """The configuration in the original layout; CheckpointError if this is not a Higgs Audio v2 checkpoint."""
    path = folder / "config.json"
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {folder}: no config.json, so this is not a checkpoint folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: broken JSON: {error}") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in layouts.LAYOUTS:
        raise CheckpointError(f"checkpoint {folder}: model_type is {kind!r}, expected {' or '.join(layouts.LAYOUTS)}")
    try:
        is_boson = layouts.LAYOUTS[kind] == "boson"
        config = HiggsAudioConfig.from_dict(values) if is_boson else layouts.to_boson(values, load_tokenizer(folder))
        config.text_config.num_hidden_layers  # noqa: B018  it may be anything
        return config
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {folder}: config.json describes no such model: {error}") from None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; CheckpointError if it has none."""
    try:
        # transformers >= 5 calls the class TokenizersBackend that older versions call PreTrainedTokenizerFast.
        newer = read_json(folder / "tokenizer_config.json").get("tokenizer_class") == "TokenizersBackend"
        kind = PreTrainedTokenizerFast if newer else AutoTokenizer
        return kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError or the parser's own
        raise CheckpointError(f"checkpoint {folder}: no usable tokenizer beside the weights: {reason(error)}") from None


def base_name(name: str) -> str:
    """A parameter's name in the base checkpoint: LoRA wraps a linear layer as `base_layer`."""
    return name.replace(".base_layer.", ".")


def is_lora(name: str) -> bool:
    return ".lora_" in name


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its state.json or its index names, else the only one.

    raises: CheckpointError if there is none, if one is missing, or if it is not clear which ones count
    """
    if lists := [path for path in (folder / STATE_FILE, folder / INDEX_FILE) if path.is_file()]:
        try:
            listed = read_json(lists[0])
            is_state = lists[0].name == STATE_FILE
            names = sorted(
                {name for name in listed["files"] if "/" not in name} if is_state else {*listed["weight_map"].values()}
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{lists[0]}: cannot be read: {error!r}") from None
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if len(names) > 1:
            shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
            raise CheckpointError(
                f"checkpoint {folder}: which of {shown} are its weights? Leave one file, or the {INDEX_FILE} that lists them"
            )
    if not names:
        raise CheckpointError(f"checkpoint {folder}: no *.safetensors files")
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {folder}: {name} is missing")
    return [folder / name for name in names]


def check_base(model: nn.Module, folder: Path, shapes: dict[str, tuple[int, ...]] | None = None) -> list[str]:
    """Compare names and shapes of the model's tensors with the folder's; opens only the files' headers.

    shapes:  of tensors by the names of the original layout; default: those in the folder
    returns: names of tensors in the checkpoint that the model does not have
    raises:  CheckpointError if a tensor is missing or has another shape
    """
    targets = _base_tensors(model)
    stored = shapes or {layouts.rename(name, "boson"): shape for name, shape in Stored(folder).shapes.items()}
    missing = sorted(targets.keys() - stored.keys())
    if missing:
        hint = "; the transformers class keeps its text head only with use_text_head=True" * ("text_lm_head" in missing[0])
        raise CheckpointError(f"{folder}: {len(missing)} of {len(targets)} tensors are missing, first {missing[0]}{hint}")
    check_shapes(folder, targets, stored)
    return sorted(stored.keys() - targets.keys())


def load_base(model: nn.Module, folder: Path) -> None:
    """Stream the base weights into a sharded model; each rank reads only its own rows. Collective; `check_base` first.

    NF4 weights are quantised from the whole weight: the scale of a rank's rows depends on all of them.
    """
    stored = Stored(folder)
    stored_name = {layouts.rename(name, "boson"): name for name in stored.shapes}
    quantized = {base_name(name): p for name, p in model.named_parameters() if nf4.is_quantized(p)}
    for name, parameter in quantized.items():
        nf4.fill(parameter, stored.read(stored_name[name]))
    rest = {stored_name[name]: tensor for name, tensor in _base_tensors(model).items() if name not in quantized}
    load(rest, folder)


def load(targets: dict[str, Tensor], folder: Path) -> None:
    """Read tensors from `weight_files` alone, where DCP would read every safetensors file in the folder. Collective."""
    files = list(map(str, weight_files(folder)))
    reader = dcp.HuggingFaceStorageReader(str(folder))
    reader.fs.ls = lambda path: files
    dcp.load(targets, storage_reader=reader)


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {base_name(name): p.data for name, p in model.named_parameters() if not is_lora(name)}


def check_shapes(folder: Path, targets: dict[str, Tensor], stored: dict[str, tuple[int, ...]]) -> None:
    for name, tensor in targets.items():
        if tuple(tensor.shape) != stored[name]:
            raise CheckpointError(f"{folder}: {name} has shape {stored[name]}, the model wants {tuple(tensor.shape)}")


class Stored:
    """The tensors of a folder's safetensors files, read one at a time. A tensor may be spread over files by rows.

    A file is mapped anew for each tensor: its pages count as this process's memory for as long as it stays mapped.

    raises: CheckpointError if a file is damaged
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[Path, list[int]]]] = {}  # by name: file, offset of its rows
        for path in weight_files(folder):
            try:
                self._add(path, safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: damaged: {error}") from None

    def _add(self, path: Path, file) -> None:
        sharding = json.loads((file.metadata() or {}).get(DCP_PIECES, "{}"))
        for name in file.keys():  # noqa: SIM118
            shape = file.get_slice(name).get_shape()
            offsets = sharding[name]["saved_offsets"] if name in sharding else [0] * len(shape)
            ends = [offset + size for offset, size in zip(offsets, shape)]
            self.shapes[name] = tuple(map(max, ends, self.shapes.get(name, ends)))
            self._pieces.setdefault(name, []).append((path, offsets))

    def read(self, name: str) -> Tensor:
        pieces = [(safe_open(path, framework="pt").get_tensor(name), offsets) for path, offsets in self._pieces[name]]
        if len(pieces) == 1:
            return pieces[0][0]
        whole = pieces[0][0].new_empty(self.shapes[name])
        for piece, offsets in pieces:
            whole[tuple(slice(o, o + size) for o, size in zip(offsets, piece.shape))] = piece
        return whole


def fingerprint(folder: Path) -> str:
    """A digest of a checkpoint's configuration and weights: headers, sizes, and samples of each file, within a second."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name} {size} ".encode() + file.read(min(header, size)))
            first, room = 8 + header, max(0, size - 8 - header - SAMPLE_BYTES)
            for i in range(NUM_SAMPLES):
                file.seek(first + room * i // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """`save_file` of safetensors, but with the permissions of the umask instead of the owner's alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)
