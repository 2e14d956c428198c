"""Model cards: README.md of a finished model, with its data, results, settings and the command that made it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoint
from common import read_json, write_whole
from config import Config, to_argv

LOSSES = ("step", "loss", "text_loss", "audio_loss", "eos_loss")


def write(folder: Path, make: Callable[[], str]) -> None:
    """The card of a finished model, after its weights: whatever fails here is a warning, never an error."""
    try:
        text = make()
        write_whole(folder / "README.md", lambda file: file.write(text.encode()))
    except Exception as error:
        print(f"warning: {folder}: the model is whole, but has no model card: {error!r}", file=sys.stderr, flush=True)


def of_run(run: dict, metrics: Path, last_step: float = math.inf) -> str:
    """The card of a run's model after `last_step`.

    run:     the content of OUTPUT/config.json
    metrics: OUTPUT/metrics.jsonl, which may be missing
    """
    known = {f.name: f for f in dataclasses.fields(Config)}
    changed = {name: run[name] for name, field in known.items() if name in run and run[name] != field.default}
    lines = _read_metrics(metrics, last_step)
    kind = f"A LoRA adapter (r={run['lora_r']}) for" if run["lora_r"] else "A fine-tune of"
    revision = f" at revision `{run['base_revision']}`" if run["base_revision"] else ""
    ran = {"weights": f"moving average, decay {run['ema']} per step"} if run.get("ema") else {}
    ran["steps"] = len(lines["train"])
    ran |= {"ranks": run.get("world_size"), "device": run.get("device"), "code": run.get("git_commit")}
    return _join(
        _front_matter(run["base_ckpt"], "peft" if run["lora_r"] else ""),
        f"# Higgs Audio v2, fine-tuned\n\n{kind} `{run['base_ckpt']}`{revision}.",
        f"```\n{shlex.join(['bash', 'launch.sh', 'train', *to_argv(changed)])}\n```",
        _table("Data", _data(run, lines["train"])),
        _table("Results", _results(**lines)),
        _table("Settings", changed | ran | run.get("versions", {})),
    )


def of_model(what: str, command: str, source: Path, base: str = "", below: str = "") -> str:
    """The card of a model made from others.

    what:    what was done, by `command`
    source:  the model whose card is repeated, if it has one
    below:   what stands at the end
    """
    card = ""
    if (source / checkpoint.STATE_FILE).is_file():
        state, output_dir = checkpoint.read_state(source), source.resolve().parent.parent
        run = state["settings"] if "settings" in state else read_json(output_dir / "config.json")
        card = of_run(run, output_dir / "metrics.jsonl", state["step"])
    elif (source / "README.md").is_file():
        card = (source / "README.md").read_text()
    card = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL).strip()
    return _join(_front_matter(base), f"# Higgs Audio v2\n\n{what}", f"```\n{command}\n```" * bool(command), card, below)


def _read_metrics(path: Path, last_step: float) -> dict[str, list[dict]]:
    """The lines up to `last_step` by split; none for a run without a step of its own, or a checkpoint that was copied."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if line["step"] <= last_step]
    return {split: [line for line in lines if line["split"] == split] for split in ("train", "val", "sample")}


def _data(run: dict, train: list[dict]) -> dict:
    hours = sum(line["audio_sec_per_sec"] * line["step_time_sec"] for line in train) / 3600
    return {
        "manifest": run["train_manifest"],
        "records": run.get("training_samples"),
        "hours of training audio": f"{hours:.3g} in {train[-1]['epoch'] + 1} epoch(s)" if train else None,
        "audio targets": sum(line["audio_targets"] for line in train),
        "text targets": sum(line["text_targets"] for line in train),
    }


def _results(train: list[dict], val: list[dict], sample: list[dict]) -> dict:
    """The last figures of each kind."""
    validation = {f"validation {name}": val[-1].get(name) for name in LOSSES} if val else {}
    samples = {f"samples: {name}": value for name, value in (sample or [{}])[-1].items() if isinstance(value, float)}
    training = {f"last training {name}": train[-1].get(name) for name in LOSSES} if train else {}
    return validation | samples | training


def _front_matter(base: str, library: str = "") -> str:
    values = ["pipeline_tag: text-to-speech", "tags: [higgs-audio-v2]"]
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    values += [f"base_model: {base}"] if is_on_hub else []
    values += [f"library_name: {library}"] if library else []
    return "\n".join(["---", *values, "---"])


def _table(title: str, values: dict) -> str:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in values.items()}
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in shown.items())])


def _join(*parts: str) -> str:
    return "\n\n".join(filter(None, parts)) + "\n"
