"""Seconds from opening a large manifest to the first batch, and the memory it takes.

    bash launch.sh bench large_manifest [--records 1000000] [--num_workers 4]

Writes a JSONL of clones (ready-made codes of 1 to 10 s, texts of matching length), opens it as train.py does and waits for
the first micro-batch of the workers. Memory is the proportional set size of the process and its workers, which counts
shared pages once. A manifest of 1,000 records is measured for comparison. Then, in seconds of wall time and of CPU, what
`prepare convert` and `prepare check --no_audio` take for a tenth as many rows of a table, each with a clip of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import soundfile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def write_manifest(folder: Path, num_records: int) -> Path:
    """Records of one reference and one target each, from 200 files of codes."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(1000)]
    frames = rng.integers(25, 250, 200)
    for number, length in enumerate(frames):
        np.save(folder / f"{number}.npy", rng.integers(0, 64, (8, length)).astype(np.int16))

    def turns(clip: int, start: int) -> list[dict]:
        text = " ".join(words[(start + i) % 1000] for i in range(frames[clip] // 10))
        audio = {"type": "audio", "audio_url": f"{clip}.npy"}
        return [{"role": "user", "content": text}, {"role": "assistant", "content": audio}]

    path = folder / f"{num_records}.jsonl"
    with open(path, "w") as file:
        for number, (reference, target, start) in enumerate(rng.integers(0, 200, (num_records, 3)).tolist()):
            record = {"messages": turns(reference, start) + turns(target, start + 100), "start_index": 3}
            file.write(json.dumps(record | {"speaker": f"speaker {number % 5000}"}) + "\n")
    return path


def first_batch(path: Path, num_workers: int) -> dict:
    """Seconds to the first micro-batch and bytes in use then; to be run in a fresh process."""
    import data
    from collate import create_collator
    from prepare.audio import AudioStore
    from tools import toys

    tokenizer = toys.make_tokenizer()
    config = toys.tiny_config(tokenizer)
    started, wall_started = time.perf_counter(), time.time()
    records, *_ = data.open_records(str(path))
    opened = time.perf_counter()
    store = AudioStore(8, 64, 25.0, cache_dir=path.parent / "codes")
    loader = data.Loader(
        data.ChatMLDataset(records, tokenizer, store),
        create_collator(config),
        data.Batching(8),
        num_workers=num_workers,
    )
    steps = loader.epoch(data.Position(0, 0))
    next(steps)
    first = time.perf_counter()
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    held = sum(process.memory_full_info().pss for process in processes)
    for _ in range(100):
        next(steps)
    samples_per_sec = 100 * 8 / (time.perf_counter() - first)
    since_start = first - started + wall_started - psutil.Process().create_time()
    result = {"open_sec": opened - started, "first_batch_sec": first - started, "with_imports_sec": since_start}
    return result | {"bytes": held, "samples_per_sec": samples_per_sec}


def write_rows(folder: Path, num_rows: int) -> Path:
    """A table of texts and of clips, which are links to one file."""
    (folder / "wavs").mkdir()
    soundfile.write(folder / "wavs" / "0.wav", np.zeros(8000), 16000)
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(num_rows):
            if number:
                os.symlink("0.wav", folder / "wavs" / f"{number}.wav")
            text = f"This is the sentence of number {number}, which is as long as many are."
            row = {"audio": f"wavs/{number}.wav", "text": text, "speaker": f"speaker {number % 500}"}
            file.write(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


def time_command(*arguments: str) -> tuple[float, float]:
    """(seconds, CPU seconds) of a command of `prepare`."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, str(ROOT / "prepare" / "__main__.py"), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--num_workers", type=int, default=4)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(first_batch(args.measure, args.num_workers)))
        return
    print("| records | file | open | first batch | with imports | memory, all processes | samples/s after |")
    print("| --- " * 7 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for num_records in (1000, args.records):
            path = write_manifest(Path(folder), num_records)
            command = [sys.executable, __file__, "--measure", str(path), "--num_workers", str(args.num_workers)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            print(
                f"| {num_records:,} | {path.stat().st_size / 1e6:.0f} MB | {found['open_sec']:.1f} s | "
                f"{found['first_batch_sec']:.1f} s | {found['with_imports_sec']:.1f} s | {found['bytes'] / 1e6:.0f} MB | "
                f"{found['samples_per_sec']:.0f} |"
            )
        rows = write_rows(Path(folder), args.records // 10)
        for name, *arguments in (("convert", str(Path(folder) / "out.jsonl")), ("check", "--no_audio")):
            wall, cpu = time_command(name, str(rows), *arguments)
            print(f"prepare {name}, {args.records // 10:,} rows: {wall:.1f} s, {cpu:.1f} s of CPU")


if __name__ == "__main__":
    main()
