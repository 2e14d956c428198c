"""AdamW over what trains, its learning rate, and moving averages of the weights.

A module of its own so that train.py stays a file one can read in a sitting.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from config import Config


class AveragingAdamW(torch.optim.AdamW):
    """AdamW that also keeps a moving average of the weights it trains, in float32, of each rank's own rows.

    After t steps it is the mean of the weights after each of them, weighted by decay ** (steps ago): the weights before
    training have no part in it. It is optimizer state like any other, saved and loaded with checkpoints.
    """

    def __init__(self, groups: list[dict], decay: float, **settings):
        super().__init__(groups, **settings)
        self.decay = decay

    @torch.no_grad()
    def step(self, closure=None) -> None:
        super().step(closure)
        for parameter, state in self.state.items():
            if "ema" not in state:
                state["ema"] = torch.zeros_like(parameter)
            share = (1 - self.decay) / (1 - self.decay ** state["step"])  # 1 at the first step
            _own(state["ema"]).lerp_(_own(parameter), share)

    @contextlib.contextmanager
    def averaged(self):
        """While it lasts, the parameters hold their averages; the model has to be sharded at both ends."""
        self._swap()
        yield
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, state in self.state.items():
            mine, average = _own(parameter), _own(state["ema"])
            before = mine.clone()
            mine.copy_(average)
            average.copy_(before)


def _own(tensor: Tensor) -> Tensor:
    """This rank's rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def averaged(optimizer: torch.optim.Optimizer):
    """The context in which the model's weights are those to evaluate and export: with --ema their averages."""
    has_average = isinstance(optimizer, AveragingAdamW) and optimizer.state
    return optimizer.averaged() if has_average else contextlib.nullcontext()


def build_optimizer(model: nn.Module, cfg: Config) -> torch.optim.AdamW:
    """AdamW over what trains; weight decay on matrices only. Create it after sharding."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings = {"lr": cfg.peak_lr, "betas": (0.9, cfg.beta2), "fused": True}
    return AveragingAdamW(groups, cfg.ema, **settings) if cfg.ema else torch.optim.AdamW(groups, **settings)


def lr_at(step: int, total_steps: int, cfg: Config) -> float:
    """Learning rate of optimizer step `step` (0 is the first): linear warm-up, then cosine to min_lr_ratio."""
    if step < cfg.warmup_steps:
        return cfg.peak_lr * (step + 1) / cfg.warmup_steps
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.peak_lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * cosine)
