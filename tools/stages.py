"""Stages of a long work, each a command of launch.sh: run in order, each once, and gone on with after a stop.

OUT/voice.json notes for each stage a digest of its command and of what it reads, and whether it has ended.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import write_text
from process.signals import PREEMPTED

ROOT = Path(__file__).resolve().parent.parent
STATE = "voice.json"


@dataclass
class Stage:
    """A command of launch.sh. A function among its arguments gives those that earlier stages decide; so may `about`."""

    name: str
    about: str | Callable[[], str]
    argv: Sequence
    makes: Sequence[str] = ()  # names in OUT, first the one that is written last
    reads: Sequence[Path | str] = ()  # a change of these files, or words, is a change of the stage
    goes_on: bool = False  # takes up what a stopped run has left

    def is_whole(self, out: Path) -> bool:
        return all((out / name).exists() for name in self.makes[:1])


def follow(stages: Sequence[Stage], out: Path, state: dict) -> int:
    """Run the stages that are not done; returns the exit status of the first that fails, else 0."""
    done, key = state["stages"], ""
    for number, stage in enumerate(stages, 1):
        title = f"[{number} of {len(stages)}] {stage.name}"
        argv = [str(item) for part in stage.argv for item in (part() if callable(part) else [part])]
        key = hashlib.sha256(json.dumps([key, argv, *map(fingerprint, stage.reads)]).encode()).hexdigest()
        if done.get(stage.name, {}).get("key", key) != key:
            print(f"{title}: inputs or arguments have changed", flush=True)
            set_aside(stages[number - 1 :], out, done)
        if done.get(stage.name, {}).get("ended") and stage.is_whole(out):
            print(f"{title}: done before", flush=True)
            continue
        for name in stage.makes if not stage.goes_on else ():  # half made
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
        done[stage.name] = {"key": key, "ended": False}
        save(out, state)
        about = stage.about() if callable(stage.about) else stage.about
        print(f"\n{title}: {about}\n    {shown(argv)}", flush=True)
        if status := run(argv) or (0 if stage.is_whole(out) else PREEMPTED):
            print(f"stopped at {title}; to go on from there:\n    {shown(['voice', *sys.argv[1:]])}", file=sys.stderr)
            return status
        done[stage.name]["ended"] = True
        save(out, state)
    return 0


def set_aside(stages: Sequence[Stage], out: Path, done: dict) -> None:
    """Move what these stages have made, which may hold work of hours, into a folder of its own."""
    folder = next(path for n in range(1, 10**6) if not (path := out / f"earlier-{n}").exists())
    folder.mkdir()
    for stage in stages:
        done.pop(stage.name, None)
        for name in filter(lambda name: (out / name).exists() and "/" not in name, stage.makes):
            (out / name).rename(folder / name)
    print(f"from here on all is done again; what there was is in {folder}", flush=True)


def save(out: Path, state: dict) -> None:
    write_text(out / STATE, json.dumps(state, indent=1))


def fingerprint(what: Path | str) -> list:
    """What shows a change: of a manifest its content; of recordings, and folders of them, names, sizes and times."""
    if isinstance(what, str) or what.suffix == ".jsonl":
        return [what] if isinstance(what, str) else [hashlib.sha256(what.read_bytes()).hexdigest()]
    files = sorted(file for file in what.rglob("*") if file.is_file()) if what.is_dir() else [what]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def shown(argv: Sequence) -> str:
    """A command as it can be typed here."""
    return shlex.join(["bash", "launch.sh" if Path.cwd() == ROOT else str(ROOT / "launch.sh"), *map(str, argv)])


def run(argv: Sequence[str]) -> int:
    """The exit status of a command of launch.sh; 130 after Ctrl-C, at which training saves and ends with 0."""
    process, was_stopped = subprocess.Popen(["bash", str(ROOT / "launch.sh"), *argv]), False
    signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    while True:
        try:
            status = process.wait()
            return 128 + signal.SIGINT if was_stopped else status if status >= 0 else 128 - status
        except KeyboardInterrupt:  # the terminal sends it to the command too
            was_stopped = True
