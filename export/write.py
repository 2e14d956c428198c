"""Writing models: a full checkpoint in either layout, or an adapter in PEFT's format.

Tensors pass through one at a time, so memory holds one output file's worth (MAX_FILE_BYTES), never the whole model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common import CheckpointError
from export import layouts, pretrained

MAX_FILE_BYTES = 5_000_000_000
# Files beside the weights that are written for one layout.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
)
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")

Named = Iterable[tuple[str, Tensor]]


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` when everything has been written. If that is a link, it stays one.

    raises: CheckpointError if the disk fails; an earlier `folder` is untouched then
    """
    target = Path(os.path.realpath(folder))
    temporary, old = (target.with_name(f".{target.name}.{kind}") for kind in ("tmp", "old"))
    is_written = False
    try:
        if old.exists() and not target.exists():  # killed between the renames below
            os.replace(old, target)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        is_written = True
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if old.exists() and not target.exists():
            os.replace(old, target)
        where = f"; the new one is whole in {temporary}" if is_written else ""
        raise CheckpointError(f"{folder}: cannot be written: {error}{where}") from None
    finally:
        if not is_written:
            shutil.rmtree(temporary, ignore_errors=True)


def write_full(
    folder: Path,
    named: Named,
    config: HiggsAudioConfig,
    tokenizer: PreTrainedTokenizerBase,
    layout: layouts.Layout,
    base: Path,
) -> None:
    """A full checkpoint in `layout`, from tensors by the names of the original layout.

    base: the checkpoint it was made from; its companion files are copied where it has the same layout
    """
    try:
        values = json.loads(config.to_json_string()) if layout == "boson" else layouts.to_transformers(config, tokenizer)
        made = {"config.json": values, "generation_config.json": layouts.generation_config(layout, config, tokenizer)}
        made |= {"processor_config.json": layouts.processor_config(config, tokenizer)} if layout == "transformers" else {}
    except ValueError as error:
        raise CheckpointError(f"{base}: {error}") from None
    same = layouts.layout_of(base) == layout
    if layout == "transformers" and tokenizer.pad_token is None:  # the processor pads
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    with whole_folder(folder) as temporary:
        _write_weights(temporary, ((layouts.rename(name, layout), tensor) for name, tensor in named), "model")
        _write_tokenizer(temporary, tokenizer, base)
        for name in COMPANIONS:
            if same and (base / name).is_file():
                shutil.copy(base / name, temporary)
            elif name in made:
                (temporary / name).write_text(json.dumps(made[name], indent=2) + "\n")
        if layout == "transformers" and not (temporary / CHAT_TEMPLATE.name).exists():
            shutil.copyfile(CHAT_TEMPLATE, temporary / CHAT_TEMPLATE.name)


def write_adapter(
    folder: Path, named: Named, lora: LoraConfig, tokenizer: PreTrainedTokenizerBase | None, base: Path | None = None
) -> None:
    """A PEFT adapter, from tensors by PEFT's names.

    base: where the tokenizer came from, if that is not what it says itself
    """
    with whole_folder(folder) as temporary:
        _write_weights(temporary, named, "adapter_model")
        if tokenizer is not None:
            _write_tokenizer(temporary, tokenizer, base or Path(tokenizer.name_or_path))
        dataclasses.replace(lora, inference_mode=True).save_pretrained(temporary)


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, base: Path) -> None:
    """Save the tokenizer; one that cannot save itself, as files of another version may not, is copied from the base."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        print(f"warning: {folder}: the tokenizer is copied, it cannot be saved: {error!r}", file=sys.stderr, flush=True)
        for name in TOKENIZER_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)


def _write_weights(folder: Path, named: Named, stem: str) -> None:
    """Tensors in files of at most MAX_FILE_BYTES; several files get the index that Hugging Face reads."""
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = num_files = 0
    file_of: dict[str, int] = {}

    def flush() -> None:
        nonlocal pending, pending_bytes, num_files
        num_files += 1
        pretrained.save_tensors(pending, folder / f"{stem}-part{num_files}", metadata={"format": "pt"})
        file_of.update(dict.fromkeys(pending, num_files))
        pending, pending_bytes = {}, 0

    for name, tensor in named:
        if pending and pending_bytes + tensor.nbytes > MAX_FILE_BYTES:
            flush()
        pending[name] = tensor.contiguous()
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    names = {i: f"{stem}-{i:05d}-of-{num_files:05d}.safetensors" for i in range(1, num_files + 1)}
    if num_files == 1:
        names = {1: f"{stem}.safetensors"}
    for i, name in names.items():
        os.replace(folder / f"{stem}-part{i}", folder / name)
    if num_files > 1:
        weights = {"metadata": {"total_size": total_bytes}, "weight_map": {n: names[i] for n, i in file_of.items()}}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(weights, indent=2))
