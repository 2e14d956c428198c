"""Run a recorded training step again in one process, and name the samples that made it go wrong.

    bash launch.sh replay runs/voice/spikes/step_812-rank0.safetensors
    bash launch.sh replay FILE --resume runs/voice/checkpoints/step_800 --device cpu

train.py records the micro-batches of steps whose loss jumped or was not finite, one file per rank; give any one of them.
The weights are those of the newest checkpoint at that time, or of --resume; `--resume base` takes the base checkpoint.
Prints the losses of each sample, the worst first, then the step's loss and gradient norm now and in the run. Writes
nothing. The voice-consistency loss is left out: it compares the voices of different ranks.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

import checkpoint
import train
from collate import Batch, Packing
from common import ConfigError
from config import Config
from distributed import setup_distributed
from export import pretrained
from loss import IGNORE_INDEX, LabelSpec
from metrics import read_dump
from process.command import parser_of, says_errors


def read_step(path: Path) -> tuple[dict, list[Batch]]:
    """(what the run recorded about a step, its micro-batches of all ranks in the order that seeds dropout).

    raises: ConfigError if a rank's file is missing or of another kind
    """
    ranks = []
    try:
        about, _ = read_dump(path)
        for rank in range(about["world_size"]):
            ranks.append(read_dump(path.with_name(re.sub(r"rank\d+", f"rank{rank}", path.name)))[1])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a recorded step with one file per rank: {error}") from None
    return about, [batch for batches in zip(*ranks) for batch in batches]


def only_row(batch: Batch, row: int) -> Batch:
    """The same batch, labels of one sample only."""
    label_ids = torch.full_like(batch.label_ids, IGNORE_INDEX)
    label_ids[row] = batch.label_ids[row]
    N = batch.label_audio_ids.shape[1]
    lengths = torch.diff(batch.audio_out_ids_start, append=batch.audio_out_ids_start.new_tensor([N]))
    row_of_column = batch.audio_out_ids_start_group_loc.repeat_interleave(lengths)
    label_audio_ids = batch.label_audio_ids.masked_fill(row_of_column != row, IGNORE_INDEX)
    return dataclasses.replace(batch, label_ids=label_ids, label_audio_ids=label_audio_ids)


def pack(batch: Batch, labels: LabelSpec) -> Batch:
    """The same batch with its packing, which the recorded files leave out."""
    return dataclasses.replace(batch, packing=Packing.of(batch, labels.audio_in_token, labels.audio_out_token))


def losses_by_sample(task: train.Task, batches: list[Batch]) -> list[tuple[dict, str]]:
    """(losses, source) of every sample without dropout: not finite first, then from the highest loss down."""
    found = []
    with train.evaluating(task.model):
        for batch in batches:
            for row, source in enumerate(batch.sources):
                alone = pack(only_row(batch, row), task.labels) if batch.packing else only_row(batch, row)
                total, _ = train.forward(task.model, alone.to(task.dist.device), task.labels)
                found.append((task.objective.metrics(total.losses), source))
    return sorted(found, key=lambda item: item[0]["loss"] if math.isfinite(item[0]["loss"]) else math.inf, reverse=True)


def replay(path: Path, resume: str | None, device: str | None) -> None:
    about, batches = read_step(path)
    known = {f.name for f in dataclasses.fields(Config)}
    cfg = Config(**{name: value for name, value in about["config"].items() if name in known})
    dist = setup_distributed(device or cfg.device)
    folder = pretrained.find_base(cfg.base_ckpt, cfg.revision)
    config = pretrained.read_base_config(folder)
    model, _ = train.build_model(cfg, dist, config, folder)
    optimizer = train.build_optimizer(model, cfg)
    start = resume or about["resume"] or "base"
    if start != "base":
        checkpoint.read_state(Path(start))
        checkpoint.check_state(Path(start), model, optimizer)
        checkpoint.load_state(Path(start), model, optimizer)
    print(f"step {about['step']}, {len(batches)} micro-batches, weights of {start}")

    text, audio = about["alignment"]
    labels = dataclasses.replace(LabelSpec.of(config), text=text, audio=audio)
    # The voice term is left out: it compares the voices of different ranks.
    objective = dataclasses.replace(train.build_objective(cfg, config), consistency_weight=0.0)
    task = train.Task(model, optimizer, objective, labels, dist, grad_clip=0.0, seed=cfg.seed)
    if model.can_pack and config.encode_audio_in_tokens:
        batches = [pack(batch, labels) for batch in batches]
    print(f"\n{'loss':>8} {'text':>8} {'audio':>8}  sample")
    for values, source in losses_by_sample(task, batches):
        print(f"{values['loss']:8.4f} {values['text_loss']:8.4f} {values['audio_loss']:8.4f}  {source}")

    result = train.train_step(task, batches, step=about["step"] - 1, lr=0.0)
    if cfg.consistency_loss_weight:
        print("\nnow without the voice-consistency loss of the run")
    then = {name: float("nan") if about[name] is None else about[name] for name in ("loss", "grad_norm")}
    print(f"\n{'':12}{'now':>12} {'in the run':>12}")
    print(f"{'loss':12}{objective.metrics(result.total.losses)['loss']:12.6f} {then['loss']:12.6f}")
    print(f"{'grad norm':12}{result.total.grad_norm:12.6f} {then['grad_norm']:12.6f}")


@says_errors
def main(argv: list[str]) -> int:
    parser = parser_of("replay", __doc__)
    parser.add_argument("file", type=Path, help="OUTPUT/spikes/step_N-rankR.safetensors")
    parser.add_argument("--resume", help="checkpoint with the weights, or 'base'; default: the run's newest at that step")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the run's")
    args = parser.parse_args(argv)
    replay(args.file, args.resume, args.device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
