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
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from torch import Tensor

from common import ConfigError, DataError
from config import Config
from data import ChatMLDataset
from distributed import Dist, says_errors, setup_distributed
from generate.files import write_both, write_only, write_results
from generate.lines import Chunking, Line, line_of_request, read_lines
from generate.models import load_model
from generate.official import Sampling, as_prompt, generate_one, join
from generate.scores import Score, table
from prepare.audio import AudioStore, codec_frame_rate_hz, load_codec
from prepare.manifest import Record

# ---------------------------------------------------------------------------------------------------------------------
# Line -> codes


@dataclass
class Engine:
    """A model and what it takes to generate lines with it.

    codec:   None where there are only codes
    context: earlier chunks of a long text that stay in the prompt
    scratch: for clips that are encoded, and chunks that are generated, on the way
    """

    model: HiggsAudioModel
    tokenizer: Any
    codec: Any
    sampling: Sampling
    store: AudioStore
    scratch: Path
    force_audio: bool = False
    context: int = 2

    def encode(self, record: Record) -> None:
        """Encode the record's waveforms where that is not done yet; raises DataError for what is no audio."""
        if missing := self.store.missing([record]):
            for problem in filter(None, self.store.encode(lambda: self.codec, missing)):
                raise DataError(problem)

    def generate(self, line: Line) -> tuple[Tensor, bool]:
        """The codes [K, T] of all chunks, one after the other, and whether each answer ended by itself."""
        clips, history, stopped = [], [], True
        sampling = self.sampling if line.seed is None else dataclasses.replace(self.sampling, seed=line.seed)
        for number, chunk in enumerate(line.chunks):
            record = line.record(history[-2 * self.context :] if self.context else [], chunk)
            self.encode(record)
            prompt = as_prompt(ChatMLDataset([record], self.tokenizer, self.store)[0], self.tokenizer, self.force_audio)
            answer = generate_one(self.model, self.tokenizer, prompt, **sampling.arguments())
            codes = join(answer.codes, self.store.num_codebooks)
            clips.append(codes)
            stopped = stopped and answer.stopped
            if codes.shape[1]:  # an empty chunk is no example for the next
                clip = self.scratch / f"{line.name}.{number}.npy"
                np.save(clip, codes.numpy())
                part = {"type": "audio", "audio_url": str(clip.resolve())}
                history += [{"role": "user", "content": chunk}, {"role": "assistant", "content": part}]
        return join(clips, self.store.num_codebooks), stopped

    def target(self, line: Line) -> Tensor | None:
        """The right answer, [K, T]."""
        if not line.target:
            return None
        self.encode(Record(None, line.target, line.source))
        return join([self.store.codes(part, line.source) for part in line.target], self.store.num_codebooks)

    def answer(self, line: Line, write: Callable[[Tensor], dict]) -> tuple[dict, Score | None]:
        """Generate a line and write its codes; returns its line of results.jsonl, and its score where there is a target."""
        started = time.perf_counter()
        codes, stopped = self.generate(line)
        target = self.target(line)
        result = {
            "name": line.name,
            "kind": line.kind,
            "text": line.text,
            "source": line.source,
            "seed": self.sampling.seed if line.seed is None else line.seed,
            "chunks": len(line.chunks),
            "frames": codes.shape[1],
            "stopped": stopped,
            "seconds": round(time.perf_counter() - started, 2),
            **write(codes),
        }
        if target is None:
            return result, None
        score = Score.of(codes, stopped, target)
        return result | {"target_frames": target.shape[1], "code_match": score.code_match}, score


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
    parser.add_argument("--audio_tokenizer", default=Config.audio_tokenizer, help="the codec: a folder, or on the Hub; or none")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="the text; several speakers as lines that begin with [SPEAKER0], [SPEAKER1], ...")
    what.add_argument("--text_file", type=Path, help="the same from a file")
    what.add_argument("--lines", type=Path, help="JSONL of many texts, or a manifest")
    parser.add_argument("--ref_audio", nargs="+", help="a reference clip for each speaker: waveforms or codes")
    parser.add_argument("--ref_text", nargs="+", help="their transcripts")
    parser.add_argument("--scene", help="a scene description, such as 'A quiet room.'")
    parser.add_argument("--system", help="a system turn of your own instead of the official one; '' for none")
    parser.add_argument("--chunk_words", type=int, default=100, help="longer texts are generated in chunks; 0: never")
    parser.add_argument("--chunk_turns", type=int, default=0, help="most speaker turns in a chunk; 0: any number")
    parser.add_argument("--chunk_context", type=int, default=2, help="earlier chunks that stay in the prompt")
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
        for name in ("chunk_words", "chunk_turns", "chunk_context", "temperature", "top_k", "ras_win_len", "seed")
        if getattr(args, name) < 0
    ]
    if not 0 < args.top_p <= 1:
        problems.append(f"--top_p {args.top_p}: must be above 0 and at most 1")
    if args.max_new_tokens < 1:
        problems.append(f"--max_new_tokens {args.max_new_tokens}: must be at least 1")
    if args.lines and any(value is not None for value in (args.ref_audio, args.ref_text, args.scene, args.system)):
        problems.append("--lines: references, scene and system turn belong into the lines themselves")
    if not args.lines and args.out.suffix not in ((".wav", ".npy") if args.codec else (".npy",)):
        problems.append(f"--out {args.out}: expected a {'.wav or ' if args.codec else ''}.npy file")
    return problems


def lines_of(args: argparse.Namespace) -> list[Line]:
    """raises: DataError"""
    chunking = Chunking(args.chunk_words, args.chunk_turns)
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
    model, tokenizer = dist.main_first(
        lambda: load_model(args.ckpt, args.base_ckpt, args.base_revision or None, dtype, dist.device, args.merge_lora)
    )
    K, size = model.config.audio_num_codebooks, model.config.audio_codebook_size
    store = AudioStore(K, size, codec_frame_rate_hz(args.audio_tokenizer), scratch, args.codec)
    needed = dist.together(lambda: store.missing(records)) or (args.codec and args.out.suffix != ".npy")
    codec = dist.main_first(lambda: load_codec(args.codec, dist.device)) if needed else None
    sampling = Sampling(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Sampling)})
    return Engine(model, tokenizer, codec, sampling, store, scratch, args.force_audio, args.chunk_context)


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
            write = functools.partial(write_only, args.out, codec=engine.codec)
            results, scores = [dist.together(lambda: engine.answer(lines[0], write))[0]], {}
    if dist.is_main:
        _report(results, args.out, time.perf_counter() - started, engine.store.frame_rate_hz)
    return results, scores


def generate_lines(engine: Engine, lines: Sequence[Line], folder: Path, dist: Dist) -> tuple[list[dict], dict[str, Score]]:
    """Generate lines into a folder, shared among the ranks; see `run`. Collective."""
    write = {line.name: functools.partial(write_both, folder / line.name, codec=engine.codec) for line in lines}
    mine = lines[dist.rank :: dist.world_size]
    answers = dist.together(lambda: [engine.answer(line, write[line.name]) for line in mine])
    shares = dist.gather(answers)
    answers = [shares[i % dist.world_size][i // dist.world_size] for i in range(len(lines))]
    results = [result for result, _ in answers]
    if dist.is_main:
        write_results(folder, results)
    scores: dict[str, Score] = {}
    for line, (_, score) in zip(lines, answers):
        if score:
            scores[line.kind] = scores.get(line.kind, Score()) + score
    return results, scores


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
