"""AdamW's step: skipped where the gradient is not finite, by the device itself; averages of the weights; float16's loss scale."""

from __future__ import annotations

import contextlib
import math
from dataclasses import astuple, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from distributed import own_rows, whole


@dataclass
class LossScale:
    """A power of two that the loss is multiplied by, since float16 has no numbers below 6e-8: many gradients would be 0.

    Halved after a step whose gradient overflows, doubled after GROW_AFTER steps without one. It follows from the gradient norm
    of all ranks, so each has the same.
    """

    value: float = 2.0**16
    good_steps: int = 0  # since it changed
    overflows: int = 0  # of the run

    GROW_AFTER: ClassVar[int] = 2000  # as in torch.amp.GradScaler

    @classmethod
    def of(cls, mixed_precision: str) -> LossScale | None:
        """For --mixed_precision; None where numbers have the range of float32."""
        return cls() if mixed_precision == "fp16" else None

    def shrink(self) -> bool:
        """After a gradient that is not finite. False: it is not the scale that makes it so."""
        if self.value <= 1:
            return False
        self.value, self.good_steps, self.overflows = self.value / 2, 0, self.overflows + 1
        return True

    def grow(self) -> None:
        """After a good step."""
        self.good_steps += 1
        if self.good_steps == self.GROW_AFTER:
            self.value, self.good_steps = self.value * 2, 0

    def kept(self) -> list[float]:
        """What makes the same one again, for checkpoints."""
        return list(astuple(self))


def update(
    optimizer: torch.optim.Optimizer, lr: float, grad_clip: float, has_targets: Tensor, loss_scale: LossScale | None = None
) -> Tensor:
    """Clip and step, on all ranks or none: without targets, or if the norm is not finite, fused AdamW changes nothing.

    The host does not have to know: `found_inf` and `grad_scale` are read where the step runs. Collective.

    has_targets: [] bool
    returns: the gradient norm before clipping, []
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scale = loss_scale.value if loss_scale else 1.0
    norm = whole(nn.utils.clip_grad_norm_(parameters, scale * (grad_clip or math.inf))) / scale
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    optimizer.grad_scale = norm.new_full((), scale) if loss_scale else None
    optimizer.found_inf = (~norm.isfinite() | ~has_targets.to(norm.device)).float()
    optimizer.step()
    optimizer.zero_grad()
    return norm


class RowsAdamW(torch.optim.AdamW):
    """AdamW on each rank's own rows: to the bit the same as on sharded tensors, without the Python that their operations cost.

    For the 784 matrices of LoRA that is 3.4 s of the first step and 12 ms of every other, on a CPU.
    """

    def _init_group(self, group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps) -> bool:
        is_complex = super()._init_group(group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        for tensors in (params, grads, exp_avgs, exp_avg_sqs):
            tensors[:] = map(own_rows, tensors)
        return is_complex


class AveragingAdamW(RowsAdamW):
    """AdamW that also keeps a moving average of the weights it trains, in float32, of each rank's own rows.

    After t steps it is the mean of the weights after each of them, weighted by decay ** (steps ago); the weights before
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
            if hasattr(self, "found_inf"):  # of `update`
                share = share.where(self.found_inf == 0, 0.0)
            own_rows(state["ema"]).lerp_(own_rows(parameter), share)

    @contextlib.contextmanager
    def averaged(self):
        """Within this context the parameters hold their averages; the model has to be sharded at both ends."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, state in self.state.items():
            mine, average = own_rows(parameter), own_rows(state["ema"])
            before = mine.clone()
            mine.copy_(average)
            average.copy_(before)


def averaged(optimizer: torch.optim.Optimizer):
    """The context in which the model's weights are those to evaluate and export: with --ema their averages."""
    has_average = isinstance(optimizer, AveragingAdamW) and optimizer.state
    return optimizer.averaged() if has_average else contextlib.nullcontext()
