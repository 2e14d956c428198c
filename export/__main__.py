"""Finished models: written again in either layout, merged, averaged, described.

A finished model is a folder that other programs load: a full checkpoint in the boson or the transformers layout, or a LoRA
adapter in PEFT's format. Its README.md says what it was made from and how. Where a model is asked for, a run's folder is as
good: it stands for the model of its best step, else final/, else its newest whole checkpoint.

    bash launch.sh show FOLDER                                   # what a folder holds
    bash launch.sh export RUN OUT [--layout L]                   # its best model; also a model, or OUTPUT/checkpoints/step_N
    bash launch.sh merge ADAPTER [BASE] OUT [--layout L] [--manifest M]
    bash launch.sh average A B ... OUT [--layout L]

Tensors pass through one at a time, so memory holds the tensors of one output file (5 GB), never the whole model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import checkpoint
from common import CheckpointError, ConfigError
from config import AUDIO_TOKENIZER
from export import card, layouts, parity, pretrained, push
from export.merge import average, convert, merge
from export.read import Adapter, Full, find_model, open_model
from process.command import says_errors


def describe(folder: Path) -> str:
    """What a folder holds, in a few lines."""
    if (folder / "metrics.jsonl").is_file():
        states = [path.name for path in checkpoint.list_states(folder / "checkpoints")]
        finished = "finished: final" if (folder / "final").is_dir() else "not finished"
        chosen = f"\n{find_model(folder)[1]}" if states or (folder / "final").is_dir() else ""
        return f"{folder}: a run, {finished}; checkpoints: {', '.join(states) or 'none'}{chosen}"
    if (folder / checkpoint.STATE_FILE).is_file():
        state = {name: value for name, value in checkpoint.read_state(folder).items() if name != "files"}
        shapes, lines = pretrained.Stored(folder).shapes, ["a training state", json.dumps(state, indent=2)]
    else:
        model = open_model(folder)
        shapes, lines = model.shapes, _describe_model(model)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    return "\n".join([f"{folder}: {len(shapes)} tensors, {count:,} numbers", *lines])


def _describe_model(model: Full | Adapter) -> list[str]:
    if isinstance(model, Adapter):
        lora = model.lora
        return [
            f"a {'DoRA' if lora.use_dora else 'LoRA'} adapter, r={lora.r}, alpha={lora.lora_alpha}"
            f"{' (rank-stabilised)' * bool(lora.use_rslora)}, of {len(model.modules)} layers",
            f"base {lora.base_model_name_or_path}, revision {lora.revision}",
        ]
    c = model.config
    return [
        f"a full checkpoint in the {layouts.layout_of(model.folder)} layout, {c.torch_dtype or 'dtype unknown'}",
        f"{c.text_config.num_hidden_layers} layers, {c.audio_num_codebooks} codebooks of {c.audio_codebook_size}",
    ]


def choose_model(name: str, revision: str | None = None) -> Full | Adapter:
    """Open the model that was asked for; says which one it is where a run's folder was named."""
    model, note = find_model(pretrained.find_base(name, revision))
    print(note, end="\n" * bool(note))
    return open_model(model)


def _show(args: argparse.Namespace, about: card.About) -> None:
    print(describe(args.folder))


def _export(args: argparse.Namespace, about: card.About) -> None:
    source = choose_model(args.model, args.revision)
    if args.push:
        push.check(args.push, source, bool(args.layout))
    if isinstance(source, Full) or not args.layout:
        convert(source, args.out, args.layout or "boson", about)
    else:
        print(merge(source, base_of(source, None, args.out), args.out, args.layout, about))
    if isinstance(source, Adapter):
        small = (
            f"{args.out} is a LoRA adapter, which needs {source.base or 'its base'}; --layout boson or transformers merges them"
        )
        print(f"{args.model}: the adapter is merged into {source.base}" if args.layout else small)


def base_of(adapter: Adapter, name: str | None, out: Path) -> Full:
    """The base that was asked for, else the one that the adapter names."""
    named = adapter.lora.base_model_name_or_path
    if not (name or named):
        raise CheckpointError(f"{adapter.folder} does not name its base: bash launch.sh merge {adapter.folder} BASE {out}")
    return Full(pretrained.find_base(name or named, adapter.lora.revision if name in (None, named) else None))


def _merge(args: argparse.Namespace, about: card.About) -> None:
    adapter = choose_model(args.adapter)
    if not isinstance(adapter, Adapter):
        raise CheckpointError(f"{args.adapter} is not an adapter")
    base = base_of(adapter, args.base, args.out)
    print(merge(adapter, base, args.out, args.layout, about))
    if args.manifest:
        is_quantized = args.quantize == "nf4"
        report = parity.compare(adapter, base, args.manifest, args.records, args.audio_tokenizer, is_quantized)
        print(report)
        with open(args.out / "README.md", "a") as file:
            file.write(f"\n```\n{report}\n```\n")


def _average(args: argparse.Namespace, about: card.About) -> None:
    report = average([choose_model(model) for model in args.models], args.out, args.layout, about)
    if report:
        print(report)


COMMANDS = {
    "show": (_show, "what a folder holds"),
    "export": (_export, "write a run's best model, or any other, with all that a loader needs and a card"),
    "merge": (_merge, "add an adapter's changes to the base's weights"),
    "average": (_average, "the mean of several models"),
}


@says_errors
def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    out = args.out
    if args.private and not args.push:
        raise ConfigError("--private: nothing is uploaded without --push OWNER/NAME")
    if out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; choose another folder")
    about = card.About(args.push or (out.name if out else ""), ["bash", "launch.sh", *argv], args.language, args.samples)
    COMMANDS[args.command][0](args, about)
    if out:
        print(f"written: {out}; how to use it: {out / 'README.md'}")
    if args.push:
        push.push(out, args.push, args.private)
    return 0


def _parser() -> argparse.ArgumentParser:
    plain = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="bash launch.sh", description=__doc__, **plain)
    parser.set_defaults(out=None, push="", private=False, language=(), samples=False)
    commands = parser.add_subparsers(dest="command", required=True)
    made = {name: commands.add_parser(name, help=text, description=text, **plain) for name, (_, text) in COMMANDS.items()}
    made["show"].add_argument("folder", type=Path)
    made["export"].add_argument("model", help="a model here or on the Hub, a run, or OUTPUT/checkpoints/step_N")
    made["export"].add_argument("--revision", help="of a Hub repository; default: the original layout of the published model")
    made["export"].add_argument(
        "--language", nargs="+", metavar="CODE", default=(), help="languages for its card, such as: en de"
    )
    made["export"].add_argument("--samples", action="store_true", help="add sounds that the run has generated, and their texts")
    made["export"].add_argument(
        "--push", metavar="OWNER/NAME", default="", help="upload OUT to the Hub, for everyone; needs HF_TOKEN"
    )
    made["export"].add_argument("--private", action="store_true", help="--push into a private repository")
    made["merge"].add_argument("adapter", help="a PEFT adapter, a LoRA run, or OUTPUT/checkpoints/step_N of one")
    made["merge"].add_argument("base", nargs="?", help="a folder or a Hub repository; default: the one that the adapter names")
    made["merge"].add_argument("--manifest", type=Path, help="compare adapter and merged model on these records")
    made["merge"].add_argument("--quantize", choices=("none", "nf4"), default="none", help="also as it was trained, on NF4")
    made["merge"].add_argument("--records", type=int, default=4, help="how many of them (default: 4)")
    made["merge"].add_argument("--audio_tokenizer", default=AUDIO_TOKENIZER, help="codec, if the records name waveforms")
    made["average"].add_argument("models", nargs="+", help="full checkpoints, adapters, runs or training states, all of a kind")
    for name in ("export", "merge", "average"):
        made[name].add_argument("out", type=Path, help="a folder that does not exist yet")
        default, text = (None, ", and an adapter stays one; a layout merges it") if name == "export" else ("boson", "")
        made[name].add_argument("--layout", choices=layouts.LAYOUTS.values(), default=default, help=f"default: boson{text}")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
