"""The finished model: OUTPUT/final, a folder for `HiggsAudioModel.from_pretrained`, or a PEFT adapter."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from checkpoint import is_lora

MAX_FILE_BYTES = 5_000_000_000


def export(
    folder: Path,
    model: nn.Module,
    config: HiggsAudioConfig,
    tokenizer: PreTrainedTokenizerBase,
    lora: LoraConfig | None,
    base: Path,
) -> None:
    """Write the finished model to `folder`, under a temporary name first. Collective.

    base: the folder of the base checkpoint, whose generation settings a full model keeps

    Without `lora` a Hugging Face folder in the base checkpoint's dtype, else a PEFT adapter in float32. Tensors are
    gathered one at a time, so rank 0 holds one output file's worth, never the whole model.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    is_main = dist.get_rank() == 0
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    if lora is not None:
        named = ((_adapter_name(n), p.data) for n, p in model.named_parameters() if is_lora(n))
        _write_weights(temporary, named, "adapter_model", None, index=False)
    else:
        dtype = config.torch_dtype or torch.float32
        named = ((n, p.data) for n, p in model.named_parameters())
        _write_weights(temporary, named, "model", dtype, index=True)
    if is_main:
        tokenizer.save_pretrained(temporary)
        if lora is not None:
            dataclasses.replace(lora, inference_mode=True).save_pretrained(temporary)
        else:
            config.save_pretrained(temporary)
            if (base / "generation_config.json").is_file():
                shutil.copy(base / "generation_config.json", temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    dist.barrier()


def _adapter_name(name: str) -> str:
    """PEFT's name of an adapter weight in its files."""
    return "base_model.model." + re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name)


def _write_weights(
    folder: Path, named: Iterator[tuple[str, Tensor]], stem: str, dtype: torch.dtype | None, index: bool
) -> None:
    """Gather tensors one at a time and write them on rank 0, in files of at most MAX_FILE_BYTES."""
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = num_files = 0
    file_of: dict[str, int] = {}

    def flush() -> None:
        nonlocal pending, pending_bytes, num_files
        num_files += 1
        save_file(pending, folder / f"{stem}-part{num_files}", metadata={"format": "pt"})
        file_of.update(dict.fromkeys(pending, num_files))
        pending, pending_bytes = {}, 0

    for name, tensor in named:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() != 0:
            continue
        full = full.detach().to("cpu", dtype or full.dtype).contiguous()
        if pending and pending_bytes + full.nbytes > MAX_FILE_BYTES:
            flush()
        pending[name] = full
        pending_bytes += full.nbytes
        total_bytes += full.nbytes
    if dist.get_rank() != 0:
        return
    flush()
    names = {i: f"{stem}-{i:05d}-of-{num_files:05d}.safetensors" for i in range(1, num_files + 1)}
    if num_files == 1:
        names = {1: f"{stem}.safetensors"}
    for i, name in names.items():
        os.replace(folder / f"{stem}-part{i}", folder / name)
    if index and num_files > 1:
        weights = {"metadata": {"total_size": total_bytes}, "weight_map": {n: names[i] for n, i in file_of.items()}}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(weights, indent=2))
