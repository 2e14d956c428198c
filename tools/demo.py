"""The offline demo: train a tiny Higgs Audio v2 on toy voices, then generate with it.

    bash launch.sh demo [--output_dir runs/demo] [--seed 0] [--steps N] [--nproc N] [flags of train.py]

Nothing is downloaded: checkpoint and voices are those of tools/toys.py. Training is the ordinary `train.py` under FSDP; no manifest
that it reads has a speaker or a text of the test. Prompts are answered many at once; the official `generate()` has to give the
same codes for some of every kind. The scores are printed and written to demo.json; the run's report plays samples of both
models, by the toy vocoder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common import write_whole
from config import to_argv
from generate import __main__ as generate
from generate.files import read_results, write_both, write_results
from generate.scores import Score, table
from prepare.manifest import read_manifest
from process.command import says_errors
from tools import report, toys
from tools.vocoder import ToyVocoder

ROOT = Path(__file__).resolve().parent.parent

AGAIN = 8  # records of each kind that the official generate() repeats

# Greedy, codes only. The longest target has 21 frames and 9 delay columns: a model that never stops is cut off at 60.
GREEDY = {"audio_tokenizer": "none", "temperature": 0, "ras_win_len": 0, "max_new_tokens": 60, "device": "cpu"}


def train(folder: Path, output_dir: Path, seed: int, steps: int, nproc: int, flags: Sequence[str] = ()) -> None:
    """The ordinary train.py under torchrun on the demo's data in `folder`; flags win over the settings here."""
    cores = os.cpu_count() or 1
    settings = {
        "train_manifest": folder / "train.jsonl",
        "val_manifest": folder / "val.jsonl",
        "base_ckpt": folder / "checkpoint",
        "output_dir": output_dir,
        "lora_r": 0,
        "batch_size": max(1, 16 // nproc),
        "max_steps": steps,
        "lr": 2e-3,
        "warmup_steps": min(50, steps // 5),
        "codebook_weights": "4,1,1,1,1,1,1,1",  # letters are the hard part: they are read, the timbre is copied
        "mixed_precision": "no",
        "val_steps": max(1, steps // 8),
        "sample_steps": max(1, steps // 4),
        "sample_temperature": 0,
        "audio_tokenizer": "none",  # toy voices are codes
        "save_steps": max(1, steps // 2),
        "num_workers": int(cores > nproc),  # for all ranks; without a core of their own they would only take turns
        "seed": seed,
        "device": "cpu",  # the same figures everywhere
    }
    command = [sys.executable, "-m", "tools.launch", f"--nproc_per_node={nproc}", "--standalone", str(ROOT / "train.py")]
    command += [*to_argv(settings), *flags]
    threads = max(1, cores // nproc)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": str(ROOT)}
    print("torchrun", " ".join(command[3:]), flush=True)
    subprocess.run(command, check=True, env=environment)


def evaluate(checkpoint: Path, manifest: Path, out: Path, force_audio: bool = False) -> dict[str, Score]:
    """Generate the last turn of every record and compare it with the record's own; scores by kind of record.

    force_audio: begin the answer with <|audio_out_bos|>, as the serve engine can: an untrained model emits no audio otherwise
    """
    command = to_argv({"ckpt": checkpoint, "lines": manifest, "out": out} | GREEDY) + ["--force_audio"] * force_audio
    print("\nbash launch.sh generate", *command)
    return generate.run(command)[1]


def differing(checkpoint: Path, manifest: Path, generated: Path, out: Path) -> list[str]:
    """Names of the generated clips that the official generate() does not give, of the first AGAIN records of every kind."""
    kinds: dict[str, list[int]] = {}
    lines = manifest.read_text().splitlines()
    for number, line in enumerate(lines):
        kinds.setdefault(json.loads(line)["misc"]["kind"], []).append(number)
    chosen = [number for numbers in kinds.values() for number in numbers[:AGAIN]]
    again = manifest.with_name("again.jsonl")  # paths in it are relative to its folder
    again.write_text("".join(lines[number] + "\n" for number in chosen))
    generate.run(to_argv({"ckpt": checkpoint, "lines": again, "out": out} | GREEDY) + ["--official"])
    pairs = [(f"{number:05d}.npy", f"{i:05d}.npy") for i, number in enumerate(chosen)]
    return [ours for ours, theirs in pairs if not np.array_equal(np.load(generated / ours), np.load(out / theirs))]


def clones(scores: dict[str, Score]) -> Score:
    """The score of both kinds of zero-shot clones together."""
    return sum((score for kind, score in scores.items() if kind.startswith("clone")), Score())


def print_scores(title: str, scores: dict[str, Score]) -> None:
    print(f"{title}\n{table(scores | {'zero-shot clones, together': clones(scores)})}", flush=True)


def figures(scores: dict[str, Score]) -> dict[str, dict]:
    """What demo.json holds of them."""
    return {
        kind: {"code_match": score.code_match, "exact": score.exact, "stops": score.timely, "clips": score.num_clips}
        for kind, score in scores.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Sounds


def write_sounds(manifest: Path, generated: Path, out: Path) -> dict[str, str]:
    """The first test record of each kind as sounds in `out`, where the report finds them: sample, target, references.

    generated: the folder that `evaluate` wrote
    returns:   kind -> the sample's file
    """
    results = {result["kind"]: (i, result) for i, result in reversed(list(enumerate(read_results(generated))))}
    records, written = read_manifest(manifest), []
    for index, result in sorted(results.values(), key=lambda item: item[0]):
        *references, target = [np.load(part.path) for part in records[index].audio]
        codes = {"": np.load(generated / result["codes"]), "target_": target}
        codes |= {"reference_": np.concatenate(references, axis=1)} if references else {}
        for what, clip in codes.items():
            files = write_both(out / f"{result['name']}{what[:-1]}", torch.from_numpy(clip).long(), ToyVocoder())
            result |= {f"{what}{kind}": name for kind, name in files.items()}
        written.append(result)
    write_results(out, written)
    return {result["kind"]: f"{out / result['wav']}" for result in written if "wav" in result}


def add_sounds(folder: Path) -> None:
    """Sounds beside the codes of samples that training generated, and their names in results.jsonl."""
    results = read_results(folder)
    for result in results:
        for key in [key for key in result if key.endswith("codes")]:
            path = (folder / result[key]).resolve()
            files = write_both(path.with_suffix(""), torch.from_numpy(np.load(path)).long(), ToyVocoder())
            if "wav" in files:
                result[f"{key.removesuffix('codes')}wav"] = str(Path(result[key]).with_name(files["wav"]))
    write_results(folder, results)


@says_errors
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bash launch.sh demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1250)
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--min_match", type=float, default=0.0, help="exit 1 if clones match less than this share of codes")
    args, flags = parser.parse_known_args(argv)
    data, run, generated = (args.output_dir / name for name in ("data", "run", "generated"))
    toys.start_afresh(args.output_dir)
    toys.make_demo(data, args.seed)

    started = time.perf_counter()
    train(data, run, args.seed, args.steps, args.nproc, flags)
    trained = time.perf_counter()
    test = data / "test.jsonl"
    scores = {
        "untrained": evaluate(data / "checkpoint", test, generated / "untrained", force_audio=True),
        "trained": evaluate(run / "final", test, generated / "trained"),
    }
    finished = time.perf_counter()
    if others := differing(run / "final", test, generated / "trained", generated / "official"):
        print(f"error: the official generate() gives other codes than {', '.join(others)}", file=sys.stderr)
        return 1

    print_scores("\nuntrained, held-out speakers and texts:", scores["untrained"])
    print_scores(f"trained for {args.steps} steps:", scores["trained"])
    content = json.dumps({name: figures(found) for name, found in scores.items()}, indent=2) + "\n"
    write_whole(args.output_dir / "demo.json", lambda file: file.write(content.encode()))
    for folder in (run / "samples").glob("step_*"):
        add_sounds(folder)
    sounds = {model: write_sounds(test, generated / model, run / "samples" / model) for model in scores}
    print(f"\ntraining {trained - started:.0f} s, generation {finished - trained:.0f} s\nwhat it says now, beside what it should say:")
    for kind, file in sounds["trained"].items():
        print(f"    {file}    {kind}; {Path(file).stem}_target.wav")
    report.main([str(run)])
    match = clones(scores["trained"]).code_match
    if match < args.min_match:
        print(f"error: clones match {match:.1%} of the codes, expected {args.min_match:.1%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
