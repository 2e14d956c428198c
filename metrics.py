"""A step's figures: losses, speed and health, and the batches of steps that were not sound. process/monitor.py writes them.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from collate import Batch
from common import json_safe, write_whole
from distributed import Dist
from loss import LossSums, Objective, Summable
from process.gpu import find_gpu

# ---------------------------------------------------------------------------------------------------------------------
# A step's figures


@dataclass
class Totals(Summable):
    """Sums over micro-batches: the loss's, and counts of what they were computed from."""

    losses: LossSums
    num_tokens: float  # without padding
    num_positions: float  # that the model works on, with padding
    num_pairs: float  # of a position and one that it attends to
    num_frames: float = 0.0  # of audio, without delay columns
    num_unreadable: float = 0.0  # samples that are left out
    num_clamped: float = 0.0  # samples that do not train
    pace: Tensor | float = 0.0  # [ranks, 2] seconds that each has waited for this step's data, and that its last step took
    grad_norm: Tensor | float = 0.0  # [] of all ranks together; rank 0 has it

    def sum_over(self, dist: Dist) -> Totals:
        """The same over all ranks, on the host: one all-reduce, one wait for the device. Collective."""
        values: list[Tensor | float] = []
        self.map(values.append)
        tensors = [value.detach().flatten() for value in values if isinstance(value, Tensor)]
        numbers = torch.tensor([float(value) for value in values if not isinstance(value, Tensor)])
        packed = torch.cat([*tensors, numbers.to(dist.device, non_blocking=True)])
        summed = dist.sum(packed).cpu()
        pieces = iter(summed[: -len(numbers)].split([len(tensor) for tensor in tensors]))
        counts = iter(summed[-len(numbers) :].tolist())
        return self.map(lambda v: next(pieces).view(v.shape) if isinstance(v, Tensor) else next(counts))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations that a training step cannot do without: those of its matrix products.

    A weight costs two for each position it meets, two more for the gradient of its input and, where it trains, two for its
    own; attention scores cost six for each pair, channel and product. Padding, recomputation, and logits without a target
    are of no use and do not count.
    """

    per_position: float  # attention's projections and one of the two FFNs, which are equally large
    per_pair: float  # of a position and one that it attends to
    per_text_target: float
    per_audio_row: float  # a position that predicts at least one code

    @classmethod
    def of(cls, model: HiggsAudioModel) -> Flops:
        parts = {"layers": 0.0, "text_lm_head": 0.0, "audio_lm_head": 0.0}
        for name, parameter in model.named_parameters():
            part = next((part for part in parts if part in name.split(".")), None)
            if part and parameter.ndim == 2 and ".audio_mlp." not in name and not name.startswith("audio_tower."):
                parts[part] += parameter.numel() * (6 if parameter.requires_grad else 4)
        attention = model.layers[0].self_attn
        per_pair = 12.0 * len(model.layers) * attention.num_heads * attention.head_dim
        return cls(parts["layers"], per_pair, parts["text_lm_head"], parts["audio_lm_head"])

    def total(self, positions: float, pairs: float, text_targets: float, audio_rows: float) -> float:
        """Of so many positions; see `collate.Packing`."""
        counts = (positions, pairs, text_targets, audio_rows)
        costs = (self.per_position, self.per_pair, self.per_text_target, self.per_audio_row)
        return sum(count * cost for count, cost in zip(counts, costs))


def step_metrics(
    total: Totals, objective: Objective, step_time_sec: float, flops: Flops, frame_rate_hz: float, dist: Dist
) -> dict:
    """Losses and speed of a step, from global totals."""
    tokens, losses = total.num_tokens, total.losses
    num_flops = flops.total(tokens, total.num_pairs, losses.text.targets.item(), losses.audio.targets.max().item())
    on_gpu = dist.device.type == "cuda"
    gpu = find_gpu(torch.cuda.get_device_name(dist.device)) if on_gpu else None
    return objective.metrics(losses) | {
        "tokens": int(tokens),
        "padding_ratio": 1 - tokens / total.num_positions,
        "tokens_per_sec": tokens / step_time_sec,
        "audio_sec_per_sec": total.num_frames / frame_rate_hz / step_time_sec,
        "mfu": num_flops / step_time_sec / (gpu.bf16_flops * dist.world_size) if gpu else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(dist.device) if on_gpu else None,
        "step_time_sec": step_time_sec,
        "data_wait_sec": total.pace[:, 0].tolist(),
        "rank_step_time_sec": total.pace[:, 1].tolist(),
    }


class Stragglers:
    """Names the rank that the others wait for, by the time it waits for its data."""

    STEPS, SHARE = 20, 0.2  # it is judged by so many steps, and said from this share of their time on

    def __init__(self):
        self.waits: list[list[float]] = []

    def add(self, waits: list[float], step_sec: float) -> str | None:
        self.waits.append(waits)
        if len(self.waits) < self.STEPS or len(waits) == 1:
            return None
        means, self.waits = [statistics.mean(of_rank) for of_rank in zip(*self.waits)], []
        slowest, usual = max(means), statistics.median_low(means)
        if slowest - usual < self.SHARE * (step_sec + slowest):
            return None
        where = f"rank {means.index(slowest)} waits {slowest:.2f} s a step for its data, others {usual:.2f} s"
        return f"{where}, and all wait for it: look at its disk and its --num_workers"


# ---------------------------------------------------------------------------------------------------------------------
# Spikes

# A loss is a spike if it is above the median of the last ones by more than `threshold` robust standard deviations (1.4826
# times the median absolute deviation, and at least 1 % of the median). The micro-batches of such steps, and of steps that
# were not finite, are kept in OUTPUT/spikes, one file per rank; `bash launch.sh replay FILE` runs them again.

WINDOW = 64  # losses that the median is taken of
MIN_LOSSES = 16  # fewer say nothing
MAX_DUMPS = 5  # per run: the first ones tell the story, and a run that diverges would fill the disk


def is_spike(loss: float, before: Sequence[float], threshold: float) -> bool:
    """Whether a loss is far above the last ones; never while they are few, or with `threshold` 0."""
    if not threshold or len(before) < MIN_LOSSES:
        return False
    median = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in before)
    return loss > median + threshold * max(deviation, 0.01 * abs(median))


def write_dump(folder: Path, about: dict[str, Any], batches: Sequence[Batch]) -> None:
    """This rank's micro-batches of one step in a file of their own; `about` (JSON) holds at least "step" and "rank"."""
    tensors, rest = {}, []
    for index, batch in enumerate(batches):
        # The packing follows from the rest; voices are compared with those of other ranks.
        values = {name: value for name, value in vars(batch).items() if name not in ("packing", "voices")}
        # clones: safetensors refuses tensors that share memory
        tensors |= {f"{index}.{name}": value.clone() for name, value in values.items() if isinstance(value, Tensor)}
        rest.append({name: value for name, value in values.items() if not isinstance(value, Tensor)})
    content = save(tensors, metadata={"about": json.dumps(json_safe(about)), "batches": json.dumps(rest)})
    write_whole(folder / f"step_{about['step']}-rank{about['rank']}.safetensors", lambda file: file.write(content))


def read_dump(path: Path) -> tuple[dict[str, Any], list[Batch]]:
    """What `write_dump` wrote; raises OSError, KeyError or SafetensorError for other files."""
    with safe_open(path, framework="pt") as file:
        about, rest = (json.loads(file.metadata()[name]) for name in ("about", "batches"))
        for name in file.keys():  # noqa: SIM118
            index, field = name.split(".")
            rest[int(index)][field] = file.get_tensor(name)
    return about, [Batch(**values) for values in rest]
