"""Memory of the published size on a machine without a GPU: two ranks load it, sharded, and take a LoRA step.

    bash launch.sh bench load [--size real] [--nproc 2] [--folder DIR] [flags of train.py]

Makes a random bf16 checkpoint (11.5 GB for `real`) unless the folder has one, starts train.py on it under torchrun and
measures all processes twice a second. The proportional set size counts memory that processes share (mapped pages of the
checkpoint, libraries) once; the peak is the greatest sum over all processes at one moment.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import to_argv  # noqa: E402
from tools import synthetic  # noqa: E402

FIELDS = ("Pss", "Pss_Anon", "Pss_File", "Pss_Shmem")


def memory(process: psutil.Process) -> dict[str, int]:
    """Bytes by field of the kernel's smaps_rollup; {} for a process that has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    except (OSError, psutil.Error):
        return {}
    values = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}
    return {name: values.get(name, 0) for name in FIELDS}


def watch(launcher: subprocess.Popen, log: Path) -> tuple[dict[str, int], list[tuple[float, float, float, str]]]:
    """(the greatest sums over all processes, [(second, GB, GB of files in it, last line of the log)])."""
    peak, history = dict.fromkeys(FIELDS, 0), []
    root, started = psutil.Process(launcher.pid), time.perf_counter()
    while launcher.poll() is None:
        parts = [memory(process) for process in (root, *root.children(recursive=True))]
        now = {name: sum(part.get(name, 0) for part in parts) for name in FIELDS}
        if now["Pss"] > peak["Pss"]:
            peak = now
        lines = log.read_text(errors="replace").strip().splitlines()
        history.append((time.perf_counter() - started, now["Pss"] / 1e9, now["Pss_File"] / 1e9, lines[-1] if lines else ""))
        time.sleep(0.5)
    return peak, history


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="real", choices=synthetic.SIZES)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here; default: a temporary folder")
    args, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        config = synthetic.make_config(args.size)
        if not (folder / "checkpoint" / "config.json").is_file():
            synthetic.make_checkpoint(folder / "checkpoint", config, torch.bfloat16)
        seconds = synthetic.clone_durations(8) / 4
        manifest = synthetic.write_clones(Path(temporary) / "data", seconds, config.audio_codebook_size)
        settings = {
            **{"train_manifest": manifest, "val_manifest": manifest},
            "base_ckpt": folder / "checkpoint",
            "output_dir": Path(temporary) / "out",
            "audio_tokenizer": "none",
            "batch_size": 1,
            "num_workers": 0,
            "lora_r": 16,
            "max_steps": 1,
            **{"val_steps": 0, "sample_steps": 0, "save_steps": 0},
            "device": "cpu",
        }
        command = [sys.executable, "-m", "tools.launch", f"--nproc_per_node={args.nproc}", "--standalone", ROOT / "train.py"]
        command += to_argv(settings)
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
        log = Path(temporary) / "log"
        with open(log, "w") as file:
            launcher = subprocess.Popen([*map(str, command), *flags], env=environment, stdout=file, stderr=subprocess.STDOUT)
            peak, history = watch(launcher, log)
        print(log.read_text(errors="replace"))
        print("second  GB  files  log")
        size = max(1, len(history) // 60)
        for start in range(0, len(history), size):  # of each few seconds the greatest
            second, total, files, line = max(history[start : start + size], key=lambda row: row[1])
            print(f"{second:6.0f} {total:6.2f} {files:6.2f}  {line[-100:]}")
    print(f"\n{args.nproc} ranks at their peak: " + ", ".join(f"{name} {value / 1e9:.2f} GB" for name, value in peak.items()))
    return launcher.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
