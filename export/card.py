"""Model cards: README.md of a finished model, with its data, results, settings and the command that made it.

python card.py OUTPUT      # the card of a run
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import sys
from pathlib import Path

import checkpoint
from config import Config, to_argv


def of_run(output_dir: Path, last_step: float = math.inf) -> str:
    """The card of a run's model after `last_step`, from OUTPUT/config.json and OUTPUT/metrics.jsonl."""
    run = json.loads((output_dir / "config.json").read_text())
    path = output_dir / "metrics.jsonl"  # not there where a resumed run had no step left
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if line["step"] <= last_step]
    train, val, heard = ([line for line in lines if line["split"] == split] for split in ("train", "val", "sample"))
    known = {f.name: f for f in dataclasses.fields(Config)}
    changed = {name: run[name] for name, field in known.items() if name in run and run[name] != field.default}
    command = shlex.join(["train.py", *to_argv(changed)])
    hours = sum(line["audio_sec_per_sec"] * line["step_time_sec"] for line in train) / 3600
    data = {
        "manifest": run["train_manifest"],
        "records": run.get("training_samples"),
        "audio heard, in hours": f"{hours:.3g} in {train[-1]['epoch'] + 1} epoch(s)" if train else None,
        "audio targets": sum(line["audio_targets"] for line in train),
        "text targets": sum(line["text_targets"] for line in train),
    }
    names = ("step", "loss", "text_loss", "audio_loss", "eos_loss")
    results = {f"validation {name}": val[-1].get(name) for name in names} if val else {}
    results |= {f"samples: {name}": value for name, value in heard[-1].items() if isinstance(value, float)} if heard else {}
    results |= {f"last training {name}": train[-1].get(name) for name in names} if train else {}
    weights = {"weights": f"moving average, decay {run['ema']} per step"} if run.get("ema") else {}
    ran = {"steps": len(train), "ranks": run.get("world_size"), "device": run.get("device"), "code": run.get("git_commit")}
    kind = f"A LoRA adapter (r={run['lora_r']}) for" if run["lora_r"] else "A fine-tune of"
    revision = f" at revision `{run['base_revision']}`" if run["base_revision"] else ""
    parts = [
        _front_matter(run["base_ckpt"], "peft" if run["lora_r"] else ""),
        f"# Higgs Audio v2, fine-tuned\n\n{kind} `{run['base_ckpt']}`{revision}.",
        f"```\n{command}\n```",
        _table("Data", data),
        _table("Results", results),
        _table("Settings", changed | weights | ran | run.get("versions", {})),
    ]
    return "\n\n".join(parts) + "\n"


def of_model(what: str, command: str, source: Path, base: str = "") -> str:
    """The card of a model made from others: `what` was done by `command`; the card of `source`, if any, stands below."""
    below = ""
    if (source / checkpoint.STATE_FILE).is_file():
        below = of_run(source.resolve().parent.parent, checkpoint.read_state(source)["step"])
    elif (source / "README.md").is_file():
        below = (source / "README.md").read_text()
    below = re.sub(r"\A---\n.*?\n---\n", "", below, flags=re.DOTALL).strip()
    parts = [_front_matter(base), f"# Higgs Audio v2\n\n{what}", f"```\n{command}\n```" * bool(command), below]
    return "\n\n".join(filter(None, parts)) + "\n"


def _front_matter(base: str, library: str = "") -> str:
    values = ["pipeline_tag: text-to-speech", "tags: [higgs-audio-v2]"]
    values += [f"base_model: {base}"] * (re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists())
    values += [f"library_name: {library}"] * bool(library)
    return "\n".join(["---", *values, "---"])


def _table(title: str, values: dict) -> str:
    rows = [
        f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |" for name, value in values.items()
    ]
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *rows])


if __name__ == "__main__":
    print(of_run(Path(sys.argv[1])))
