"""The cost of checkpoints: step time without any, with one every 10 steps written in the background, and with blocking ones.

    bash launch.sh bench save [--rounds 3]

A full fine-tune of a random model of the real class in one process; the three modes take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from boson_multimodal.model.higgs_audio import HiggsAudioModel

import checkpoint
import data
import loss
import model_patch
import train
from collate import create_collator
from config import Config
from distributed import setup_distributed
from prepare.audio import AudioStore
from prepare.manifest import read_manifest
from tools import toys

STEPS = 20
HIDDEN, LAYERS = 512, 8


def build(dist):
    """A model of about 40 million parameters, its optimizer, and a step over a fixed batch of toy records."""
    folder = Path(tempfile.mkdtemp())
    path, _ = toys.make_demo(folder, num_speakers=31)
    tokenizer = toys.make_tokenizer()
    config = toys.tiny_config(tokenizer)
    text = {**config.text_config.to_dict(), "hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_hidden_layers": LAYERS}
    text["head_dim"] = HIDDEN // text["num_attention_heads"]
    config = toys.tiny_config(
        tokenizer, text_config=text, audio_dual_ffn_layers=list(range(LAYERS)), audio_ffn_hidden_size=HIDDEN
    )
    model = model_patch.patch_for_training(HiggsAudioModel(config)).to(dist.device).train()
    model_patch.shard(model, dist.mesh, param_dtype=None)
    optimizer = train.build_optimizer(model, Config(lora_r=0))
    dataset = data.ChatMLDataset(read_manifest(path), tokenizer, AudioStore(8, 64, 25.0, folder / "codes"))
    batch = create_collator(config)([dataset[i] for i in range(2)])
    task = train.Task(model, optimizer, loss.Objective(), loss.LabelSpec.of(config), dist)

    def step(number: int) -> None:
        train.train_step(task, [batch], step=number, lr=1e-5)

    return model, optimizer, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    dist = setup_distributed()
    model, optimizer, step = build(dist)
    numbers = iter(range(1_000_000))
    step(next(numbers))
    times: dict[str, list[float]] = {"none": [], "background": [], "blocking": [], "one save": []}
    with tempfile.TemporaryDirectory() as folder:
        saver = checkpoint.Saver(Path(folder), model, optimizer, keep_last=1)

        def run(way: str) -> None:
            started = time.perf_counter()
            for index in range(STEPS):
                if index % 10 == 5 and way != "none":
                    before = time.perf_counter()
                    saver.start({"step": next(numbers)})
                    if way == "blocking":
                        saver.commit()
                        times["one save"].append(time.perf_counter() - before)
                elif way == "background" and not saver.is_writing:
                    saver.commit()
                step(next(numbers))
            times[way].append((time.perf_counter() - started) / STEPS)
            saver.commit()  # not timed: a longer run would not wait here

        for _ in range(args.rounds):
            for way in ("none", "background", "blocking"):
                run(way)
    middle = {way: statistics.median(values) for way, values in times.items()}
    size = sum(p.numel() for p in model.parameters()) * 12 / 1e6
    print("| state | step without saving | every 10 steps, in the background | every 10 steps, blocking | one blocking save |")
    print("| --- | --- | --- | --- | --- |")
    print(
        f"| {size:.0f} MB | {middle['none']:.3f} s | {middle['background'] / middle['none']:.2f}x | "
        f"{middle['blocking'] / middle['none']:.2f}x | {middle['one save']:.2f} s, {middle['one save'] / middle['none']:.1f} steps |"
    )


if __name__ == "__main__":
    main()
