"""OUTPUT/final, written from the sharded model at the end of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from checkpoint import COMPANIONS
from common import CheckpointError
from distributed import gather, whole
from export import card
from export.merge import merge
from export.pretrained import is_lora
from export.read import Full, adapter_name, open_model
from export.write import write_adapter, write_full


def write_final(
    output_dir: Path,
    model: nn.Module,
    config: HiggsAudioConfig,
    tokenizer: PreTrainedTokenizerBase,
    lora: LoraConfig | None,
    base: Path,
    merge_lora: bool = False,
) -> str | None:
    """Write OUTPUT/final: a full checkpoint in the base's dtype, or an adapter in float32. Collective.

    base:       folder of the base checkpoint
    merge_lora: also write OUTPUT/final/merged, the adapter merged into the base
    returns:    on rank 0, the report on merging
    raises:     CheckpointError on all ranks if the disk fails

    Tensors are gathered one at a time, so rank 0 holds the tensors of one output file, never the whole model.
    """
    folder, report, error = output_dir / "final", None, None
    named = _gathered(model, adapter=lora is not None, dtype=None if lora else config.torch_dtype or torch.float32)
    try:
        if dist.get_rank() == 0:
            if lora is None:
                write_full(folder, named, config, tokenizer, "boson", output_dir / COMPANIONS)
            else:
                write_adapter(folder, named, lora, tokenizer, output_dir / COMPANIONS)
            card.write(folder, lambda: card.of_model(folder, "", folder))
            if merge_lora:
                report = _merge(folder, base)
    except CheckpointError as caught:
        error = caught
    for _ in named:  # the other ranks, and rank 0 after an error, take part in the same collectives
        pass
    if error := gather(error)[0]:
        raise error
    return report


def _merge(folder: Path, base: Path) -> str:
    """Write final/merged; returns the report on it. The adapter is whole already, and stays so if this fails."""
    try:
        return str(merge(open_model(folder), Full(base), folder / "merged"))
    except CheckpointError as error:
        return f"warning: {error}. The adapter is whole: bash launch.sh merge {folder} BASE {folder / 'merged'}"


def _gathered(model: nn.Module, adapter: bool, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """(name in files, tensor) of the model or its adapter, whole on rank 0's CPU. Collective."""
    for name, parameter in model.named_parameters():
        if adapter and not is_lora(name):
            continue
        full = whole(parameter.data)
        if dist.get_rank() == 0:
            full = full.to("cpu", dtype or full.dtype)
        yield adapter_name(name) if adapter else name, full
