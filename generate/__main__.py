"""Generate speech with the base, a full fine-tune, an adapter or a training checkpoint.

One text, in the voice of a reference clip, whose transcript is a.txt; four takes of it:
    bash launch.sh generate --ckpt runs/voice/final --text "What shall I say?" --ref_audio a.wav --out b.mp3 --takes 4
A dialogue of named voices, which are files of the folder voices; long texts are generated in chunks, each with chunks before
it in its prompt:
    bash launch.sh generate --ckpt runs/voice/final --text_file script.txt --ref_audio belinda,chadwick --chunk_method speaker
Many lines, on every GPU of this machine; answers to records of a manifest are compared with the records' own:
    bash launch.sh generate --ckpt runs/voice/final --lines lines.jsonl --out runs/voice/generated

A line is {"text": ..., "ref_audio": path or list, "ref_text": text or list, "ref_in_system": true, "scene": ..., "system": ...,
"id": ..., "seed": ...}, of which only the text is needed, or a ChatML record as for training. Paths are relative to the
file. --out is then a folder: results.jsonl, and for each line its codes as .npy and its sound as .wav. Ctrl-C keeps what is done.

With a transcript, a reference clip becomes an earlier exchange of the prompt, without in the system turn. With
`--audio_tokenizer none` there is no codec: references are codes, and only codes are written.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import soundfile
import torch

from common import ConfigError, suggestion
from config import Config
from distributed import Dist, log, setup_distributed
from export.pretrained import find_base
from export.read import Full, find_model, open_model
from generate.engine import Engine, Job
from generate.files import SOUND_SUFFIXES, add_result, read_results, write_both, write_only, write_results
from generate.lines import Chunking, Line, line_of_request, read_lines, takes_of
from generate.models import load_model
from generate.official import Sampling
from generate.scores import Score, table
from generate.voices import VOICES, read_text
from prepare.audio import AudioStore, load_codec
from prepare.manifest import Record
from process.command import leave, parser_of, says_errors

MOST = 2**63  # of seeds, in upstream's sampling
OF_REQUESTS = ("normalize", "chunk_method", "chunk_words", "chunk_turns", "chunk_context", "context_frames", "voices")

# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: Sequence[str], others: Iterable[str] = ()) -> argparse.Namespace:
    """others: flags of a command that takes these as well; raises: ConfigError with every problem at once"""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if words := [word for word in unknown if word.startswith("-")] or unknown:
        raise ConfigError(f"unknown argument {words[0]}{suggestion(words[0], [*parser._option_string_actions, *others])}")
    args.codec = "" if args.audio_tokenizer == "none" else args.audio_tokenizer
    problems = [problem for is_one, problem in (*_wrong_values(args), *_ignored(args)) if is_one]
    if args.out is not None:
        problems += _problems_of_out(args)
    if problems:
        raise ConfigError("; ".join(problems))
    if args.out is None:
        first = Path("generated" if args.lines else "speech.wav" if args.codec else "speech.npy")
        numbered = (first.with_stem(f"{first.stem}-{number}") for number in itertools.count(2))
        args.out = next(out for out in itertools.chain([first], numbered) if not _taken(out, args))
    return args


def _parser() -> argparse.ArgumentParser:
    usage = "bash launch.sh generate --ckpt CKPT (--text TEXT | --text_file FILE | --lines FILE) [--FLAG VALUE ...]"
    parser = parser_of("generate", __doc__, usage=usage)
    add = parser.add_argument
    add("--ckpt", required=True, help="a full model, adapter, run (its best model) or checkpoints/step_N, here or on the Hub")
    add("--base_ckpt", default="", help="an adapter's base; default: the one it was trained on")
    add("--base_revision", default="", help="revision of a checkpoint on the Hub")
    add("--merge_lora", action="store_true", help="merge the adapter first: faster, rounded to the weights' dtype")
    add("--quantize", choices=("none", "nf4"), default="none", help="the layers' weights in 4 bits")
    add("--audio_tokenizer", default=Config.audio_tokenizer, help="the codec: a folder, or on the Hub; or none")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="the text; several speakers as lines that begin with [SPEAKER0], [SPEAKER1], ...")
    what.add_argument("--text_file", type=Path, help="the same from a file")
    what.add_argument("--lines", type=Path, help="JSONL of many texts, or a manifest")
    add("--ref_audio", nargs="+", help="a voice for each speaker, also as a,b: clips, named voices, profile:NAME or profile:WORDS")
    add("--ref_text", nargs="+", help="transcripts of the clips, or files of them; default: the .txt beside each clip, if there is one")
    add("--ref_in_system", action="store_true", help="references go into the system turn, without transcripts")
    add("--voices", type=Path, help="the folder of named voices (NAME.wav, NAME.txt) and of profile.yaml; default: voices")
    add("--scene", help="a scene description, such as 'A quiet room.', or a file of it")
    add("--system", help="a system turn of your own instead of the official one; '' for none")
    add("--normalize", choices=("yes", "no"), default="yes", help="texts as the official example changes them")
    add("--chunk_method", choices=("speaker", "word"), help="cut long texts only between speaker turns, or only by words")
    add("--chunk_words", type=int, help="most words of a chunk, cut between sentences if possible; 0: any number; default: 100")
    add("--chunk_turns", type=int, help="most speaker turns in a chunk; 0: any number; default: 0, with --chunk_method speaker 1")
    add("--chunk_context", type=_count_or_all, help="earlier chunks that stay in the prompt, or all; default: 2")
    add("--context_frames", type=int, help="only as many earlier chunks as have so many frames together (25 are a second)")
    add("--batch_size", type=int, default=0, help="prompts that are generated together; 0: as many as fit")
    add("--official", action="store_true", help="one at a time, by the official generate()")
    add("--compile", action="store_true", help="torch.compile of a step; takes minutes at the start, for many lines on a GPU")
    add("--takes", type=int, default=1, help="so many of each text, with the next seeds: NAME-1, NAME-2, ...")
    add("--retries", type=int, default=0, help="try a chunk so often again, with other seeds, that is empty, got stuck or did not end")
    for f in dataclasses.fields(Sampling):
        add(f"--{f.name}", type=type(f.default), default=f.default)
    add("--force_audio", action="store_true", help="the prompt ends with <|audio_out_bos|>, so the answer is audio")
    add("--out", type=Path, help="a .wav, .flac, .mp3, .ogg or .npy file, or with --lines a folder; default: the next free speech.wav")
    add("--force", action="store_true", help="overwrite --out")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: the checkpoint's")
    return parser


def _count_or_all(text: str) -> float:
    try:
        return math.inf if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, or all, found {text!r}") from None


def _wrong_values(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """(whether it is one, the problem)"""
    counts = ("chunk_words", "chunk_turns", "chunk_context", "context_frames", "retries", "batch_size")
    for name in (*counts, "temperature", "top_k", "ras_win_len", "seed"):
        yield not (getattr(args, name) or 0) >= 0, f"--{name} {getattr(args, name)}: must be 0 or more"
    for name in ("temperature", "seed"):
        yield getattr(args, name) >= MOST, f"--{name} {getattr(args, name)}: must be below 2^63"
    for name in ("max_new_tokens", "takes", "ras_win_max_num_repeat"):
        yield getattr(args, name) < 1, f"--{name} {getattr(args, name)}: must be at least 1"
    yield not 0 < args.top_p <= 1, f"--top_p {args.top_p}: must be above 0 and at most 1"
    yield args.text is not None and not args.text.strip(), "--text: is empty; give what is to be spoken"


def _ignored(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """Arguments that contradict each other, or that others would make ignored: (whether it is so, the problem)."""
    own = [value is not None for value in (args.ref_audio, args.ref_text, args.scene, args.system)]
    yield (
        bool(args.lines) and (any(own) or args.ref_in_system),
        "--lines: references, scene and system turn belong into the lines themselves",
    )
    yield args.official and args.batch_size > 1, "--official --batch_size: the official generate() takes one prompt at a time"
    yield args.official and args.compile, "--compile: --official is not compiled"
    yield args.quantize != "none" and args.compile, "--compile: does not go with --quantize nf4"
    yield (
        bool(args.voices and not args.lines and not args.ref_audio),
        "--voices: there is no --ref_audio that could name one of them",
    )
    by = args.chunk_method
    yield by == "speaker" and args.chunk_words is not None, "--chunk_words: --chunk_method speaker does not count words"
    yield by == "speaker" and args.chunk_turns == 0, "--chunk_turns 0: --chunk_method speaker needs at least 1"
    yield by == "word" and args.chunk_turns is not None, "--chunk_turns: --chunk_method word does not count turns"
    yield by == "word" and args.chunk_words == 0, "--chunk_words 0: --chunk_method word needs at least 1"
    whole = not by and args.chunk_words == 0 and not args.chunk_turns
    for name in ("chunk_context", "context_frames"):
        yield whole and getattr(args, name) is not None, f"--{name}: --chunk_words 0 leaves texts whole"
    yield args.chunk_context == 0 and args.context_frames is not None, "--context_frames: --chunk_context 0 keeps no chunks"
    default = Sampling()
    for name in ("top_k", "top_p"):
        given = getattr(args, name) != getattr(default, name)
        yield given and args.temperature == 0, f"--{name}: --temperature 0 always takes the likeliest code"
    given = args.ras_win_max_num_repeat != default.ras_win_max_num_repeat
    yield given and args.ras_win_len == 0, "--ras_win_max_num_repeat: --ras_win_len 0 allows any repetition"
    greedy = args.temperature == 0 and args.ras_win_len == 0
    yield greedy and args.takes > 1, "--takes: without sampling (--temperature 0 --ras_win_len 0) they would be the same"
    yield greedy and args.retries > 0, "--retries: without sampling (--temperature 0 --ras_win_len 0) they would be the same"
    yield args.force and args.out is None, "--force: without --out nothing is overwritten"


def _problems_of_out(args: argparse.Namespace) -> Iterator[str]:
    suffixes = [".npy"]
    if args.codec:
        suffixes += [suffix for suffix in SOUND_SUFFIXES if soundfile.check_format(suffix[1:].upper())]
    if not args.lines and args.out.suffix not in suffixes:
        yield f"--out {args.out}: expected a file that ends with {', '.join(suffixes)}"
    elif args.lines and (args.out.is_file() or args.out.suffix in (".npy", *SOUND_SUFFIXES)):
        yield f"--out {args.out}: --lines needs a folder"
    elif above := next((folder for folder in args.out.parents if folder.is_file()), None):
        yield f"--out {args.out}: {above} is a file, not a folder"
    elif _taken(args.out, args) and not args.force:
        yield f"--out {args.out}: is there already; choose another name, or --force to overwrite it"


def _taken(out: Path, args: argparse.Namespace) -> bool:
    if args.lines:
        return out.exists() and not (out.is_dir() and not any(out.iterdir()))
    return any(path.exists() for path in _files(out, args.takes))


def _files(out: Path, takes: int) -> list[Path]:
    """The files of a single text."""
    return [out.with_stem(f"{out.stem}-{number + 1}") for number in range(takes)] if takes > 1 else [out]


def lines_of(args: argparse.Namespace) -> list[Line]:
    """raises: DataError"""
    by_words, by_turns = args.chunk_method != "speaker", args.chunk_method == "speaker"
    words = (100 if args.chunk_words is None else args.chunk_words) if by_words else 0
    turns = int(by_turns) if args.chunk_turns is None else args.chunk_turns
    chunking = Chunking(words, turns, args.normalize == "yes")
    voices = args.voices or VOICES
    if args.lines:
        lines = read_lines(args.lines, chunking, voices)
        given = [name for name in OF_REQUESTS if getattr(args, name) not in (None, "yes")]
        if given and all(line.is_record for line in lines):
            raise ConfigError(f"--{given[0]}: {args.lines} holds only ChatML records, whose texts stay as they are; leave it out")
    else:
        text = args.text if args.text_file is None else read_text(args.text_file, "--text_file")
        keys = ("ref_audio", "ref_text", "ref_in_system", "scene", "system")
        value = {"text": text} | {key: getattr(args, key) for key in keys}
        lines = [line_of_request(value, args.out.stem, Path(), "command line", chunking, voices)]
    return takes_of(lines, args.takes, args.seed)


def _check_adapter(args: argparse.Namespace) -> None:
    """raises: UserError for arguments about an adapter's base where there is no adapter"""
    given = [name for name in ("base_ckpt", "merge_lora") if getattr(args, name)]
    given += ["base_revision"] * (bool(args.base_revision) and Path(args.ckpt).is_dir())
    if given and isinstance(open_model(find_base(args.ckpt, args.base_revision or None)), Full):
        raise ConfigError(f"--{given[0]}: {args.ckpt} is a full model, not an adapter; leave it out")


def load_engine(args: argparse.Namespace, dist: Dist, records: Sequence[Record], scratch: Path) -> Engine:
    """The model, and the codec where waveforms are written or, in `records`, read. Collective."""
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    folder, note = dist.main_first(lambda: find_model(find_base(args.ckpt, args.base_revision or None)))
    if note:
        log(dist, note)
    where = str(folder), args.base_ckpt, args.base_revision or None
    is_quantized = args.quantize == "nf4"
    model, tokenizer = dist.main_first(lambda: load_model(*where, dtype, dist.device, args.merge_lora, is_quantized))
    store = AudioStore.of(model.config, scratch, args.audio_tokenizer)
    needed = dist.together(lambda: store.missing(records)) or (args.codec and args.out.suffix != ".npy")
    codec = dist.main_first(lambda: load_codec(args.codec, dist.device)) if needed else None
    sampling = Sampling(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Sampling)})
    default = 2 if args.context_frames is None else math.inf
    return Engine(
        *(model, tokenizer, codec, sampling, store, scratch, args.force_audio),
        context=default if args.chunk_context is None else args.chunk_context,
        context_frames=math.inf if args.context_frames is None else args.context_frames,
        batch_size=args.batch_size,
        official=args.official,
        compiled=args.compile,
        retries=args.retries,
        show_progress=dist.is_main,
    )


def run(argv: Sequence[str]) -> tuple[list[dict], dict[str, Score]]:
    """Generate everything the arguments ask for, and say what was written.

    returns: the results in order and, by kind of record, the scores of those with a target
    raises:  UserError; KeyboardInterrupt after what is done is written
    """
    args = parse_args(argv)
    dist = setup_distributed(args.device)
    lines = dist.together(lambda: lines_of(args))
    prompts = dist.together(lambda: [line.record([], line.chunks[0]) for line in lines])
    dist.main_first(lambda: _check_adapter(args))
    results: list[dict] = []
    scores: dict[str, Score] = {}
    with tempfile.TemporaryDirectory() as scratch:
        targets = [Record(None, line.target, line.source) for line in lines]
        engine = load_engine(args, dist, [*prompts, *targets], Path(scratch))
        started, is_interrupted = time.perf_counter(), False
        try:
            if args.lines:
                results, scores = generate_lines(engine, lines, args.out, dist)
            else:
                files = dict(zip((line.name for line in lines), _files(args.out, args.takes)))
                for job in engine.generate(lines):
                    results.append(result_of(job) | write_only(files[job.line.name], job.codes, engine.codec))
                results.sort(key=lambda result: [*files].index(result["name"]))
        except KeyboardInterrupt:
            is_interrupted, results = True, read_results(args.out) if args.lines else results
        if dist.is_main:
            _report(results, len(lines), args.out, time.perf_counter() - started, engine.store.frame_rate_hz)
    if is_interrupted:
        raise KeyboardInterrupt
    return results, scores


def generate_lines(engine: Engine, lines: Sequence[Line], folder: Path, dist: Dist) -> tuple[list[dict], dict[str, Score]]:
    """Generate lines into a folder, shared among the ranks; see `run`. Collective.

    results.jsonl gets each line as it is done, and at the end all in order.
    """
    if dist.is_main:
        write_results(folder, [])
    dist.together(lambda: None)
    answers = dist.together(lambda: dict(_generate_into(engine, lines[dist.rank :: dist.world_size], folder)))
    answers = {name: answer for share in dist.gather(answers) for name, answer in share.items()}
    results = [answers[line.name][0] for line in lines]
    if dist.is_main:
        write_results(folder, results)
    scores: dict[str, Score] = {}
    for line in lines:
        if score := answers[line.name][1]:
            scores[line.kind] = scores.get(line.kind, Score()) + score
    return results, scores


def _generate_into(engine: Engine, lines: Sequence[Line], folder: Path) -> Iterator[tuple[str, tuple[dict, Score | None]]]:
    """(name, (line of results.jsonl, score where the target is known)) of each line as it is done."""
    targets = {line.name: engine.target(line) for line in lines}
    for job in engine.generate(lines):
        target = targets[job.line.name]
        score = None if target is None else Score.of(job.codes, job.stopped, target)
        result = result_of(job, score) | write_both(folder / job.line.name, job.codes, engine.codec)
        add_result(folder, result)
        yield job.line.name, (result, score)


def result_of(job: Job, score: Score | None = None) -> dict:
    """A line of results.jsonl, without its files."""
    result = {
        "name": job.line.name,
        "kind": job.line.kind,
        "text": job.line.text,
        "source": job.line.source,
        "seed": job.seed,
        "chunks": len(job.clips),
        "retries": job.retries,
        "frames": job.codes.shape[1],
        "stopped": job.stopped,
        "runaway": job.runaway,
        "seconds": round(job.seconds, 2),
    }
    result |= {"target_frames": score.target_frames, "code_match": score.code_match} if score else {}
    return result | ({} if job.is_done else {"interrupted": True})


def _report(results: Sequence[dict], num_lines: int, out: Path, seconds: float, frame_rate_hz: float) -> None:
    """Say what was written, and what went wrong with which lines."""
    done = sum("interrupted" not in result for result in results)
    if done < num_lines:
        print(f"interrupted: {done} of {num_lines} are done", file=sys.stderr)
    empty = [result["name"] for result in results if not result["frames"]]
    cut = [result["name"] for result in results if result["frames"] and not result["stopped"]]
    stuck = [f"{result['name']} ({result['runaway']})" for result in results if result["runaway"]]
    speech = sum(result["frames"] for result in results) / frame_rate_hz
    if len(empty) < len(results):
        files = [str(out.parent / result["file"]) for result in results if "file" in result]
        what = ", ".join(files) if files else f"{len(results) - len(empty)} clips to {out}"
        print(f"wrote {what}: {speech:.1f} s of speech in {seconds:.1f} s, {speech / seconds:.2g} times real time")
    if cut:
        print(f"{len(cut)} of {len(results)} did not end by themselves: {', '.join(cut[:20])}; see --max_new_tokens, --retries")
    if stuck:
        print(f"{len(stuck)} of {len(results)} got stuck: {', '.join(stuck[:20])}; see --retries")
    if empty:
        names = ", ".join(empty[:20])
        print(f"nothing was generated for {len(empty)} of {len(results)}: {names}; try --force_audio", file=sys.stderr)


@says_errors
def main(argv: Sequence[str]) -> int:
    results, scores = run(argv)
    if scores:
        print(table(scores))
    return 0 if all(result["frames"] for result in results) else 1


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
