"""Generate speech with the base, a full fine-tune, an adapter or a training checkpoint.

One text, in the voice of a reference clip:
    bash launch.sh generate --ckpt runs/voice/final --text "What shall I say?" --ref_audio a.wav --ref_text "..." --out b.wav
A dialogue: the first reference clip is SPEAKER0. Long texts are generated in chunks, each with the chunks before it in its prompt:
    bash launch.sh generate --ckpt runs/voice/final --text_file script.txt --ref_audio a.wav b.wav --ref_text "..." "..."
Many lines, on every GPU of this machine; answers to records of a manifest are compared with the records' own:
    bash launch.sh generate --ckpt runs/voice/final --lines lines.jsonl --out runs/voice/generated

A line is {"text": ..., "ref_audio": path or list, "ref_text": text or list, "scene": ..., "system": ..., "id": ..., "seed": ...},
of which only the text is needed, or a ChatML record as for training. Paths are relative to the file. --out is then a
folder: results.jsonl, and for each line its codes as .npy and its sound as .wav.

With ref_text, a reference clip becomes an earlier exchange of the prompt, without in the system turn. With
`--audio_tokenizer none` there is no codec: references are codes, and only codes are written.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from common import ConfigError, DataError
from config import Config
from distributed import Dist, says_errors, setup_distributed
from generate.engine import Engine, Job
from generate.files import write_both, write_only, write_results
from generate.lines import Chunking, Line, line_of_request, read_lines
from generate.models import load_model
from generate.official import Sampling
from generate.scores import Score, table
from prepare.audio import AudioStore, codec_frame_rate_hz, load_codec
from prepare.manifest import Record

# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """raises: ConfigError with every problem at once"""
    parser = argparse.ArgumentParser(
        prog="bash launch.sh generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt", required=True, help="a full model or adapter (final/), checkpoints/step_N, or one on the Hub")
    parser.add_argument("--base_ckpt", default="", help="an adapter's base; default: the one it was trained on")
    parser.add_argument("--base_revision", default="", help="revision of a checkpoint on the Hub")
    parser.add_argument("--merge_lora", action="store_true", help="merge the adapter first: faster, rounded to the weights' dtype")
    parser.add_argument("--quantize", choices=("none", "nf4"), default="none", help="the layers' weights in 4 bits")
    parser.add_argument("--audio_tokenizer", default=Config.audio_tokenizer, help="the codec: a folder, or on the Hub; or none")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="the text; several speakers as lines that begin with [SPEAKER0], [SPEAKER1], ...")
    what.add_argument("--text_file", type=Path, help="the same from a file")
    what.add_argument("--lines", type=Path, help="JSONL of many texts, or a manifest")
    parser.add_argument("--ref_audio", nargs="+", help="a reference clip for each speaker: waveforms or codes")
    parser.add_argument("--ref_text", nargs="+", help="their transcripts")
    parser.add_argument("--scene", help="a scene description, such as 'A quiet room.'")
    parser.add_argument("--system", help="a system turn of your own instead of the official one; '' for none")
    parser.add_argument("--normalize", choices=("yes", "no"), default="yes", help="texts as the official example changes them")
    parser.add_argument("--chunk_words", type=int, default=100, help="longer texts are generated in chunks; 0: never")
    parser.add_argument("--chunk_turns", type=int, default=0, help="most speaker turns in a chunk; 0: any number")
    parser.add_argument("--chunk_context", type=int, default=2, help="earlier chunks that stay in the prompt")
    parser.add_argument("--batch_size", type=int, default=0, help="prompts that are generated together; 0: as many as fit")
    parser.add_argument("--official", action="store_true", help="one at a time, by the official generate()")
    for f in dataclasses.fields(Sampling):
        parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default)
    parser.add_argument("--force_audio", action="store_true", help="the prompt ends with <|audio_out_bos|>, so the answer is audio")
    parser.add_argument("--out", type=Path, help="a .wav or .npy file, or with --lines a folder; default: speech.wav, generated/")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: the checkpoint's")
    args = parser.parse_args(argv)
    args.codec = "" if args.audio_tokenizer == "none" else args.audio_tokenizer
    if args.out is None:
        args.out = Path("generated" if args.lines else "speech.wav" if args.codec else "speech.npy")
    if problems := _find_problems(args):
        raise ConfigError("; ".join(problems))
    return args


def _find_problems(args: argparse.Namespace) -> list[str]:
    problems = [
        f"--{name} {getattr(args, name)}: must be 0 or more"
        for name in ("chunk_words", "chunk_turns", "chunk_context", "temperature", "top_k", "ras_win_len", "seed", "batch_size")
        if getattr(args, name) < 0
    ]
    if not 0 < args.top_p <= 1:
        problems.append(f"--top_p {args.top_p}: must be above 0 and at most 1")
    if args.max_new_tokens < 1:
        problems.append(f"--max_new_tokens {args.max_new_tokens}: must be at least 1")
    if args.official and args.batch_size > 1:
        problems.append("--official --batch_size: the official generate() takes one prompt at a time")
    if args.lines and any(value is not None for value in (args.ref_audio, args.ref_text, args.scene, args.system)):
        problems.append("--lines: references, scene and system turn belong into the lines themselves")
    if not args.lines and args.out.suffix not in ((".wav", ".npy") if args.codec else (".npy",)):
        problems.append(f"--out {args.out}: expected a {'.wav or ' if args.codec else ''}.npy file")
    return problems


def lines_of(args: argparse.Namespace) -> list[Line]:
    """raises: DataError"""
    chunking = Chunking(args.chunk_words, args.chunk_turns, args.normalize == "yes")
    if args.lines:
        return read_lines(args.lines, chunking)
    try:
        text = args.text if args.text_file is None else args.text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text_file {args.text_file}: cannot be read: {error}") from None
    value = {"text": text} | {key: getattr(args, key) for key in ("ref_audio", "ref_text", "scene", "system")}
    return [line_of_request(value, args.out.stem, Path(), "command line", chunking)]


def load_engine(args: argparse.Namespace, dist: Dist, records: Sequence[Record], scratch: Path) -> Engine:
    """The model, and the codec where waveforms are written or, in `records`, read. Collective."""
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    where = args.ckpt, args.base_ckpt, args.base_revision or None
    is_quantized = args.quantize == "nf4"
    model, tokenizer = dist.main_first(lambda: load_model(*where, dtype, dist.device, args.merge_lora, is_quantized))
    K, size = model.config.audio_num_codebooks, model.config.audio_codebook_size
    store = AudioStore(K, size, codec_frame_rate_hz(args.audio_tokenizer), scratch, args.codec)
    needed = dist.together(lambda: store.missing(records)) or (args.codec and args.out.suffix != ".npy")
    codec = dist.main_first(lambda: load_codec(args.codec, dist.device)) if needed else None
    sampling = Sampling(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Sampling)})
    batching = {"batch_size": args.batch_size, "official": args.official}
    return Engine(model, tokenizer, codec, sampling, store, scratch, args.force_audio, args.chunk_context, **batching)


def run(argv: Sequence[str]) -> tuple[list[dict], dict[str, Score]]:
    """Generate everything the arguments ask for, and say what was written.

    returns: the results in order and, by kind of record, the scores of those with a target
    raises:  UserError
    """
    args = parse_args(argv)
    dist = setup_distributed(args.device)
    lines = dist.together(lambda: lines_of(args))
    prompts = dist.together(lambda: [line.record([], line.chunks[0]) for line in lines])
    with tempfile.TemporaryDirectory() as scratch:
        targets = [Record(None, line.target, line.source) for line in lines]
        engine = load_engine(args, dist, [*prompts, *targets], Path(scratch))
        started = time.perf_counter()
        if args.lines:
            results, scores = generate_lines(engine, lines, args.out, dist)
        else:
            (job,) = dist.together(lambda: list(engine.generate(lines)))
            results, scores = [result_of(job) | write_only(args.out, job.codes, engine.codec)], {}
    if dist.is_main:
        _report(results, args.out, time.perf_counter() - started, engine.store.frame_rate_hz)
    return results, scores


def generate_lines(engine: Engine, lines: Sequence[Line], folder: Path, dist: Dist) -> tuple[list[dict], dict[str, Score]]:
    """Generate lines into a folder, shared among the ranks; see `run`. Collective."""
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
        yield job.line.name, (result_of(job, score) | write_both(folder / job.line.name, job.codes, engine.codec), score)


def result_of(job: Job, score: Score | None = None) -> dict:
    """A line of results.jsonl, without its files."""
    result = {
        "name": job.line.name,
        "kind": job.line.kind,
        "text": job.line.text,
        "source": job.line.source,
        "seed": job.seed,
        "chunks": len(job.clips),
        "frames": job.codes.shape[1],
        "stopped": job.stopped,
        "seconds": round(job.seconds, 2),
    }
    return result | ({"target_frames": score.target_frames, "code_match": score.code_match} if score else {})


def _report(results: Sequence[dict], out: Path, seconds: float, frame_rate_hz: float) -> None:
    """Say what was written, and what went wrong with which lines."""
    empty = [result["name"] for result in results if not result["frames"]]
    cut = [result["name"] for result in results if result["frames"] and not result["stopped"]]
    speech = sum(result["frames"] for result in results) / frame_rate_hz
    if len(empty) < len(results):
        what = f"{len(results) - len(empty)} clips to {out}" if len(results) > 1 else str(out)
        print(f"wrote {what}: {speech:.1f} s of speech in {seconds:.1f} s")
    if cut:
        print(f"{len(cut)} of {len(results)} did not end by themselves: {', '.join(cut[:20])}; see --max_new_tokens")
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
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking a gloo group down in good order can abort
