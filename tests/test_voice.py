"""`bash launch.sh voice`: its stages, what a stop or a change does to them, and the whole way with tiny models."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from argparse import Namespace
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import torch
from conftest import ROOT
from test_codec import write_wav

from common import ConfigError
from config import parse_config, to_argv
from tools import stages, voice
from tools.stages import Stage

# ---- stages, with a launch.sh that makes what it is told to


@pytest.fixture()
def work(tmp_path, monkeypatch):
    """A folder with a launch.sh, `NAME FILE...`: notes NAME, makes FILE, and fails where a file fail-NAME is."""
    script = f'echo "$1" >>{tmp_path}/asked; [ ! -e {tmp_path}/fail-$1 ] || exit 3; shift; touch "$@"'
    (tmp_path / "launch.sh").write_text(script)
    (tmp_path / "talk.wav").write_text("one")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    return tmp_path


def go(work: Path, extra: str = "x") -> tuple[int, list[str]]:
    """Follow three stages; returns the status, and the names of those that ran."""
    out = work / "out"
    state = json.loads((out / stages.STATE).read_text()) if (out / stages.STATE).exists() else {"stages": {}}
    (work / "asked").write_text("")
    made = [
        Stage("cut", "", ["cut", out / "a.jsonl"], ["a.jsonl"], [work / "talk.wav"]),
        Stage("check", "", ["check", out / "b", lambda: [out / extra]], ["b"], [out / "a.jsonl"]),
        Stage("train", lambda: "later", ["train", out / "c"], ["c"], goes_on=True),
    ]
    return stages.follow(made, out, state), (work / "asked").read_text().split()


def test_each_stage_runs_once_and_a_failed_one_again(work, capsys):
    (work / "fail-check").touch()
    assert go(work) == (3, ["cut", "check"])
    assert "stopped at [2 of 3] check; to go on from there:\n    bash " in capsys.readouterr().err
    (work / "fail-check").unlink()
    assert go(work) == (0, ["check", "train"])
    assert go(work) == (0, [])
    shown = capsys.readouterr().out
    assert "\n[3 of 3] train: later\n    bash " in shown and shown.count("done before") == 4
    (work / "out" / "b").unlink()
    assert go(work) == (0, ["check"])


def test_what_has_changed_is_done_again_from_there(work, capsys):
    assert go(work) == (0, ["cut", "check", "train"])
    (work / "out" / "a.jsonl").write_text("a transcript was corrected")
    assert go(work) == (0, ["check", "train"])
    assert (
        work / "out" / "a.jsonl"
    ).read_text() and "[2 of 3] check: inputs or arguments have changed" in capsys.readouterr().out
    assert go(work, "y") == (0, ["check", "train"])
    (work / "talk.wav").write_text("another")
    assert go(work, "y") == (0, ["cut", "check", "train"])
    kept = {path.name: sorted(file.name for file in path.iterdir()) for path in (work / "out").glob("earlier-*")}
    assert kept == {"earlier-1": ["b", "c"], "earlier-2": ["b", "c"], "earlier-3": ["a.jsonl", "b", "c"]}
    assert (work / "out" / "earlier-3" / "a.jsonl").read_text() == "a transcript was corrected"
    assert go(work, "y") == (0, [])


def test_half_made_things_are_made_anew(work):
    (work / "fail-train").touch()
    (work / "launch.sh").write_text(
        f"echo $1 >>{work}/asked; [ ! -e {work}/fail-$1 ] || exit 3; [ ! -e $2 ] || exit 4; touch $2"
    )
    (work / "out" / "b").touch()  # as if killed in `check`
    assert go(work) == (3, ["cut", "check", "train"])
    (work / "out" / "c").touch()  # but training goes on with what it has
    (work / "fail-train").unlink()
    assert go(work) == (4, ["train"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_stage_end_in_good_order(number, work):
    """Training saves, and ends with 0 after Ctrl-C, with 75 after SIGTERM: nothing else is started, and it is not done."""
    status = 0 if number == signal.SIGINT else 75
    trap = f"trap 'touch {work}/saved; exit {status}' {number.name[3:]}; touch {work}/started; while :; do sleep 0.1; done"
    (work / "launch.sh").write_text(trap)
    code = f"from tools import stages; stages.ROOT = stages.Path({str(work)!r})\n"
    code += "made = [stages.Stage('train', '', ['train'], ['c']), stages.Stage('next', '', ['next'])]\n"
    code += f"raise SystemExit(stages.follow(made, stages.Path({str(work / 'out')!r}), {{'stages': {{}}}}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    while not (work / "started").exists():
        time.sleep(0.05)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)  # a terminal sends it to all
    _, error = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else 75) and (work / "saved").exists()
    assert "stopped at [1 of 2] train; to go on from there:" in error and "Traceback" not in error


# ---- choices


def test_what_is_given_decides_where_it_begins(tmp_path):
    for name, seconds in {"short/a.wav": 1, "short/b.wav": 2, "long/a.wav": 31, "with/a.wav": 1}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_wav(tmp_path / name, seconds)
    (tmp_path / "with" / "a.txt").write_text("one")
    (tmp_path / "lines.jsonl").touch()
    given = {"short": "clips", "long": "recordings", "with": "dataset", "lines.jsonl": "dataset", "long/a.wav": "recordings"}
    assert {name: voice.kind_of([tmp_path / name]) for name in given} == given
    assert voice.kind_of([tmp_path / "short/a.wav", tmp_path / "long/a.wav"]) == "recordings"
    with pytest.raises(ConfigError, match=r"gone.wav: no such file or folder"):
        voice.kind_of([tmp_path / "gone.wav"])
    with pytest.raises(ConfigError, match="any number of recordings, or one folder or table"):
        voice.kind_of([tmp_path / "short", tmp_path / "with"])
    args = Namespace(input=[tmp_path / "short"], name="anna", gpu="", asr_model="a", sv_model="b", language="de")
    args.base_ckpt, args.audio_tokenizer = "base", "codec"
    last = ["check", "pair", "encode", "train", "report", "export", "evaluate"]
    first = {"recordings": ["cut", "transcribe"], "clips": ["transcribe", "read"], "dataset": ["read"]}
    for kind, names in first.items():
        made = voice.stages_of(args, tmp_path / "o", kind, [])
        assert [stage.name for stage in made] == names + last
    assert made[-1].argv[-6:] == ["--asr_model", "none", "--sv_model", "b", "--language", "en"]  # evaluate compares no German
    args.gpu, args.batch_size, args.ranks = "1 x a card", 4, 1
    assert [stage.name for stage in voice.stages_of(args, tmp_path / "o", "dataset", [])] == [
        "read",
        *last[:3],
        "plan",
        *last[3:],
    ]


ROWS = [  # of plan --json, as on the published base
    {"training": "lora", "base": "bf16", "checkpointing": "none", "needed_gib": 40.0, "hours_per_1000_clips": {"80": 0.1, "141": 0.05}},
    {"training": "lora", "base": "bf16", "checkpointing": "selective", "needed_gib": 16.0, "hours_per_1000_clips": {"80": 0.2}},
    {"training": "lora", "base": "bf16", "checkpointing": "full", "needed_gib": 20.0, "hours_per_1000_clips": {"24": 0.5, "80": 0.2}},
    {"training": "lora", "base": "nf4", "checkpointing": "none", "needed_gib": 13.0, "hours_per_1000_clips": {"16": 1.0, "24": 0.8}},
    {"training": "full", "base": "bf16", "checkpointing": "full", "needed_gib": 10.0, "hours_per_1000_clips": {"80": 1.0}},
]  # fmt: skip


@pytest.mark.parametrize(
    ("memory_gib", "chosen"), [(79.2, ("bf16", "none", 0.1)), (23.6, ("bf16", "full", 0.5)), (15.5, ("nf4", "none", 1.0))]
)
def test_settings_by_the_card_and_the_clips(memory_gib, chosen, tmp_path):
    (tmp_path / "paired").mkdir()
    (tmp_path / "plan.json").write_text(json.dumps(ROWS))
    args = Namespace(gpu="1 x a card", memory_gib=memory_gib, batch_size=4, ranks=1, minutes=0)
    row = voice.choose(ROWS, args)
    assert (row["base"], row["checkpointing"], row["hours"]) == chosen
    for clips, epochs in {26: 30, 285: 6, 6000: 3}.items():
        (tmp_path / "paired" / "train.jsonl").write_text("{}\n" * clips)
        schedule = voice.Schedule.of(args, tmp_path)
        cfg = parse_config(["--train_manifest", "x", "--output_dir", "y", "--val_manifest", "z", *to_argv(schedule.flags)])
        assert cfg.epochs == epochs and cfg.batch_size * cfg.grad_accum == 8 and (cfg.quantize == "nf4") == (chosen[0] == "nf4")
        steps = epochs * -(-clips // 8)
        assert 0 < cfg.warmup_steps < steps / 10 + 1 and steps / 9 < cfg.val_steps == cfg.save_steps == cfg.sample_steps < steps
        assert (
            schedule.about
            == f"{clips} clips, {epochs} epochs of {-(-clips // 8)} steps, about {row['hours'] * clips / 1000 * epochs:.1f} hours"
        )
    args.minutes = 60 * row["hours"] * 6 * 2.5
    assert voice.Schedule.of(args, tmp_path).flags["epochs"] == 2
    args.memory_gib = 8
    with pytest.raises(ConfigError, match=r"13\.0 GiB are needed; try --batch_size 1, or see what bash launch.sh plan says"):
        voice.choose(ROWS, args)


def test_mistakes_are_found_before_anything_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_wav(tmp_path / "talk.wav", 1.0)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    for words, message in {
        "gone.m4a --name anna": "gone.m4a: no such file or folder",
        "talk.wav --name anna --languge de": "languge",
        "talk.wav --name anna --out thesis": "thesis: holds something else; choose another folder with --out",
        "talk.wav --name ../anna": "--name ../anna: a word, such as anna",
        "talk.wav --name anna --minutes 10 --device cpu": "--minutes: ",
    }.items():
        assert voice.main(words.split()) == 2 and message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talk.wav", "thesis"]


# ---- the whole way


def in_this_process(argv: list[str]) -> int:
    """What launch.sh would start; a Python of its own for each takes longer than the work here."""
    module = {"prepare": "prepare.__main__", "train": "train", "evaluate": "generate.evaluate", "generate": "generate.__main__"}
    name = module.get(argv[0], "tools.report" if argv[0] == "report" else "export.__main__")
    argv = [*argv, *["--max_new_tokens", "20"] * (argv[0] in ("evaluate", "generate"))]  # these models speak on and on
    try:
        return importlib.import_module(name).main(argv if name == "export.__main__" else argv[1:])
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_from_clips_with_transcripts_to_a_voice(tmp_path, checkpoint_dir, codec_dir, judges, monkeypatch, capsys):
    for number in range(12):
        (tmp_path / "clips").mkdir(exist_ok=True)
        write_wav(tmp_path / "clips" / f"{number:02}.wav", 0.4, seed=number)
        (tmp_path / "clips" / f"{number:02}.txt").write_text(f"line {number}")
    monkeypatch.setattr(stages, "run", in_this_process)
    monkeypatch.setattr(sys, "argv", ["voice"])
    out = tmp_path / "out"
    names = {
        "base_ckpt": checkpoint_dir,
        "audio_tokenizer": codec_dir,
        "asr_model": judges[0],
        "sv_model": "none",
        "out": out,
    }
    small = {
        "max_steps": 2,
        "val_steps": 1,
        "save_steps": 1,
        "sample_steps": 2,
        "num_samples": 1,
        "device": "cpu",
        "num_workers": 0,
    }
    argv = [str(tmp_path / "clips"), "--name", "anna", *to_argv(names | small)]
    assert voice.main(argv) == 0
    shown = capsys.readouterr().out
    assert (
        "anna, from dataset, in " in shown
        and "whose owner has agreed" in shown
        and "step 2: " not in shown.split("[4 of 8]")[0]
    )
    for name in ("run/report.html", "model/adapter_model.safetensors", "model/README.md", "evaluation/evaluation.html"):
        assert (out / name).is_file()
    val = [json.loads(line) for line in (out / "paired" / "val.jsonl").read_text().splitlines()]
    assert len(val) >= 4 and all(record["speaker"] == "anna" for record in val)
    samples = {path.parent.name for path in (out / "run" / "samples").glob("step_*/*")}
    assert {"step_0", "step_2"} <= samples
    assert "wer_seedtts" in shown and f"anna: {out / 'model'}; {out / 'run'} is a run; its model is " in shown
    use = [shlex.split(line) for line in shown.split("use it:\n")[1].splitlines()]
    assert [words[2] for words in use] == ["generate", "generate", "merge"]
    assert (out / "reference.txt").read_text().startswith("line ")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bosonai").symlink_to(codec_dir / "bosonai")
    (tmp_path / "script.txt").write_text("One. Two.")
    for words in use:
        extra = ["--force_audio", "--device", "cpu"] if words[2] == "generate" else []
        assert in_this_process([*words[2:], *extra]) == 0, capsys.readouterr().err
    assert (
        all(len(soundfile.read(name)[0]) for name in ("hello.wav", "script.wav")) and (out / "merged" / "config.json").is_file()
    )
    assert voice.main(argv) == 0 and capsys.readouterr().out.count("done before") == 8


def synthetic_talk(path: Path) -> Path:
    """Three minutes of a synthetic voice with pauses, from espeak-ng where it is installed."""
    if not shutil.which("espeak-ng"):
        pytest.skip("needs espeak-ng")
    texts = [
        "The quick brown fox jumps over the lazy dog",
        "She sells sea shells by the sea shore",
        "A journey begins with a step",
    ]
    parts, rate = [], 22050
    while sum(map(len, parts)) < 180 * rate:
        text = f"Number {len(parts)}. {texts[len(parts) // 2 % 3]}, and so on until the end of the evening."
        subprocess.run(["espeak-ng", "-s", str(150 + len(parts)), "-w", path, text], check=True)
        samples, rate = soundfile.read(path, dtype="float32")
        parts += [samples, np.zeros(int(0.8 * rate), np.float32)]
    soundfile.write(path, np.concatenate(parts), rate)
    return path


def killed(command: list, when: str, cwd: Path) -> None:
    """Start a command, and kill it and all that it has started once it has printed `when`."""
    with open(cwd / "log", "a") as log:
        process = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log, start_new_session=True)
        while when not in (cwd / "log").read_text():
            assert process.poll() is None, (cwd / "log").read_text()
            time.sleep(0.2)
        started = psutil.Process(process.pid)
        for each in [started, *started.children(recursive=True)]:
            each.kill()
        process.wait()


@pytest.mark.slow
def test_a_recording_becomes_a_voice_through_two_kills(tmp_path, checkpoint_dir, codec_files, judges):
    """By the real launch.sh and its processes; then the notebook, whose last cell plays what it has made."""
    (tmp_path / "bosonai").symlink_to(codec_files / "bosonai")
    talk = synthetic_talk(tmp_path / "talk.wav")
    names = {"base_ckpt": checkpoint_dir, "audio_tokenizer": codec_files, "asr_model": judges[0], "sv_model": judges[1]}
    small = {
        "max_steps": 6,
        "val_steps": 2,
        "save_steps": 2,
        "sample_steps": 2,
        "num_samples": 1,
        "device": "cpu",
        "num_workers": 1,
    }
    flags = to_argv(names | small | {"out": tmp_path / "voices" / "anna"})
    command = ["bash", str(ROOT / "launch.sh"), "voice", str(talk), "--name", "anna", *flags]
    killed(command, "encode: turn ", tmp_path)
    killed(command, "step 4: validation loss", tmp_path)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    with open(tmp_path / "log", "a") as log:  # the transcript of all three
        log.write(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done before") == 5 and "resumed from" in done.stderr
    for name in ("run/report.html", "model/adapter_model.safetensors", "evaluation/evaluation.html"):
        assert (tmp_path / "voices" / "anna" / name).is_file()
    speak = f"--audio_tokenizer {codec_files} --device cpu --force_audio --max_new_tokens 60"
    run_notebook(
        {"RECORDING": "talk.wav", "NAME": "anna", "TEXT": "Hello, you.", "FLAGS": shlex.join(flags), "SPEAK": speak}, tmp_path
    )


def run_notebook(settings: dict[str, str], folder: Path) -> None:
    """The code cells of docs/voice.ipynb in order, as Jupyter would run them, with these settings in the place of its own."""
    cells = json.loads((ROOT / "docs" / "voice.ipynb").read_text())["cells"]
    (folder / "launch.sh").write_text(f'exec bash {ROOT}/launch.sh "$@"')
    played = []
    display = types.ModuleType("IPython.display")
    display.Audio = lambda path: played.append(soundfile.read(folder / path)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
        patch.setitem(sys.modules, "IPython.display", display)
        for cell in (cell for cell in cells if cell["cell_type"] == "code"):
            source = "".join(cell["source"])
            if source.startswith("!"):
                words = shlex.split(re.sub(r"\{(\w+)\}", lambda found: settings[found[1]], source[1:]))
                subprocess.run(words, check=True)
            elif "parameters" in cell["metadata"].get("tags", ()):
                given: dict[str, str] = {}
                exec(source, given)
                assert settings.keys() == given.keys() - {"__builtins__"}
            else:
                exec(source, dict(settings))
    assert len(played) == 1 and len(played[0])


def test_the_notebook_is_one():
    """Its cells without outputs, in the form that Jupyter opens; every command in it is one of launch.sh."""
    notebook = json.loads((ROOT / "docs" / "voice.ipynb").read_text())
    assert (
        notebook["nbformat"] == 4
        and {"metadata", "cells", "nbformat_minor"} <= notebook.keys()
        and len(notebook["cells"]) <= 10
    )
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None and cell["id"] for cell in code)
    shell = ["".join(cell["source"]) for cell in code if cell["source"][0].startswith("!")]
    assert shell[0].startswith("!bash launch.sh voice {RECORDING} --name {NAME}") and "Audio(" in "".join(code[-1]["source"])
