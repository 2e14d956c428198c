"""What an adapter starts from: the same on any number of ranks."""

from __future__ import annotations

import math

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distributed import own_rows


def init_lora(model: nn.Module, seed: int) -> None:
    """Fill an adapter's weights as PEFT does: A Kaiming-uniform, B zero, DoRA's magnitudes the norms of the loaded base's rows."""
    for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            full = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
        elif "lora_B" in name:
            full = torch.zeros(parameter.shape)
        else:
            continue
        set_whole(parameter, full)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and layer.lora_magnitude_vector:  # DoRA's: each rank has those of its own rows
            norms = torch.linalg.vector_norm(own_rows(layer.base_layer.weight.detach()), dim=1, dtype=torch.float32)
            own_rows(layer.lora_magnitude_vector["default"].weight.detach()).copy_(norms)


def set_whole(parameter: nn.Parameter, full: Tensor) -> None:
    """Fill a parameter; of a sharded one each rank keeps its own rows of the same full tensor."""
    if isinstance(parameter, DTensor):
        full = distribute_tensor(full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.data.copy_(full)
