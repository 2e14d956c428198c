"""Speech from a model: the base, a full fine-tune, an adapter or a training checkpoint, by the official `generate()` and the official collator.

One text, in the voice of a clip (with its transcript the clip is put as an earlier exchange, without in the system turn):
    python -m generate --ckpt runs/voice/final --text "What shall I say?" --ref_audio a.wav --ref_text "..." --out b.wav
A dialogue, the first reference being SPEAKER0; long texts are said in chunks, each with the chunks before it as context:
    python -m generate --ckpt runs/voice/final --text_file script.txt --ref_audio a.wav b.wav --ref_text "..." "..."
Many at once, on every GPU of this machine; records of a manifest are answered anew and compared with their own answer:
    torchrun --nproc_per_node=8 -m generate --ckpt runs/voice/final --lines lines.jsonl --out runs/voice/said

A line is {"text": ..., "ref_audio": path or list, "ref_text": text or list, "scene": ..., "system": ..., "id": ..., "seed": ...},
of which only the text is needed, or a ChatML record as for training. Paths are relative to the file. --out is then a
folder: results.jsonl, and for each line its codes as .npy and its speech as .wav. With `--audio_tokenizer none` there is no
codec: references are codes, and codes are all that is written.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor
from transformers import GenerationConfig

import checkpoint
import model_patch
from common import CheckpointError, ConfigError, DataError
from config import Config
from data import ChatMLDataset
from distributed import Dist, says_errors, setup_distributed
from export import layouts
from export.merge import merged
from export.read import ADAPTER_PREFIX, Adapter, Full, open_model
from generate.speech import (
    WORD,
    Sampling,
    Score,
    as_prompt,
    file_name,
    join,
    last_text,
    speak,
    split_answer,
    write_both,
    write_clip,
    write_results,
)
from prepare.audio import AudioStore, codec_frame_rate_hz, load_codec
from prepare.manifest import AudioPart, Record, parse_record, read_manifest

INSTRUCTION = "Generate audio following instruction."
LINE_KEYS = ("text", "ref_audio", "ref_text", "scene", "system", "id", "seed")

# ---------------------------------------------------------------------------------------------------------------------
# What to say


@dataclass(frozen=True)
class Line:
    """One thing to say."""

    name: str  # of its files
    turns: list[dict]  # ChatML before the text
    chunks: list[Any]  # contents of user turns, each said after the answer to the one before
    folder: Path  # what relative audio paths start from
    source: str  # for messages
    seed: int | None = None
    target: list[AudioPart] = dataclasses.field(default_factory=list)  # what should be said, where that is known
    kind: str = "records"  # by which scores are grouped

    def record(self, history: Sequence[dict], chunk: Any) -> Record:
        """The prompt of a chunk; raises DataError naming the problem."""
        turns = [*self.turns, *history, {"role": "user", "content": chunk}]
        return parse_record({"messages": turns}, self.folder, self.source, to_train=False)


def read_lines(path: Path, chunk_words: int, chunk_turns: int) -> list[Line]:
    """The lines of a JSON or JSONL file; raises DataError."""
    manifest = read_manifest(path)
    lines = []
    for index in range(len(manifest)):
        source, value = manifest.value(index)
        is_record = isinstance(value, dict) and "messages" in value
        make = line_of_record if is_record else line_of_request
        lines.append(make(value, f"{index:05d}", manifest.folder, source, chunk_words, chunk_turns))
    names = [line.name for line in lines]
    twice = next((line for line in lines if names.count(line.name) > 1), None)
    if twice:
        raise DataError(f"{twice.source}: id: several lines are called {twice.name}; give each its own")
    return lines


def line_of_record(value: dict, name: str, folder: Path, source: str, *_) -> Line:
    """A ChatML record, whose last answer (if it has one) is what should be said."""
    record = parse_record(value, folder, source, to_train=False)
    prompt, target = split_answer(record)
    turns = value["messages"][: len(prompt.chatml.messages)]
    if not turns or turns[-1]["role"] != "user":
        raise DataError(f"{source}: messages: the answer has to follow a user turn, the text to say")
    kind = str((record.chatml.misc or {}).get("kind", Line.kind))
    return Line(name, turns[:-1], [turns[-1]["content"]], folder, source, target=target, kind=kind)


def line_of_request(value: Any, name: str, folder: Path, source: str, chunk_words: int, chunk_turns: int) -> Line:
    """A text with its references; see this file's docstring."""
    if not isinstance(value, dict) or not isinstance(value.get("text"), str) or not value["text"].strip():
        raise DataError(f'{source}: expected {{"text": ...}} or a ChatML record with `messages`')
    unknown = set(value) - set(LINE_KEYS)
    if unknown:
        raise DataError(f"{source}: unknown keys {sorted(unknown)}; a line has {', '.join(LINE_KEYS)}")
    seed = value.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise DataError(f"{source}: seed: expected a whole number, 0 or more, found {seed!r}")
    audio, texts = (_as_list(value.get(key), f"{source}: {key}") for key in ("ref_audio", "ref_text"))
    if texts and len(texts) != len(audio):
        raise DataError(f"{source}: {len(audio)} ref_audio but {len(texts)} ref_text; give every transcript, or none")
    turns = context(audio, texts, value.get("scene") or "", value.get("system"))
    chunks = split_text(value["text"], chunk_words, chunk_turns)
    return Line(file_name(str(value.get("id", name))), turns, chunks, folder, source, seed)


def _as_list(value: Any, what: str) -> list[str]:
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
        raise DataError(f"{what}: expected text, or a list with one for each speaker")
    return values


def context(audio: Sequence[str], texts: Sequence[str], scene: str = "", system: str | None = None) -> list[dict]:
    """The turns before the text, phrased as the official inference phrases them.

    audio, texts: a reference clip for each speaker, and their transcripts; or no transcripts
    system:       the system turn's text instead of the official one; "" for no such turn
    """
    clips = [{"type": "audio", "audio_url": path} for path in audio]
    exchanges = []
    for number, (clip, text) in enumerate(zip(clips, texts)):
        tag = f"[SPEAKER{number}] " if len(clips) > 1 else ""
        exchanges += [{"role": "user", "content": tag + text}, {"role": "assistant", "content": clip}]
    if system is not None:
        content: Any = system
    elif clips and not texts:
        content = [f"{INSTRUCTION}\n\n<|scene_desc_start|>\n" + (f"{scene}\n\n" if scene else "")]
        for number, clip in enumerate(clips):
            content += [f"SPEAKER{number}: ", clip, "\n"]
        content[-1] += "<|scene_desc_end|>"
    elif scene:
        content = f"{INSTRUCTION}\n\n<|scene_desc_start|>\n{scene}\n<|scene_desc_end|>"
    else:
        content = "" if clips else INSTRUCTION
    return [{"role": "system", "content": content}, *exchanges] if content else exchanges


# ---------------------------------------------------------------------------------------------------------------------
# Long texts

SENTENCE = re.compile(r".+?(?:[.!?…]+[\"'”’)\]]*(?:\s+|$)|[。！？]+\s*|\n\s*\n|$)", re.DOTALL)
TURN = re.compile(r"^(?=[ \t]*\[SPEAKER\d+\])", re.MULTILINE)
TAG = re.compile(r"\s*(\[SPEAKER\d+\]\s*)?")


def split_text(text: str, max_words: int = 0, max_turns: int = 0) -> list[str]:
    """Chunks of at most so many words and speaker turns, cut between turns, else between sentences, else between words.

    max_words, max_turns: 0 for any number
    A chunk that begins inside a turn begins with its `[SPEAKERn]` again.
    """
    chunks: list[str] = []
    words = turns = 0
    for turn in filter(str.strip, TURN.split(text)):
        tag = TAG.match(turn)
        for index, piece in enumerate(_pieces(turn[tag.end() :], max_words)):
            opens, size = index == 0, len(WORD.findall(piece))
            if chunks and words + size <= (max_words or math.inf) and not (opens and turns == max_turns > 0):
                chunks[-1] += (tag[1] or "") + piece if opens else piece
                words, turns = words + size, turns + opens
            else:
                chunks.append((tag[1] or "") + piece)
                words, turns = size, 1
    return [chunk.strip() for chunk in chunks]


def _pieces(text: str, max_words: int) -> Iterator[str]:
    """Sentences with the space after them, and sentences of more than `max_words` in parts."""
    for sentence in SENTENCE.findall(text):
        starts = [match.start() for match in WORD.finditer(sentence)]
        bounds = [0, *starts[max_words::max_words], len(sentence)] if max_words else [0, len(sentence)]
        yield from (sentence[start:stop] for start, stop in itertools.pairwise(bounds) if start < stop)


# ---------------------------------------------------------------------------------------------------------------------
# Model


def load_model(
    ckpt: str, base_ckpt: str, revision: str | None, dtype: torch.dtype | None, device: torch.device, merge_lora: bool = False
) -> tuple[HiggsAudioModel, Any]:
    """(model, tokenizer) of a full checkpoint in either layout, of an adapter and its base, or of a training checkpoint.

    base_ckpt, revision: an adapter's base, where that is not what the adapter names
    dtype:               None for the checkpoint's
    raises: CheckpointError
    """
    source = open_model(checkpoint.find_base(ckpt, revision))
    if isinstance(source, Full):
        return load_full(source, ((name, source.read(name)) for name in source.shapes), dtype, device), source.tokenizer
    base = open_model(checkpoint.find_base(base_ckpt or source.base, revision or source.lora.revision))
    if not isinstance(base, Full):
        raise CheckpointError(f"{base.folder}: an adapter cannot be the base of another; give --base_ckpt")
    if merge_lora:
        return load_full(base, merged(source, base), dtype, device), base.tokenizer
    model = load_full(base, ((name, base.read(name)) for name in base.shapes), dtype, device)
    insert_adapter(source, model)
    return model, base.tokenizer


def load_full(
    base: Full, named: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> HiggsAudioModel:
    """The official model with these weights, which go to the device one tensor at a time; dtype None is the checkpoint's."""
    if base.config.encode_whisper_embed:
        raise CheckpointError(f"{base.folder}: hears through Whisper (encode_whisper_embed), which generation here lacks")
    model = model_patch.build_on_meta(base.config)
    checkpoint.check_base(model, base.config_folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or base.config.torch_dtype or torch.float32)
    model_patch.materialize(model, torch.device(device))
    targets = dict(model.named_parameters())
    for name, tensor in named:
        if name in targets:  # a checkpoint may hold more than the model
            targets[name].data.copy_(tensor)
    if layouts.layout_of(base.config_folder) == "boson" and (base.config_folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base.config_folder)
    return model.eval()


def insert_adapter(adapter: Adapter, model: HiggsAudioModel) -> None:
    """PEFT's own adapter layers, with the adapter's weights."""
    inject_adapter_in_model(adapter.lora, model)
    weights = {name.removeprefix(ADAPTER_PREFIX): adapter.read(name) for name in adapter.shapes}
    set_peft_model_state_dict(model, weights)
    model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Saying it


@dataclass
class Reader:
    """A model that reads lines aloud.

    codec:   None where there are only codes
    context: earlier chunks of a long text that stay in the prompt
    scratch: for clips encoded, and chunks said, on the way
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

    def say(self, line: Line) -> tuple[Tensor, bool]:
        """The codes [K, T] of all chunks, one after the other, and whether each answer ended by itself."""
        said, history, stopped = [], [], True
        sampling = self.sampling if line.seed is None else dataclasses.replace(self.sampling, seed=line.seed)
        for number, chunk in enumerate(line.chunks):
            record = line.record(history[-2 * self.context :] if self.context else [], chunk)
            self.encode(record)
            prompt = as_prompt(ChatMLDataset([record], self.tokenizer, self.store)[0], self.tokenizer, self.force_audio)
            answer = speak(self.model, self.tokenizer, prompt, **sampling.arguments())
            codes = join(answer.codes, self.store.num_codebooks)
            said.append(codes)
            stopped = stopped and answer.stopped
            if codes.shape[1]:  # a chunk of which nothing was said is no example for the next
                clip = self.scratch / f"{line.name}.{number}.npy"
                np.save(clip, codes.numpy())
                spoken = {"type": "audio", "audio_url": str(clip.resolve())}
                history += [{"role": "user", "content": chunk}, {"role": "assistant", "content": spoken}]
        return join(said, self.store.num_codebooks), stopped

    def target(self, line: Line) -> Tensor | None:
        """What should be said, [K, T]."""
        if not line.target:
            return None
        self.encode(Record(None, line.target, line.source))
        return join([self.store.codes(part, line.source) for part in line.target], self.store.num_codebooks)

    def answer(self, line: Line, folder: Path) -> tuple[dict, Score | None]:
        """Say a line into the folder; returns its line of results.jsonl, and its score where the right answer is known."""
        started = time.perf_counter()
        codes, stopped = self.say(line)
        target = self.target(line)
        result = {
            "name": line.name,
            "kind": line.kind,
            "text": "\n".join(last_text(line.record([], chunk)) for chunk in line.chunks),
            "source": line.source,
            "seed": self.sampling.seed if line.seed is None else line.seed,
            "chunks": len(line.chunks),
            "frames": codes.shape[1],
            "stopped": stopped,
            "seconds": round(time.perf_counter() - started, 2),
            **write_both(folder / line.name, codes, self.codec),
        }
        if target is None:
            return result, None
        score = Score.of(codes, stopped, target)
        return result | {"target_frames": target.shape[1], "code_match": score.code_match}, score


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt", required=True, help="a full model or adapter (final/), checkpoints/step_N, or one on the Hub")
    parser.add_argument("--base_ckpt", default="", help="an adapter's base; default: the one it was trained on")
    parser.add_argument("--base_revision", default="", help="revision of a checkpoint on the Hub")
    parser.add_argument(
        "--merge_lora", action="store_true", help="add the adapter to the weights: faster, rounded to their dtype"
    )
    parser.add_argument("--audio_tokenizer", default=Config.audio_tokenizer, help="the codec: a folder, or on the Hub; or none")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="what to say; several speakers as lines that begin with [SPEAKER0], [SPEAKER1], ...")
    what.add_argument("--text_file", type=Path, help="the same from a file")
    what.add_argument("--lines", type=Path, help="JSONL of many texts, or a manifest")
    parser.add_argument("--ref_audio", nargs="+", help="a reference clip for each speaker: waveforms or codes")
    parser.add_argument("--ref_text", nargs="+", help="their transcripts")
    parser.add_argument("--scene", help="a scene description, such as 'A quiet room.'")
    parser.add_argument("--system", help="a system turn of your own instead of the official one; '' for none")
    parser.add_argument("--chunk_words", type=int, default=100, help="longer texts are said in chunks; 0: never")
    parser.add_argument("--chunk_turns", type=int, default=0, help="most speaker turns in a chunk; 0: any number")
    parser.add_argument("--chunk_context", type=int, default=2, help="earlier chunks that stay in the context")
    for f in dataclasses.fields(Sampling):
        parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default)
    parser.add_argument("--force_audio", action="store_true", help="the answer begins with <|audio_out_bos|>")
    parser.add_argument("--out", type=Path, help="a .wav or .npy file, or with --lines a folder; default: speech.wav, said/")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: the checkpoint's")
    args = parser.parse_args(argv)
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
        problems.append("--lines: references, scene and system turn stand in the lines themselves")
    args.codec = "" if args.audio_tokenizer == "none" else args.audio_tokenizer
    if args.out is None:
        args.out = Path("said" if args.lines else "speech.wav" if args.codec else "speech.npy")
    if not args.lines and args.out.suffix not in ((".wav", ".npy") if args.codec else (".npy",)):
        problems.append(f"--out {args.out}: expected a {'.wav or ' if args.codec else ''}.npy file")
    if problems:
        raise ConfigError("; ".join(problems))
    return args


def lines_of(args: argparse.Namespace) -> list[Line]:
    if args.lines:
        return read_lines(args.lines, args.chunk_words, args.chunk_turns)
    try:
        text = args.text if args.text_file is None else args.text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text_file {args.text_file}: cannot be read: {error}") from None
    value = {"text": text} | {key: getattr(args, key) for key in ("ref_audio", "ref_text", "scene", "system")}
    return [line_of_request(value, args.out.stem, Path(), "command line", args.chunk_words, args.chunk_turns)]


def load_reader(args: argparse.Namespace, dist: Dist, records: Sequence[Record], scratch: Path) -> Reader:
    """The model, and the codec where waveforms come out or, in `records`, go in. Collective."""
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    model, tokenizer = dist.main_first(
        lambda: load_model(args.ckpt, args.base_ckpt, args.base_revision or None, dtype, dist.device, args.merge_lora)
    )
    K, size = model.config.audio_num_codebooks, model.config.audio_codebook_size
    store = AudioStore(K, size, codec_frame_rate_hz(args.audio_tokenizer), scratch, args.codec)
    needed = dist.together(lambda: store.missing(records)) or (args.codec and args.out.suffix != ".npy")
    codec = dist.main_first(lambda: load_codec(args.codec, dist.device)) if needed else None
    sampling = Sampling(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Sampling)})
    return Reader(model, tokenizer, codec, sampling, store, scratch, args.force_audio, args.chunk_context)


def run(argv: Sequence[str]) -> tuple[list[dict], dict[str, Score]]:
    """Say everything the arguments ask for.

    returns: the results in order and, by kind of record, the scores of those whose right answer is known
    raises:  one of distributed.USER_ERRORS
    """
    args = parse_args(argv)
    dist = setup_distributed(args.device)
    lines = dist.together(lambda: lines_of(args))
    prompts = dist.together(lambda: [line.record([], line.chunks[0]) for line in lines])
    folder = args.out if args.lines else args.out.parent
    with tempfile.TemporaryDirectory() as scratch:
        reader = load_reader(args, dist, [*prompts, *(Record(None, line.target, line.source) for line in lines)], Path(scratch))
        if not args.lines:
            return [dist.together(lambda: say_one(reader, lines[0], args.out))], {}
        mine = lines[dist.rank :: dist.world_size]
        answers = dist.together(lambda: [reader.answer(line, folder) for line in mine])
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


def say_one(reader: Reader, line: Line, out: Path) -> dict:
    """Say a single text into a file of exactly that name."""
    codes, stopped = reader.say(line)
    if codes.shape[1]:
        write_clip(out, codes, reader.codec)
    return {"name": str(out), "frames": codes.shape[1], "stopped": stopped, "chunks": len(line.chunks)}


def table(scores: dict[str, Score]) -> str:
    """Scores by kind of record, one a line."""
    return "\n".join(f"  {kind:36} {score}" for kind, score in scores.items())


@says_errors
def main(argv: Sequence[str]) -> int:
    results, scores = run(argv)
    silent = [result["name"] for result in results if not result["frames"]]
    cut = [result["name"] for result in results if result["frames"] and not result["stopped"]]
    print(f"{len(results) - len(silent)} of {len(results)} said, {sum(result['frames'] for result in results)} frames")
    if cut:
        print(f"did not end by themselves (see --max_new_tokens): {', '.join(cut[:20])}")
    if silent:
        print(f"nothing was said (see --force_audio): {', '.join(silent[:20])}", file=sys.stderr)
    if scores:
        print(table(scores))
    return 1 if silent else 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking a gloo group down in good order can abort
