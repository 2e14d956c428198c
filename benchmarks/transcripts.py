"""How many swapped transcripts `prepare check --transcripts` finds, by the demo's trained model.

    bash launch.sh demo
    bash launch.sh bench transcripts [--demo runs/demo] [--records 400] [--swapped 0.05]

New toy voices say new texts, each after a reference clip; a share of the texts is passed on in a circle. Precision is the
share of the listed clips whose texts were swapped, recall the share of the swapped ones that are listed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.toys import KINDS, Toybox  # noqa: E402


def write_swapped(folder: Path, num_records: int, share: float, seed: int = 77) -> tuple[Path, set[str]]:
    """A manifest of clones, and the texts in it that belong to other clips."""
    box = Toybox(folder, seed)
    records = [box.record(KINDS[0], f"speaker {number}") for number in range(num_records)]
    chosen = np.random.default_rng(seed).permutation(num_records)[: max(2, round(share * num_records))]
    texts = [records[number]["messages"][-2]["content"] for number in chosen]
    for number, text in zip(chosen, texts[1:] + texts[:1]):
        records[number]["messages"][-2]["content"] = text
    path = folder / "swapped.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path, set(texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="the demo's output folder")
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--swapped", type=float, default=0.05)
    parser.add_argument("--least", type=float, default=0.0, help="exit 1 if recall or precision is below this")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, swapped = write_swapped(Path(folder), args.records, args.swapped)
        report = Path(folder) / "report.json"
        command = [sys.executable, str(ROOT / "prepare" / "__main__.py"), "check", str(path), "--report", str(report)]
        command += ["--transcripts", "--base_ckpt", str(args.demo / "run" / "final"), "--device", "cpu"]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
        took = time.perf_counter() - started
        notices = json.loads(report.read_text())["notices"]
    items = next((items for title, items in notices.items() if "not those of their clips" in title), [])
    listed = {item.rpartition("| ")[2] for item in items}
    found = len(listed & swapped)
    recall, precision = found / len(swapped), found / max(1, len(listed))
    print(f"{len(swapped)} of {args.records} transcripts swapped: {len(listed)} listed, {found} of them rightly")
    print(f"recall {recall:.3f}, precision {precision:.3f}, {took:.0f} s")
    return int(min(recall, precision) < args.least)


if __name__ == "__main__":
    sys.exit(main())
