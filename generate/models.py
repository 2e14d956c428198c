"""A model to generate with: a full checkpoint, an adapter beside its base or merged, a training checkpoint; an adapter to train on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import GenerationConfig

import model_patch
from common import CheckpointError
from export import layouts, pretrained
from export.merge import merged
from export.read import ADAPTER_PREFIX, Adapter, Full, adapter_name, open_model
from layers import nf4
from layers.adapters import set_whole


def load_model(
    ckpt: str,
    base_ckpt: str,
    revision: str | None,
    dtype: torch.dtype | None,
    device: torch.device,
    merge_lora: bool = False,
    quantize: bool = False,
) -> tuple[HiggsAudioModel, Any]:
    """(model, tokenizer) of a full checkpoint in either layout, of an adapter and its base, or of a training checkpoint.

    base_ckpt, revision: an adapter's base, where that is not what the adapter names
    dtype:               None for the checkpoint's
    quantize:            the layers' weights as NF4, an adapter's base too
    raises: CheckpointError
    """
    source = open_model(pretrained.find_base(ckpt, revision))
    if isinstance(source, Full):
        return load_full(source, dtype, device, quantize), source.tokenizer
    base = open_model(pretrained.find_base(base_ckpt or source.base, revision or source.lora.revision))
    if not isinstance(base, Full):
        raise CheckpointError(f"{base.folder}: an adapter cannot be the base of another; give --base_ckpt")
    if merge_lora:
        return load_full(base, dtype, device, quantize, merged(source, base)), base.tokenizer
    model = load_full(base, dtype, device, quantize)
    insert_adapter(source, model)
    return model, base.tokenizer


def load_full(
    base: Full,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: bool = False,
    named: Iterable[tuple[str, Tensor]] | None = None,
) -> HiggsAudioModel:
    """The official model with the base's weights, or those `named`, which go to the device one tensor at a time.

    dtype: None for the checkpoint's
    """
    if base.config.encode_whisper_embed:
        raise CheckpointError(
            f"{base.folder}: reads reference audio through Whisper (encode_whisper_embed), which can be trained but not "
            "generated with here; upstream's examples/generation.py can"
        )
    model = model_patch.build_on_meta(base.config)
    pretrained.check_base(model, base.folder, base.shapes)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or base.config.torch_dtype or torch.float32)
    if quantize:
        nf4.quantize_layers(model.requires_grad_(False))
    model_patch.materialize(model, torch.device(device))
    targets = dict(model.named_parameters())
    for name, tensor in ((name, base.read(name)) for name in base.shapes) if named is None else named:
        if name not in targets:  # a checkpoint may hold more than the model
            continue
        if nf4.is_quantized(targets[name]):
            nf4.fill(targets[name], tensor)
        else:
            targets[name].data.copy_(tensor)
    if layouts.layout_of(base.config_folder) == "boson" and (base.config_folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base.config_folder)
    return model.eval()


def insert_adapter(adapter: Adapter, model: HiggsAudioModel) -> None:
    """PEFT's own adapter layers, with the adapter's weights."""
    inject_adapter_in_model(adapter.lora, model)
    weights = {name.removeprefix(ADAPTER_PREFIX): adapter.read(name) for name in adapter.shapes}
    set_peft_model_state_dict(model, weights)
    model.eval()


def lora_flags(lora: LoraConfig) -> str:
    """The flags of training that make such an adapter."""
    variants = (f" --{name}" for name in ("use_rslora", "use_dora") if getattr(lora, name))
    return f"--lora_r {lora.r} --lora_alpha {lora.lora_alpha:g}{''.join(variants)}"


def start_from(model: nn.Module, lora: LoraConfig, name: str) -> dict:
    """Give a sharded model's adapter the weights of another; returns its folder, base and digest, for the run's lineage.

    raises: CheckpointError unless it is an adapter of the same rank and scale for the same layers
    """
    adapter = open_model(pretrained.find_base(name, None))
    if not isinstance(adapter, Adapter):
        raise CheckpointError(f"--init_adapter {name}: a full model; start from it with --base_ckpt {name}")
    if (same := lora_flags(adapter.lora)) != lora_flags(lora):
        raise CheckpointError(f"--init_adapter {name}: rank, alpha or kind is another than this run's; give {same}")
    mine = {adapter_name(n): parameter for n, parameter in model.named_parameters() if pretrained.is_lora(n)}
    if other := sorted(mine.keys() ^ adapter.shapes.keys()) or [n for n in mine if mine[n].shape != adapter.shapes[n]]:
        layer = other[0].removeprefix(ADAPTER_PREFIX)
        where = "not in it" if other[0] in mine else "not in this run"
        raise CheckpointError(
            f"--init_adapter {name}: made for other layers: {layer} is {where}; --lora_targets has to be the same"
        )
    digest = hashlib.sha256()
    for key, parameter in mine.items():
        weight = adapter.read(key)
        digest.update(weight.float().numpy().tobytes())
        set_whole(parameter, weight)
    return {"folder": str(adapter.folder.resolve()), "base": adapter.base, "sha256": digest.hexdigest()}
