"""A base of 4 bits: the frozen weights of the layers as NF4 tensors of torchao, 4.13 bits each.

Blocks of 64 weights share a scale, blocks of 256 scales another one. Under FSDP2 each rank keeps its own rows; alone, a weight is
not sharded. Matrix products dequantise a weight when they need it and forget it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from common import ConfigError, PatchError
from distributed import own_rows

BLOCK = 64  # weights with a scale
SCALES = 256  # scales with a scale, at most
SHARDS = 8  # scales are grouped so that the weight can be divided by this; the same on any number of ranks


def is_quantized(tensor: Tensor) -> bool:
    """Whether this is a torchao NF4 tensor, sharded or not."""
    return hasattr(own_rows(tensor.detach()) if isinstance(tensor, DTensor) else tensor, "quantized_data")


def quantize_layers(model: nn.Module, world_size: int = 1) -> None:
    """Make NF4 weights (torchao, 4.13 bits each) of the layers' frozen linear ones; on meta, before sharding.

    Weights that are too small for blocks which ranks can divide stay as they are.

    raises: PatchError if this number of ranks cannot divide a weight
    """
    for linear in model.layers.modules():
        if not isinstance(linear, nn.Linear) or linear.weight.requires_grad or not (size := _num_scales(linear.weight.numel())):
            continue
        if linear.out_features % world_size or linear.weight.numel() % (BLOCK * size * world_size):
            raise PatchError(
                f"--quantize nf4: {world_size} ranks cannot divide a weight of {tuple(linear.weight.shape)}; use 8"
            )
        linear.weight = nn.Parameter(_to_nf4()(linear.weight.detach(), BLOCK, size), requires_grad=False)


def _to_nf4() -> Callable[..., Tensor]:
    """torchao's function. raises: ConfigError without that package, which only this needs"""
    try:
        from torchao.quantization import to_nf4
    except ImportError as error:
        raise ConfigError(
            f"--quantize nf4: {error}; bash launch.sh installs it, or: pip install -r requirements-nf4.txt"
        ) from None
    return to_nf4


def _num_scales(numel: int) -> int:
    """The largest power of two of scales, up to SCALES, whose blocks divide each of SHARDS parts; 0: none does."""
    blocks = numel // (BLOCK * SHARDS) if numel % (BLOCK * SHARDS) == 0 else 0
    return math.gcd(blocks, SCALES) if blocks else 0


@torch.no_grad()
def fill(parameter: nn.Parameter, weight: Tensor) -> None:
    """Quantise a whole weight into this rank's part of an NF4 parameter; PatchError for one that float16 cannot hold."""
    mine = own_part(parameter)
    whole = _to_nf4()(weight.to(mine.device, mine.dtype), BLOCK, mine.scaler_block_size)
    if not whole.quantization_factor.isfinite().all():  # 128 over the range of a block's scales: float16 ends at 65504
        raise PatchError("--quantize nf4: the scales of a weight are too even for float16; use --mixed_precision bf16 or no")
    mine.nf4, mine.scaler_mean = whole.nf4, whole.scaler_mean
    if isinstance(parameter, DTensor):
        whole = whole.split(len(mine))[parameter.device_mesh.get_local_rank()]
    for name in ("quantized_data", "quantized_scalers", "quantization_factor"):
        getattr(mine, name).copy_(getattr(whole, name))


def own_part(parameter: nn.Parameter) -> Tensor:
    """This rank's part itself: `to_local` would return a view, whose attributes are its own."""
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def plain(weight: Tensor) -> Tensor:
    """A weight that matrix products take: NF4 is dequantised, of a sharded one this rank's rows.

    The same numbers as torchao's `get_original_weight`, by a table of both values in a byte: at most 2 copies of the
    weight in memory instead of 7, in a quarter of the time (2048 x 2048, bf16, one CPU thread).
    """
    if not is_quantized(weight):
        return weight
    mine = own_part(weight)
    pairs = torch.cartesian_prod(mine.nf4, mine.nf4)  # [256, 2]
    blocks = functional.embedding(mine.quantized_data.int(), pairs).view(-1, BLOCK)
    scales = mine.dequantize_scalers(mine.quantized_scalers, mine.quantization_factor, mine.scaler_block_size)
    rows = blocks.mul_(scales[:, None]).view(mine.shape)
    return DTensor.from_local(rows, weight.device_mesh, weight.placements) if isinstance(weight, DTensor) else rows
