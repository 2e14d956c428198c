"""A step's figures and where they go: metrics.jsonl always, TensorBoard where it is installed, Weights & Biases on request.

Rank 0 writes; on other ranks a `Monitor` does nothing. metrics.jsonl and samples/ are complete by themselves:
`bash launch.sh report OUTPUT_DIR` makes a page of them.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import statistics
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundfile
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from collate import Batch
from common import ConfigError, json_safe, write_whole
from distributed import Dist
from loss import LossSums, Objective, Summable

if TYPE_CHECKING:
    from generate.pictures import Medium

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


@dataclass(frozen=True)
class Gpu:
    """A card, by its data sheet."""

    name: str  # part of the name that the driver reports
    memory_gb: int  # as it is sold
    memory_gib: float  # as the driver reports it
    bf16_flops: float  # per second, dense, accumulated in float32
    memory_rate: float  # bytes per second
    link_rate: float  # bytes per second to other GPUs of the node, in one direction: NVLink or PCIe


GPUS = (
    Gpu("RTX 4060", 8, 7.6, 30e12, 272e9, 16e9),
    Gpu("RTX 3060", 12, 11.6, 25e12, 360e9, 32e9),
    Gpu("RTX 4080", 16, 15.7, 97e12, 717e9, 32e9),
    Gpu("RTX 4090", 24, 23.6, 165e12, 1008e9, 32e9),
    Gpu("RTX 5090", 32, 31.4, 209e12, 1792e9, 64e9),
    Gpu("L40S", 48, 44.5, 362e12, 864e9, 32e9),
    Gpu("H100", 80, 79.1, 989e12, 3350e9, 450e9),
    Gpu("A100", 80, 79.1, 312e12, 2039e9, 300e9),
    Gpu("H200", 141, 139.8, 989e12, 4800e9, 450e9),
    Gpu("B200", 180, 178.4, 2250e12, 8000e9, 900e9),
)


def find_gpu(driver_name: str) -> Gpu | None:
    """The card with this name; None for unknown ones, weaker variants included."""
    variants = r"(?! (Ti|SUPER|Laptop|PCIe|NVL)\b)"
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu.name}\b{variants}", driver_name)), None)


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


# ---------------------------------------------------------------------------------------------------------------------
# Where figures go


class Monitor:
    """One run's figures: OUTPUT/metrics.jsonl, one JSON object a line, and the same in TensorBoard and Weights & Biases.

    settings:   the run's, for the record
    steps_done: what a resumed run repeats after that is dropped
    project:    of Weights & Biases; "" for none
    is_main:    other ranks write nothing
    redo:       splits whose line at `steps_done` is dropped too: they are evaluated again
    """

    def __init__(
        self,
        output_dir: Path,
        settings: dict,
        steps_done: int = 0,
        project: str = "",
        is_main: bool = True,
        redo: Collection[str] = (),
    ):
        self.path = output_dir / "metrics.jsonl"
        self.is_main = is_main
        self._waiting: list[str] = []  # lines that could not be written yet
        self._failures: Counter[str] = Counter()
        self.sinks: list[TensorBoard | WeightsAndBiases] = []
        if is_main and self.path.exists():  # a resumed run repeats the steps after its checkpoint
            lines = self.path.read_text().splitlines()
            kept = "".join(f"{line}\n" for line in lines if _is_done(line, steps_done, redo))
            write_whole(self.path, lambda file: file.write(kept.encode()))
        if is_main and importlib.util.find_spec("tensorboard"):
            folder = output_dir / "tensorboard"
            self._try("TensorBoard", lambda: self.sinks.append(TensorBoard(folder, settings, steps_done)))
        if is_main and project:
            self.sinks.append(WeightsAndBiases(output_dir, settings, project))

    def write(self, *, split: str, step: int, **values: Any) -> None:
        """One line of metrics.jsonl; numbers and lists of numbers are curves elsewhere."""
        if not self.is_main:
            return
        self._waiting.append(json.dumps(json_safe({"split": split, "step": step, **values}), allow_nan=False) + "\n")
        self._try(str(self.path), self._append)
        curves = {f"{split}/{name}": value for name, value in flatten(values)}
        for sink in self.sinks:
            self._try(type(sink).__name__, functools.partial(sink.write, step, curves))

    def write_samples(self, step: int, media: Sequence[Medium]) -> None:
        for sink in self.sinks:
            self._try(type(sink).__name__, functools.partial(sink.write_samples, step, media))

    def _append(self) -> None:
        """Write the lines that wait, all or none."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a") as file:
                file.write("".join(self._waiting))
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise
        self._waiting.clear()

    def _try(self, name: str, write: Callable[[], object]) -> None:
        """Write; what fails ends no run: it is counted, and said when their number has doubled."""
        try:
            write()
        except Exception as error:  # the disk's, the network's, or a library's own
            self._failures[name] += 1
            count = self._failures[name]
            if count & (count - 1) == 0:
                waiting = f", {len(self._waiting)} lines wait" * (name == str(self.path))
                print(f"warning: {name}: failed {count} time(s){waiting}: {error}", file=sys.stderr, flush=True)


def _is_done(text: str, steps_done: int, redo: Collection[str]) -> bool:
    try:
        line = json.loads(text)
        return line["step"] < steps_done or (line["step"] == steps_done and line.get("split") not in redo)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # cut off by a kill, or of another version
        return False


def flatten(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers among values, those in lists by their index."""
    for name, value in values.items():
        for suffix, item in ((f"/{i}", v) for i, v in enumerate(value)) if isinstance(value, list) else [("", value)]:
            if isinstance(item, (int, float)) and not isinstance(item, bool):
                yield name + suffix, item


class TensorBoard:
    """Curves and the settings; of each sample its text, its codes as a picture, and its sounds."""

    def __init__(self, folder: Path, settings: dict, steps_done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=steps_done + 1 if steps_done else None)
        self.writer.add_text("settings", f"```\n{json.dumps(settings, indent=2)}\n```", steps_done)

    def write(self, step: int, curves: dict[str, float]) -> None:
        for name, value in curves.items():
            self.writer.add_scalar(name, value, step)

    def write_samples(self, step: int, media: Sequence[Medium]) -> None:
        for medium in media:
            self.writer.add_text(f"{medium.tag}/text", medium.text, step)
            self.writer.add_image(f"{medium.tag}/codes", medium.picture, step, dataformats="HWC")
            for kind, path in medium.sounds.items():
                samples, rate = soundfile.read(path, dtype="float32")
                self.writer.add_audio(f"{medium.tag}/{kind}", samples[None], step, sample_rate=rate)
        self.writer.flush()


class WeightsAndBiases:
    """The same at wandb.ai, or in OUTPUT/wandb with WANDB_MODE=offline."""

    def __init__(self, output_dir: Path, settings: dict, project: str):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"--wandb: {error}; pip install wandb, or leave the flag out") from None
        self.wandb = wandb
        kept = output_dir / ".wandb-id"  # a resumed run goes on in the same place
        if not kept.is_file():
            kept.write_text(uuid.uuid4().hex[:12])
        where = {"project": project, "name": output_dir.name, "dir": str(output_dir)}
        where |= {"config": settings, "id": kept.read_text(), "resume": "allow"}
        try:
            self.run = wandb.init(**where)
        except wandb.Error as error:  # not logged in, no network
            print(f"warning: --wandb {project}: {error}; kept in {output_dir / 'wandb'}, for wandb sync", file=sys.stderr)
            self.run = wandb.init(**where, mode="offline")

    def write(self, step: int, curves: dict[str, float]) -> None:
        self.run.log(curves, step=step)

    def write_samples(self, step: int, media: Sequence[Medium]) -> None:
        found = {f"{medium.tag}/codes": self.wandb.Image(medium.picture, caption=medium.text) for medium in media}
        for medium in media:
            for kind, path in medium.sounds.items():
                found[f"{medium.tag}/{kind}"] = self.wandb.Audio(str(path), caption=medium.text)
        self.run.log(found, step=step)
