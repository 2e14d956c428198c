"""Make tests/golden/run: a base, a manifest, the order that epochs have, and a stored checkpoint of each format version.

    PYTHONPATH=. python tests/make_golden_run.py               # base, manifest, order.json
    PYTHONPATH=. python tests/make_golden_run.py 1 FOLDER      # format_1, by the train.py of a checkout of that version
    PYTHONPATH=. python tests/make_golden_run.py 2 .           # format_2; its losses go to steps.json

What is stored is never made anew for a format that exists: `test_golden_run.py` shows that it still reads and orders as then.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import make_model, write_manifest
from make_golden import ROOT, golden_config

import checkpoint
import data
from prepare.manifest import Mixture, read_manifest
from tools import toys

GOLDEN = ROOT / "tests" / "golden" / "run"
FLAGS = ["--train_manifest", "train.jsonl", "--base_ckpt", "base", "--device", "cpu", "--mixed_precision", "no", "--num_workers", "0", "--val_steps", "0"]
FLAGS += ["--val_share", "0", "--lora_r", "1", "--lora_targets", "self_attn", "--batch_size", "2", "--lr", "1e-2", "--max_steps", "4", "--audio_tokenizer", "none"]


def make_data() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    tokenizer = toys.make_tokenizer()
    model = make_model(golden_config(tokenizer)).bfloat16()
    model.save_pretrained(GOLDEN / "base")
    tokenizer.save_pretrained(GOLDEN / "base")
    (GOLDEN / "codes").mkdir()
    rng, records = np.random.default_rng(0), []
    for number in range(7):
        np.save(GOLDEN / "codes" / f"{number}.npy", rng.integers(0, 64, (8, 3 + number), dtype=np.int16))
        audio = {"type": "audio", "audio_url": f"codes/{number}.npy"}
        records.append({"messages": [{"role": "user", "content": "a" * number}, {"role": "assistant", "content": audio}]})
    write_manifest(GOLDEN / "train.jsonl", records)
    (GOLDEN / "order.json").write_text(json.dumps(order()) + "\n")


def order() -> dict:
    """Every order that a run has, of a small mixture."""
    sizes, weights, lengths = [7, 5], [1.0, 1.5], np.arange(12) % 5 + 1
    epochs = [data.epoch_order(sizes, weights, seed=3, epoch=epoch) for epoch in range(4)]
    budget = data.Batching(max_tokens=7, lengths=lengths)
    rest, held = data.hold_out(Mixture([read_manifest(GOLDEN / "train.jsonl")]), 0.3, seed=3)
    return {
        "epochs": [epoch.tolist() for epoch in epochs],
        "bounds by number": [data.Batching(batch_size=2).bounds(epoch).tolist() for epoch in epochs],
        "bounds by tokens": [budget.bounds(epoch).tolist() for epoch in epochs],
        "steps of two ranks": [list(data.plan_steps(epoch, budget.bounds(epoch), 2, 2)) for epoch in epochs],
        "rest": [rest[i].source.split()[-1] for i in range(len(rest))],
        "held out": [held[i].source.split()[-1] for i in range(len(held))],
    }


def train(code: Path, output_dir: str, *more: str) -> list[dict]:
    """What a run in the golden folder logs of its steps."""
    environment = {**os.environ, "PYTHONPATH": str(code)}
    command = [sys.executable, str(code / "train.py"), *FLAGS, "--output_dir", output_dir, *more]
    subprocess.run(command, cwd=GOLDEN, env=environment, check=True)
    lines = map(json.loads, (GOLDEN / output_dir / "metrics.jsonl").read_text().splitlines())
    names = ("step", "tokens", "text_targets", "audio_targets", "loss")
    return [{name: line[name] for name in names} for line in lines if line["split"] == "train"]


def make_checkpoint(version: str, code: Path) -> None:
    """Of step 2 of 4, without what is this machine's."""
    steps = train(code, f"format_{version}", "--save_steps", "2", "--keep_last", "0")
    (GOLDEN / "steps.json").write_text(json.dumps(steps, indent=1) + "\n")
    folder = GOLDEN / f"format_{version}"
    for path in folder.iterdir():
        if path.name not in ("config.json", "checkpoints"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder / "checkpoints" / "step_4")
    path = folder / "checkpoints" / "step_2" / "state.json"
    state = json.loads(path.read_text())
    if "base" in state:
        state["base"]["folder"] = "/elsewhere/base"
        state["sha256"] = checkpoint._checksum(state)
    path.write_text(json.dumps(state, indent=1) + "\n")


if __name__ == "__main__":
    make_checkpoint(sys.argv[1], Path(sys.argv[2]).resolve()) if len(sys.argv) > 1 else make_data()
