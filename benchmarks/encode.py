"""Samples per second of an epoch: codes from the cache against encoding in `__getitem__`.

The codec is the published one's size with random weights, the records clones of 2 to 4 s of noise, the dataset and its loader
those of training. Both epochs run in one process, without workers; speech per second of encoding stands beside them.

    python benchmarks/encode.py [--records 8] [--device auto]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from collate import create_collator  # noqa: E402
from prepare.audio import AudioStore, load_codec, read_waveform  # noqa: E402
from prepare.manifest import read_manifest  # noqa: E402
from tools import demo  # noqa: E402

RATE_HZ = 24000


class EncodingStore(AudioStore):
    """Encodes a clip whenever it is asked for."""

    def codes(self, part, source):
        samples, rate = read_waveform(part, source)
        return self.loaded.encode(samples, rate)[: self.num_codebooks].cpu()


def write_clones(folder: Path, num_records: int) -> tuple[Path, float]:
    """(manifest, seconds of audio): each record a reference and a target that no other record has."""
    rng, seconds = np.random.default_rng(0), 0.0
    with open(folder / "m.jsonl", "w") as file:
        for number in range(num_records):
            turns = []
            for kind in ("reference", "target"):
                samples = 0.1 * rng.standard_normal(rng.integers(2 * RATE_HZ, 4 * RATE_HZ))
                soundfile.write(folder / f"{kind}{number}.wav", samples, RATE_HZ)
                audio = {"type": "audio", "audio_url": f"{kind}{number}.wav"}
                turns += [{"role": "user", "content": "say this"}, {"role": "assistant", "content": audio}]
                seconds += len(samples) / RATE_HZ
            file.write(json.dumps({"messages": turns, "start_index": 3}) + "\n")
    return folder / "m.jsonl", seconds


def samples_per_sec(store: AudioStore, manifest: Path, epochs: int) -> float:
    tokenizer = demo.make_tokenizer()
    config = demo.tiny_config(tokenizer, audio_codebook_size=1024, audio_stream_bos_id=1024, audio_stream_eos_id=1025)
    dataset = data.ChatMLDataset(read_manifest(manifest), tokenizer, store)
    loader = data.Loader(dataset, create_collator(config), data.Batching(4))
    started = time.perf_counter()
    for epoch in range(epochs):
        for _ in loader.epoch(data.Position(epoch, 0)):
            pass
    return epochs * len(dataset) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codec_dir = demo.make_codec(folder, full_size=True)
        manifest, seconds = write_clones(folder, args.records)
        os.chdir(codec_dir)  # upstream finds the codec's HuBERT there
        settings = 8, 1024, 25.0, folder / "codes", str(codec_dir)
        live = EncodingStore(*settings)
        live.loaded = load_codec(str(codec_dir), args.device)
        live.loaded.encode(np.zeros(RATE_HZ, np.float32), RATE_HZ)  # the first one sets up kernels
        encoding = samples_per_sec(live, manifest, epochs=1)
        store = AudioStore(*settings)
        started = time.perf_counter()
        problems = list(store.encode(lambda: live.loaded, store.missing(read_manifest(manifest))))
        elapsed = time.perf_counter() - started
        assert not any(problems)
        cached = samples_per_sec(store, manifest, epochs=max(1, 1000 // args.records))
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print("| device | encoding in __getitem__ | from the cache | ratio | encoding once |\n| --- | --- | --- | --- | --- |")
    print(
        f"| {device} | {encoding:.2f} samples/s | {cached:.0f} samples/s | {cached / encoding:.0f} | "
        f"{seconds / elapsed:.1f} s of audio per s |"
    )


if __name__ == "__main__":
    main()
