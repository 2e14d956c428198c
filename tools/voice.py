"""From a recording to a voice in one command: cut, transcribe, check, pair, encode, train, export, compare.

    bash launch.sh voice talk.m4a more.wav --name anna                # hours of one person, in any format
    bash launch.sh voice clips/ --name anna --language de             # a folder of clips, with or without transcripts
    bash launch.sh voice talk.wav --name anna --minutes 60 --lr 1e-4  # an hour of training; flags of training win

Each stage is a command of its own, printed before it starts, and shows the time that is left. Everything goes to voices/NAME
(--out). After a stop or a failure the same command goes on where it was. Where inputs or arguments have changed (a transcript in
OUT/cuts.jsonl, say), the stages from there on are done again; what they had made moves to OUT/earlier-N. Without OUT/plan.json
settings are chosen anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch

from common import ConfigError, read_json
from config import AUDIO_TOKENIZER, BASE_CKPT, parse_config, to_argv
from export.read import find_model
from prepare.audio import MAX_TRANSCRIBED_SEC, duration_sec
from prepare.folders import Listing
from prepare.manifest import AudioPart, share_held_out
from prepare.rows import WAVEFORM_SUFFIXES
from process.command import parser_of, says_errors
from process.gpu import on_gpu
from tools.stages import STATE, Stage, follow, shown

CONSENT = "the voice must be your own, or one whose owner has agreed to this"
COMPARED = ("en", "zh")  # languages whose transcripts `evaluate` compares
SAMPLES_PER_STEP, CLONE_SEC = 8, 8.0  # of training; of a good reference clip


def stages_of(args: argparse.Namespace, out: Path, kind: str, flags: Sequence[str]) -> list[Stage]:
    """flags: of training, and stronger than what is chosen here"""
    lines = out / ("cuts.jsonl" if kind == "recordings" else "lines.jsonl")
    train, val, run, page = out / "paired/train.jsonl", out / "paired/val.jsonl", out / "run", out / "run/report.html"
    asr = to_argv({"model": args.asr_model, "language": args.language})
    codec, base = to_argv({"audio_tokenizer": args.audio_tokenizer}), to_argv({"base_ckpt": args.base_ckpt})
    data = to_argv({"train_manifest": train, "codes_dir": out / "codes"})
    stages: list[Stage] = []

    def add(name: str, about: str | Callable[[], str], argv: list, makes: Sequence[str] = (), **how) -> None:
        stages.append(Stage(name, about, argv, makes, **how))

    if kind == "recordings":
        cut, made = ["prepare", "cut", *args.input, "--out", lines], ("cuts.jsonl", "cuts_audio", "cuts.left_out.jsonl")
        add("cut", "find the speech, cut it at pauses", [*cut, "--speaker", args.name], made, reads=[*args.input, *asr])
    if kind != "dataset":
        clips = [lines] if kind == "recordings" else args.input
        add("transcribe", "write down what is said", ["prepare", "transcribe", *clips, *asr], goes_on=True)
    if kind != "recordings":
        read = ["prepare", "convert", *args.input, lines, "--speaker", args.name]
        add("read", "find clips and transcripts", read, ["lines.jsonl"], reads=args.input)
    check = ["prepare", "check", lines, "--report", out / "check.html"]
    add("check", lambda: f"open {num_lines(lines)} clips, list what is wrong", check, ["check.html"], reads=[lines])
    pair = ["prepare", "pair", lines, out / "paired", "--val_share"]
    pair += [lambda: [f"{share_held_out(0.05, num_lines(lines), most=0.5):.3f}"]]  # four lines, each with a reference
    add("pair", "give references, hold lines out", pair, ["paired"], reads=[lines])
    encode = ["prepare", "encode", train, val, "--out", out / "codes", *codec]
    add("encode", lambda: f"turn {num_lines(train) + num_lines(val)} clips into codes", encode, reads=[train, val], goes_on=True)
    if args.gpu:
        of_plan = {"batch_size": args.batch_size, "ranks": args.ranks, "json": out / "plan.json"}
        add("plan", f"settings for {args.gpu}", ["plan", *data, *base, *codec, *to_argv(of_plan)], ["plan.json"])
    places = to_argv({"val_manifest": val, "output_dir": run, "resume": "auto"})
    fit = ["train", *data, *places, *base, *codec, lambda: to_argv(Schedule.of(args, out).flags), *flags]
    listen = f"to listen while it trains, {page}:\n    {shown(['report', run])}"
    add("train", lambda: f"{Schedule.of(args, out).about}; {listen}", fit, ["run/final", "run"], goes_on=True)
    add("report", f"curves and samples: {page}", ["report", run], ["run/report.html"])
    add("export", "the model of the best step", ["export", run, out / "model"], ["model"])
    of_judges = {"asr_model": args.asr_model, "sv_model": args.sv_model, "language": args.language}
    of_judges |= {} if args.language in COMPARED else {"asr_model": "none", "language": "en"}  # what evaluate can compare
    models = to_argv({"ckpt": run / "final", "against": args.base_ckpt, "lines": val, "out": out / "evaluation"})
    compare = ["evaluate", *models, *codec, *to_argv(of_judges)]
    add("evaluate", lambda: f"the model against the base, on {num_lines(val)} held-out lines", compare, ["evaluation"])
    return stages


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@dataclass
class Schedule:
    """Settings of training by the plan, the number of clips and --minutes: starting points, not the result of a search."""

    flags: dict
    about: str

    @classmethod
    def of(cls, args: argparse.Namespace, out: Path) -> Schedule:
        count, row = num_lines(out / "paired/train.jsonl"), choose(read_json(out / "plan.json"), args) if args.gpu else {}
        accum = max(1, SAMPLES_PER_STEP // (args.batch_size * args.ranks))
        steps = math.ceil(count / (args.batch_size * args.ranks * accum))  # of an epoch
        hours = row.get("hours", math.nan) * count / 1000  # of an epoch
        epochs = max(1, int(args.minutes / 60 / hours)) if args.minutes else min(30, max(3, math.ceil(200 / steps)))
        every = math.ceil(steps * epochs / 8)
        flags = {"batch_size": args.batch_size, "grad_accum": accum, "epochs": epochs}
        flags |= {"warmup_steps": math.ceil(steps * epochs / 20), "lora_r": 16, "final": "best"}
        flags |= dict.fromkeys(("val_steps", "save_steps", "sample_steps"), every)
        if row:
            flags |= {"quantize": "nf4" if row["base"] == "nf4" else "none", "activation_checkpointing": row["checkpointing"]}
        return cls(
            flags, f"{count} clips, {epochs} epochs of {steps} steps" + f", about {hours * epochs:.1f} hours" * bool(row)
        )


def choose(rows: Sequence[dict], args: argparse.Namespace) -> dict:
    """The fastest LoRA that fits, with its `hours` for 1,000 clips on a card of about that size. raises: ConfigError"""
    ways = [row for row in rows if row["training"] == "lora" and row["checkpointing"] != "selective"]
    if not (fitting := [row for row in ways if row["needed_gib"] <= args.memory_gib]):
        least = min(row["needed_gib"] for row in ways)
        raise ConfigError(f"{args.gpu}: {least:.1f} GiB are needed; try --batch_size 1, or see what bash launch.sh plan says")
    best = min(fitting, key=lambda row: (row["base"] != "bf16", row["checkpointing"] != "none"))
    sizes = [int(size) for size in best["hours_per_1000_clips"] if int(size) <= args.memory_gib * 1.08]
    return best | {"hours": best["hours_per_1000_clips"][str(max(sizes))] if sizes else math.nan}


def kind_of(inputs: Sequence[Path]) -> str:
    """recordings, which are cut; clips without transcripts; a dataset in any other form. raises: ConfigError"""
    if missing := [path for path in inputs if not path.exists()]:
        raise ConfigError(f"{missing[0]}: no such file or folder")
    if all(path.is_file() and path.suffix.lower() in WAVEFORM_SUFFIXES for path in inputs):
        return "recordings"
    if len(inputs) > 1:
        raise ConfigError("name any number of recordings, or one folder or table of clips")
    files = Listing(inputs[0]).files if inputs[0].is_dir() else []
    if not files or not all(name.lower().endswith(WAVEFORM_SUFFIXES) for name in files):
        return "dataset"
    longest = max(duration_sec(AudioPart(inputs[0] / name)) for name in files)
    return "recordings" if longest > MAX_TRANSCRIBED_SEC else "clips"


def keep_reference(out: Path) -> Path:
    """A clip of the training data and its transcript, as files that `generate` takes."""
    clips = []
    for line in (out / "paired/train.jsonl").read_text(encoding="utf-8").splitlines():
        *_, user, answer = json.loads(line)["messages"]
        clips.append((answer["content"], user["content"]))
    part, text = min(clips, key=lambda clip: abs(clip[0].get("duration", CLONE_SEC) - CLONE_SEC))
    with soundfile.SoundFile(out / "paired" / part["audio_url"]) as file:
        file.seek(round(part.get("offset", 0) * file.samplerate))
        samples = file.read(round(part["duration"] * file.samplerate) if "duration" in part else -1)
        soundfile.write(out / "reference.wav", samples, file.samplerate)
    (out / "reference.txt").write_text(text, encoding="utf-8")
    return out / "reference.wav"


def show_end(args: argparse.Namespace, out: Path) -> None:
    """What was made, how it compares with the base, and how it is used."""
    print(f"\n{args.name}: {out / 'model'}; {find_model(out / 'run')[1]}")
    print(f"listen: {out / 'run/report.html'}, {out / 'evaluation/evaluation.html'}\nuse it:")
    speak = ["--ref_audio", keep_reference(out)] + ["--audio_tokenizer", args.audio_tokenizer] * (
        args.audio_tokenizer != AUDIO_TOKENIZER
    )
    for argv in (
        ["generate", "--ckpt", out / "model", "--text", "What shall I say?", *speak, "--out", "hello.wav"],
        ["generate", "--ckpt", out / "model", "--text_file", "script.txt", *speak, "--out", "script.wav"],
        ["merge", out / "model", out / "merged", "--layout", "transformers"],
    ):
        print(f"    {shown(argv)}")


@says_errors
def main(argv: Sequence[str]) -> int:
    parser = parser_of("voice", __doc__)
    parser.add_argument("input", nargs="+", type=Path, help="recordings; or one folder or table of clips")
    parser.add_argument("--name", required=True, help="of the voice")
    parser.add_argument("--language", default="en", help="(default: en)")
    parser.add_argument("--minutes", type=float, default=0, help="of training, about; default: by the number of clips")
    parser.add_argument("--base_ckpt", default=BASE_CKPT)
    parser.add_argument("--audio_tokenizer", default=AUDIO_TOKENIZER, help="the codec")
    parser.add_argument(
        "--asr_model", default="openai/whisper-large-v3", help="speech recognition, to transcribe and to compare"
    )
    parser.add_argument("--sv_model", default="microsoft/wavlm-base-plus-sv", help="speaker verification, to compare; or none")
    parser.add_argument("--out", type=Path, help="default: voices/NAME")
    args, flags = parser.parse_known_args(argv)
    cfg = parse_config(["--train_manifest", "-", "--output_dir", "-", *flags])  # typos, before hours of work
    out, args.gpu = args.out or Path("voices", args.name), ""
    if Path(args.name).name != args.name:
        raise ConfigError(f"--name {args.name}: a word, such as anna")
    args.batch_size, args.ranks = cfg.samples, int(os.environ.get("NPROC", 1))
    if on_gpu(cfg.device):
        args.ranks = int(os.environ.get("NPROC", torch.cuda.device_count()))
        args.memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        args.gpu = f"{args.ranks} x {torch.cuda.get_device_name()} of {args.memory_gib:.0f} GiB"
    elif args.minutes:
        raise ConfigError("--minutes: how many steps they are can be told for a GPU only; give --epochs")
    if out.exists() and not (out / STATE).is_file() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"{out}: holds something else; choose another folder with --out")
    state = read_json(out / STATE) if out.exists() else {"stages": {}}
    if state.get("input") != [str(path) for path in args.input]:  # what had no transcripts may have them by now
        state |= {"input": [str(path) for path in args.input], "kind": kind_of(args.input)}
    print(f"{args.name}, from {state['kind']}, in {out}, on {args.gpu or 'the CPU'}; {CONSENT}", flush=True)
    status = follow(stages_of(args, out, state["kind"], flags), out, state)
    if (out / "model").exists():
        show_end(args, out)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
