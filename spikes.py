"""Steps that went wrong: noticed, and kept so that they can be looked at again.

A loss is a spike when it lies above the median of the losses before it by more than `threshold` robust standard deviations
(1.4826 times the median absolute deviation, which one outlier cannot inflate, and never less than 1 % of the median, so
that a loss which hardly moves is not held to its own noise). Its micro-batches are written to OUTPUT/spikes, one file per
rank, as those of steps that were not finite; `python -m tools.replay FILE` runs them again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from checkpoint import json_safe, write_whole
from collate import ExtendedHiggsAudioBatchInput

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


def write_dump(folder: Path, about: dict[str, Any], batches: Sequence[ExtendedHiggsAudioBatchInput]) -> None:
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


def read_dump(path: Path) -> tuple[dict[str, Any], list[ExtendedHiggsAudioBatchInput]]:
    """What `write_dump` wrote; raises OSError, KeyError or SafetensorError for other files."""
    with safe_open(path, framework="pt") as file:
        about, rest = (json.loads(file.metadata()[name]) for name in ("about", "batches"))
        for name in file.keys():  # noqa: SIM118
            index, field = name.split(".")
            rest[int(index)][field] = file.get_tensor(name)
    return about, [ExtendedHiggsAudioBatchInput(**values) for values in rest]
