"""Model cards: README.md of a finished model, with its use, data, results, samples, settings and the command that made it.

A card may become public: of what is on this machine it holds names, never the folders that they are in.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import checkpoint
from common import read_json, write_text
from config import AUDIO_TOKENIZER, BASE_CKPT, REVISIONS, Config, base_revision, to_argv
from export import layouts
from process.monitor import read_lines

LOSSES = ("step", "loss", "text_loss", "audio_loss", "eos_loss", "eos_accuracy", "copy_share")
PUBLISHED = (BASE_CKPT, "bosonai/higgs-tts-2-3b-base")  # two names of one repository
LICENSE = f"https://huggingface.co/{BASE_CKPT}/blob/main/LICENSE"
USING = Path(__file__).parent.parent / "docs" / "card.md"
MADE = "## How it was made"
SECTIONS = {  # of that file, by what was written
    "adapter": ("This trainer", "PEFT"),
    "boson": ("This trainer", "The official serve engine", "ComfyUI"),
    "transformers": ("transformers", "vLLM-Omni", "This trainer"),
}


@dataclass(frozen=True)
class About:
    """What a card says besides. name: what the model is loaded by; has_samples: add sounds that the run has generated"""

    name: str = ""
    command: Sequence[str] = ()
    languages: Sequence[str] = ()
    has_samples: bool = False


NOTHING = About()


def write(folder: Path, make: Callable[[], str]) -> None:
    """The card of a finished model, after its weights: whatever fails here is a warning, never an error."""
    try:
        write_text(folder / "README.md", make())
    except Exception as error:
        print(f"warning: {folder}: the model is whole, but has no model card: {error!r}", file=sys.stderr, flush=True)


def _how_it_was_made(run: dict, metrics: Path, last_step: float) -> list[str]:
    """run: the content of OUTPUT/config.json; metrics: OUTPUT/metrics.jsonl, which may be missing"""
    known = {f.name: f for f in dataclasses.fields(Config)}
    changed = {name: public(run[name]) for name, field in known.items() if name in run and run[name] != field.default}
    lines = _read_metrics(metrics, last_step)
    kind = f"A LoRA adapter (r={run['lora_r']}) for" if run["lora_r"] else "A fine-tune of"
    revision = f" at revision `{run['base_revision']}`" if run["base_revision"] else ""
    ran = {"weights": f"moving average, decay {run['ema']} per step"} if run.get("ema") else {}
    ran["steps"] = len(lines["train"])
    ran |= {"ranks": run.get("world_size"), "device": run.get("device"), "code": run.get("git_commit")}
    return [
        f"{MADE}\n\n{kind} `{public(run['base_ckpt'])}`{revision}.",
        f"```\n{shlex.join(['bash', 'launch.sh', 'train', *to_argv(changed)])}\n```",
        _table("Data", _data(run, lines["train"])),
        _table("Results", _results(**lines)),
        _table("Settings", changed | ran | run.get("versions", {})),
    ]


def of_model(out: Path, what: str, source: Path, base: str = "", about: About = NOTHING, below: str = "") -> str:
    """The card of the model in `out`.

    what:   what was done, by `about.command`
    source: the model it was made from, or itself; how it was made is repeated, if its run or its card says so
    base:   its base, if that is known
    below:  what else was found
    """
    run_dir = next((folder for folder in source.resolve().parents[:2] if (folder / "metrics.jsonl").is_file()), None)
    state = checkpoint.read_state(source) if (source / checkpoint.STATE_FILE).is_file() else {}
    run, last_step = state.get("settings"), state.get("step", math.inf)
    if run_dir or run:
        run = run or read_json(run_dir / "config.json")
        base, made = run["base_ckpt"], _how_it_was_made(run, (run_dir or source) / "metrics.jsonl", last_step)
    else:
        card = (source / "README.md").read_text() if (source / "README.md").is_file() else ""
        made = re.findall(rf"^{MADE}.*?(?=\n+## Licence|\Z)", card, flags=re.DOTALL | re.MULTILINE)
        base = base or "".join(re.findall(r"^base_model: (.+)$", card, flags=re.MULTILINE)[:1])
    kind = "adapter" if (out / "adapter_config.json").is_file() else layouts.layout_of(out)
    name = about.name or out.name
    return _join(
        _front_matter(base, {"adapter": "peft", "transformers": "transformers"}.get(kind, ""), about.languages),
        f"# {name.split('/')[-1]}",
        what,
        f"```\n{shlex.join(map(str, map(public, about.command)))}\n```" * bool(about.command),
        _usage(kind, name, base),
        _samples(out, run_dir, last_step) if run_dir and about.has_samples else "",
        *made,
        *(_evaluations(run_dir) if run_dir else ()),
        below,
        _license(base),
    )


def public(value: object) -> object:
    """Names instead of the paths in a setting or argument; the name of a repository on the Hub stays."""
    if not isinstance(value, str) or _is_on_hub(value):
        return value
    return ",".join(item if "://" in item else item.rstrip("/").split("/")[-1] for item in value.split(","))


def _is_on_hub(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _usage(kind: str, name: str, base: str) -> str:
    """The sections of docs/card.md for what was written."""
    values = {"BASE": public(base), "CODEC_REVISION": REVISIONS[AUDIO_TOKENIZER], "CODEC": AUDIO_TOKENIZER}
    values |= {"REVISION": repr(base_revision(base, None)), "FOLDER": name.split("/")[-1], "NAME": name}
    _, *sections = USING.read_text(encoding="utf-8").split("### ")
    titled = {section.split("\n")[0]: f"### {section.strip()}" for section in sections}
    text = "\n\n".join(titled[title] for title in SECTIONS[kind])
    return "## How to use\n\n" + re.sub(rf"\b({'|'.join(values)})\b", lambda match: values[match[1]], text)


def _samples(out: Path, run_dir: Path, last_step: float) -> str:
    """Copies the newest generated sounds up to a step into OUT/samples, never the clips they imitate; the section about them."""
    rounds = {int(path.parent.name[5:]): path for path in run_dir.glob("samples/step_*/results.jsonl")}
    step = max((step for step in rounds if 0 < step <= last_step), default=0)
    rows = {}
    for number, line in enumerate(rounds[step].read_text(encoding="utf-8").splitlines() if step else ()):
        result, copy = json.loads(line), out / "samples" / f"{number}.wav"
        if "wav" in result:
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(rounds[step].with_name(Path(result["wav"]).name), copy)
            rows[f"[{copy.name}](samples/{copy.name})"] = " ".join(result["text"].split())
    return _table(f"Samples of step {step}", rows) if rows else ""


def _evaluations(run_dir: Path) -> Iterator[str]:
    """What `evaluate` wrote into the run's folder."""
    for found in map(read_json, sorted(run_dir.glob("*/evaluation.json"))):
        rows = {"lines": f"{found['num_lines']} of {public(found['lines'])}"}
        rows |= {name: public(value) for name, value in found["judged_by"].items()}
        for name, figure in found["figures"].items():
            rows[name] = ", against ".join(f"{figure[key]:.4g}" for key in ("value", "against") if figure[key] is not None)
        yield _table(f"Evaluation of {' against '.join(map(str, map(public, found['models'])))}", rows)


def _license(base: str) -> str:
    text = f"This model is under the licence of its base, `{public(base)}`" if base else ""
    text += f", the [Boson Higgs Audio 2 Community License]({LICENSE}): read what it asks of those who share it" * (
        base in PUBLISHED
    )
    text += ".\n" * bool(base)
    return f"## Licence\n\n{text}Use a person's voice only with that person's consent, and say that the speech is generated."


def _read_metrics(path: Path, last_step: float) -> dict[str, list[dict]]:
    """The lines up to `last_step` by split; none for a run without a step of its own, or a checkpoint that was copied."""
    lines = read_lines(path) if path.exists() else {}
    return {split: [line for line in lines.get(split, []) if line["step"] <= last_step] for split in ("train", "val", "sample")}


def _data(run: dict, train: list[dict]) -> dict:
    hours = sum(line["audio_sec_per_sec"] * line["step_time_sec"] for line in train) / 3600
    return {
        "manifest": public(run["train_manifest"]),
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


def _front_matter(base: str, library: str = "", languages: Sequence[str] = ()) -> str:
    values = ["pipeline_tag: text-to-speech", "tags: [higgs-audio-v2]"]
    values += [f"base_model: {base}"] if _is_on_hub(base) else []
    license = ["license: other", "license_name: boson-higgs-audio-2-community", f"license_link: {LICENSE}"]
    values += license * (base in PUBLISHED)
    values += [f"library_name: {library}"] if library else []
    values += [f"language: [{', '.join(languages)}]"] if languages else []
    return "\n".join(["---", *values, "---"])


def _table(title: str, values: dict) -> str:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in values.items()}
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in shown.items())])


def _join(*parts: str) -> str:
    return "\n\n".join(filter(None, parts)) + "\n"
