"""Finished models: written at the end of training, converted, merged, averaged, described.

A finished model is a folder that others load: a full checkpoint in one of the two layouts of layouts.py, or a LoRA adapter
in PEFT's format. README.md in it says what it was made from and how.

    python checkpoint.py FOLDER                            # what a folder holds
    python checkpoint.py export FOLDER OUT [--layout L]    # FOLDER: a full checkpoint, or OUTPUT/checkpoints/step_N
    python checkpoint.py merge ADAPTER [BASE] OUT [--layout L] [--manifest M]
    python checkpoint.py average FOLDER FOLDER ... OUT [--layout L]

Tensors pass through one at a time, so memory holds one output file's worth (MAX_FILE_BYTES), never the whole model.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import checkpoint
from checkpoint import Stored
from common import CheckpointError
from distributed import says_errors
from export import layouts
from export.merge import average, convert, merge
from export.read import Adapter, Full, open_model


def describe(folder: Path) -> str:
    """What a folder holds, in a few lines."""
    if (folder / "metrics.jsonl").is_file():
        states = [path.name for path in checkpoint.list_states(folder / "checkpoints")]
        finished = "finished: final" if (folder / "final").is_dir() else "not finished"
        return f"{folder}: a run, {finished}; checkpoints: {', '.join(states) or 'none'}"
    stored = Stored(folder)
    count = sum(torch.Size(shape).numel() for shape in stored.shapes.values())
    lines = [f"{folder}: {len(stored.shapes)} tensors, {count:,} numbers"]
    if (folder / checkpoint.STATE_FILE).is_file():
        state = checkpoint.read_state(folder)
        lines += ["a training state", json.dumps({name: value for name, value in state.items() if name != "files"}, indent=2)]
        return "\n".join(lines)
    model = open_model(folder)
    if isinstance(model, Adapter):
        lora = model.lora
        lines.append(f"a LoRA adapter, r={lora.r}, alpha={lora.lora_alpha}, of {len(model.modules)} layers")
        lines.append(f"base {lora.base_model_name_or_path}, revision {lora.revision}")
    else:
        c = model.config
        lines.append(f"a full checkpoint in the {layouts.layout_of(folder)} layout, {c.torch_dtype or 'dtype unknown'}")
        lines.append(f"{c.text_config.num_hidden_layers} layers, {c.audio_num_codebooks} codebooks of {c.audio_codebook_size}")
    return "\n".join(lines)


@says_errors
def main(argv: Sequence[str]) -> int:
    commands = {"export": _export, "merge": _merge, "average": _average}
    if not argv or argv[0] not in (*commands, "-h", "--help"):
        argv = ["show", *argv]
    args = _parser().parse_args(argv)
    command = shlex.join(["python", "checkpoint.py", *argv])
    if args.command == "show":
        print(describe(args.folder))
    elif args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise CheckpointError(f"{args.out} exists already; choose another folder")
    else:
        commands[args.command](args, command)
        print(f"written: {args.out}")
    return 0


def _export(args: argparse.Namespace, command: str) -> None:
    source = open_model(checkpoint.find_base(args.folder, args.revision))
    if isinstance(source, Adapter) and args.layout != "boson":
        raise CheckpointError(f"{args.folder} is an adapter, which has no layout; merge it with --layout {args.layout}")
    convert(source, args.out, args.layout, command)


def _merge(args: argparse.Namespace, command: str) -> None:
    adapter = open_model(args.adapter)
    if not isinstance(adapter, Adapter):
        raise CheckpointError(f"{args.adapter} is not an adapter")
    base = args.base or adapter.lora.base_model_name_or_path
    if not base:
        raise CheckpointError(f"{args.adapter} does not name its base; name it: merge ADAPTER BASE OUT")
    base = Full(checkpoint.find_base(base, adapter.lora.revision if base == adapter.lora.base_model_name_or_path else None))
    print(merge(adapter, base, args.out, args.layout, command))
    if args.manifest:
        from export import parity  # the model in memory, which only this option needs

        report = parity.compare(adapter, base, args.manifest, args.records, args.audio_tokenizer)
        print(report)
        with open(args.out / "README.md", "a") as file:
            file.write(f"\n```\n{report}\n```\n")


def _average(args: argparse.Namespace, command: str) -> None:
    report = average([open_model(folder) for folder in args.folders], args.out, args.layout, command)
    if report:
        print(report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="what a folder holds")
    show.add_argument("folder", type=Path)
    export = commands.add_parser("export", help="write a model again, in either layout, or finish a training state")
    export.add_argument("folder", help="a full checkpoint here or on the Hub, an adapter, or OUTPUT/checkpoints/step_N")
    export.add_argument("--revision", help="of a Hub repository; default: the original layout of the published checkpoint")
    merge = commands.add_parser("merge", help="add an adapter's changes to the base's weights")
    merge.add_argument("adapter", type=Path, help="a PEFT adapter, or OUTPUT/checkpoints/step_N of a LoRA run")
    merge.add_argument("base", nargs="?", help="a folder or a Hub repository; default: the one that the adapter names")
    merge.add_argument("--manifest", type=Path, help="compare adapter and merged models on these records")
    merge.add_argument("--records", type=int, default=4, help="how many of them (default: 4)")
    merge.add_argument("--audio_tokenizer", default="bosonai/higgs-audio-v2-tokenizer", help="codec, where they name waveforms")
    average = commands.add_parser("average", help="the mean of several checkpoints")
    average.add_argument("folders", type=Path, nargs="+", help="full checkpoints, adapters or training states, all of a kind")
    for command in (export, merge, average):
        command.add_argument("out", type=Path, help="a folder that does not exist yet")
        command.add_argument("--layout", choices=layouts.LAYOUTS.values(), default="boson")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
