"""Clips per second and memory of generating together, beside the official generate() that takes one prompt at a time.

    bash launch.sh bench batched [--size mini] [--rows 4 16] [--frames 200] [--json FILE]

Both generate clips of so many frames from the same prompts (a reference of 3 s as an earlier exchange) with a random model
whose clips hardly ever end by themselves, sampled as by default. They take turns; figures are medians of the rounds. The
codes have to be equal, or the benchmark fails. Memory is what the process holds at most during a turn, above what it held
before: on a GPU allocated bytes, on a CPU resident ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from boson_multimodal.model.higgs_audio import HiggsAudioModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import model_patch  # noqa: E402
from generate.batched import generate_many  # noqa: E402
from generate.lines import split_answer  # noqa: E402
from generate.official import Answer, Request, Sampling, as_prompt, generate_each  # noqa: E402
from prepare.audio import AudioStore  # noqa: E402
from prepare.manifest import read_manifest  # noqa: E402
from tools import synthetic, toys  # noqa: E402

REFERENCE_SEC = 3.0


@dataclass
class Turn:
    """One measured call."""

    clips_per_sec: float
    cpu_sec_per_clip: float  # of all threads; says more than the clock where others use the machine as well
    peak_bytes: int
    answers: dict[int, Answer]


def make_model(size: str, tokenizer, device: str, dtype: torch.dtype) -> HiggsAudioModel:
    """A random model that draws sharply, and whose clips end only by the longest length; the tokenizer gets all its tokens."""
    config = synthetic.make_config(size)
    tokenizer.add_tokens([f"<|unused{i}|>" for i in range(config.text_config.vocab_size - len(tokenizer))])
    model = model_patch.build_on_meta(config).to(dtype)
    model_patch.materialize(model, torch.device(device))
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1) if parameter.ndim == 1 else parameter.normal_(0, 0.02, generator=generator)
        head = model.audio_decoder_proj.audio_lm_head.weight.unflatten(0, (config.audio_num_codebooks, -1))
        head *= 20
        head[:, config.audio_stream_eos_id] = 0
    return model.eval()


def make_prompts(folder: Path, model: HiggsAudioModel, tokenizer, count: int) -> list[ChatMLDatasetSample]:
    seconds = torch.full((count, 2), REFERENCE_SEC).numpy()
    manifest = synthetic.write_clones(folder, seconds, model.config.audio_codebook_size)
    store = AudioStore(model.config.audio_num_codebooks, model.config.audio_codebook_size, synthetic.FRAME_RATE_HZ, folder)
    records = [split_answer(record)[0] for record in read_manifest(manifest)]
    samples = data.ChatMLDataset(records, tokenizer, store)
    return [as_prompt(samples[i], tokenizer, force_audio=True) for i in range(count)]


class PeakMemory:
    """The most bytes held while it is entered, above those at its start."""

    def __init__(self, device: str):
        self.on_gpu, self.process, self.peak = device == "cuda", psutil.Process(), 0

    def __enter__(self) -> PeakMemory:
        self.before, self.ended = self._held(), threading.Event()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()
        most = torch.cuda.max_memory_allocated() if self.on_gpu else self.peak
        self.peak = max(0, most - self.before)

    def _held(self) -> int:
        return torch.cuda.memory_allocated() if self.on_gpu else self.process.memory_info().rss

    def _watch(self) -> None:
        while not self.ended.wait(0.01):
            self.peak = max(self.peak, self._held())


def measure(generate: Callable, prompts: Sequence[ChatMLDatasetSample], frames: int, device: str) -> Turn:
    """One call with a request for each prompt."""
    requests = deque(Request(prompt, i, frames, i) for i, prompt in enumerate(prompts))
    with PeakMemory(device) as memory:
        started, cpu = time.perf_counter(), time.process_time()
        answers = {request.key: answer for request, answer in generate(requests)}
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return Turn(len(prompts) / seconds, cpu / len(prompts), memory.peak, answers)


def same_codes(turn: Turn, reference: Turn) -> bool:
    """Whether both generated the same, of the prompts that both had."""
    pairs = [(turn.answers[i].delayed, answer.delayed) for i, answer in reference.answers.items() if i in turn.answers]
    return bool(pairs) and all(
        len(ours) == len(theirs) and all(map(torch.equal, ours, theirs)) for ours, theirs in pairs
    )


def table(turns: dict[str, list[Turn]]) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for name, of_name in turns.items():
        row = {key: statistics.median(getattr(turn, key) for turn in of_name) for key in ("clips_per_sec", "cpu_sec_per_clip")}
        rows[name] = row | {"peak_bytes": max(turn.peak_bytes for turn in of_name)}
    for row in rows.values():
        row["ratio"] = row["clips_per_sec"] / rows["official"]["clips_per_sec"]
        row["cpu_ratio"] = rows["official"]["cpu_sec_per_clip"] / row["cpu_sec_per_clip"]
    return rows


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="mini", choices=synthetic.SIZES)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16], help="prompts that are generated together")
    parser.add_argument("--frames", type=int, default=200, help="length of a clip, with its delay columns")
    parser.add_argument("--official_clips", type=int, default=2, help="clips of the official call in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="codes are compared in float32 alone")
    parser.add_argument("--folder", type=Path, default=Path("runs/batched"), help="for the prompts' codes")
    parser.add_argument("--json", type=Path, help="write the table here, too")
    args = parser.parse_args(argv)
    tokenizer, sampling = toys.make_tokenizer(), Sampling()
    model = make_model(args.size, tokenizer, args.device, getattr(torch, args.dtype))
    prompts = make_prompts(args.folder, model, tokenizer, max(*args.rows, args.official_clips))

    turns: dict[str, list[Turn]] = {}
    for _ in range(args.rounds):
        reference = measure(
            lambda r: generate_each(model, tokenizer, r, sampling), prompts[: args.official_clips], args.frames, args.device
        )
        turns.setdefault("official", []).append(reference)
        for rows in args.rows:
            turn = measure(
                lambda r, n=rows: generate_many(model, tokenizer, r, sampling, n), prompts[:rows], args.frames, args.device
            )
            if args.dtype == "float32" and not same_codes(turn, reference):
                print(f"error: {rows} together gave other codes than the official generate()", file=sys.stderr)
                return 1
            turns.setdefault(f"{rows} together", []).append(turn)

    rows = table(turns)
    print(f"{args.size}, clips of {args.frames} columns, {torch.get_num_threads()} threads, {args.dtype} on {args.device}")
    for name, row in rows.items():
        speed = f"{row['clips_per_sec']:9.3f} clips/s {row['ratio']:6.2f} x"
        work = f"{row['cpu_sec_per_clip']:9.3f} CPU s/clip {row['cpu_ratio']:6.2f} x"
        print(f"{name:12} {speed} {work} {row['peak_bytes'] / 2**20:9.0f} MiB")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
