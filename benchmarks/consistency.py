"""Whether --consistency_loss_weight helps a voice: the demo's toy voices, half learned, with and without it.

    python benchmarks/consistency.py [--weights 0,0.1,1] [--seeds 0,1,2] [--steps 400]

Trains the demo once for each weight and seed (two ranks; a minute or two each), then lets the official `generate()` speak its 40
held-out clones. The first two codebooks of a toy voice carry letters, the others its timbre.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import demo

NUM_LETTERS = 2  # codebooks


def spoken_shares(test: Path, said: Path) -> np.ndarray:
    """[codebooks] share of the clones' codes that match, of the longer of what was said and what should have been."""
    matches, frames = np.zeros(8), 0
    for index, line in enumerate(test.read_text().splitlines()):
        record = json.loads(line)
        if not record["misc"]["kind"].startswith("clone"):
            continue
        target = np.load(test.parent / record["messages"][-1]["content"]["audio_url"])
        found = np.load(said / f"{index:05d}.npy")
        shared = min(target.shape[1], found.shape[1])
        matches += (target[:, :shared] == found[:, :shared]).sum(1)
        frames += max(target.shape[1], found.shape[1])
    return matches / frames


def run(folder: Path, weight: str, seed: int, steps: int) -> dict[str, float]:
    """Train, listen, and return the figures of one row."""
    demo.make_demo(folder / "data", seed)
    demo.train(folder / "data", folder / "run", seed, steps, 2, ["--consistency_loss_weight", weight, "--sample_steps", "0"])
    scores = demo.listen(folder / "run" / "final", folder / "data" / "test.jsonl", folder / "said")
    clones = demo.print_scores(f"weight {weight}, seed {seed}", scores)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    val = [line for line in lines if line["split"] == "val"][-1]
    fed, spoken = np.array(val["codebook_accuracies"]), spoken_shares(folder / "data" / "test.jsonl", folder / "said")
    return {
        "validation audio loss": val["audio_loss"],
        "teacher-forced letters, %": 100 * fed[:NUM_LETTERS].mean(),
        "teacher-forced timbre, %": 100 * fed[NUM_LETTERS:].mean(),
        "clones' letters, %": 100 * spoken[:NUM_LETTERS].mean(),
        "clones' timbre, %": 100 * spoken[NUM_LETTERS:].mean(),
        "clones' codes, %": 100 * clones.code_match,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="0,0.1,1")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    weights, found = args.weights.split(","), {}
    for weight in weights:
        for seed in map(int, args.seeds.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                found.setdefault(weight, []).append(run(Path(folder), weight, seed, args.steps))
    print(f"\n| weight | {' | '.join(found[weights[0]][0])} |\n" + "| --- " * (1 + len(found[weights[0]][0])) + "|")
    for weight, rows in found.items():
        cells = []
        for name in rows[0]:
            values = [row[name] for row in rows]
            cells.append(f"{np.mean(values):.3g} ({' / '.join(f'{value:.3g}' for value in values)})")
        print(f"| {weight} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
