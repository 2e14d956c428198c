"""docs/mistakes.md: what a newcomer gets wrong, and what is said, word for word.

python tests/test_mistakes.py      # writes the page anew
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from huggingface_hub import constants

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from conftest import ROOT  # noqa: E402
from test_readme import launch_sh, main_of, program  # noqa: E402

PAGE = ROOT / "docs" / "mistakes.md"
HEAD = """# Mistakes, and what is said

Each row was typed as it stands, in a folder of a newcomer; `tests/test_mistakes.py` types it again and compares every word. The
exit status is 2, and nothing was written or lost. What else may happen to a run is in [faults.md](faults.md).

| mistake | typed | said |
| --- | --- | --- |
"""
STOPPED = """
## Ctrl-C, and a full disk, in every stage

Each command was stopped in the middle by Ctrl-C (the exit status is 130; training saves, with 0), and run on a full disk (2).
Then the same command was typed again, and did its work; `evaluate` asks for `--force` where it has begun. `tests/test_stopped.py`
does all of this again.

| typed | said after Ctrl-C | said on a full disk |
| --- | --- | --- |
"""
TRAIN = "bash launch.sh --train_manifest {} --output_dir runs/voice --base_ckpt checkpoint --audio_tokenizer codec"
GENERATE = "bash launch.sh generate --ckpt checkpoint --audio_tokenizer codec --text Hello."


PATCH = pytest.MonkeyPatch()  # what makes a folder may change; undone after each test


def wave(path: str, seconds: float = 1.0) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path)).normal(size=int(seconds * 24000))
    soundfile.write(path, 0.1 * noise, 24000, subtype="PCM_16")


def write(path: str, content: str | bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def clips(folder: str, texts: bool = True, seconds: float = 1.0) -> None:
    for name in ("001", "002", "003"):
        wave(f"{folder}/anna/{name}.wav", seconds)
        if texts:
            write(f"{folder}/anna/{name}.txt", f"This is line {name}.")


def spoil(path: str, content: str | bytes) -> Callable[[], None]:
    """A folder `spoilt` of good clips, one file of which is replaced."""
    return lambda: (clips("spoilt"), write(path, content))


def table(*rows: str) -> Callable[[], None]:
    return lambda: (clips("recordings"), write("table.csv", "\n".join(rows) + "\n"))


def chatml(content: str) -> Callable[[], None]:
    return lambda: write("train.jsonl", content)


def record(**message) -> str:
    answer = {"role": "assistant", "content": {"type": "audio", "audio_url": "recordings/anna/001.wav"}} | message
    return json.dumps({"messages": [{"role": "user", "content": "Hello."}, answer]}) + "\n"


# mistake -> (command, what makes the folder)
MISTAKES: dict[str, tuple[str, Callable[[], None]]] = {
    "a command that does not exist": ("bash launch.sh trian train.jsonl", lambda: None),
    "a step of `prepare` that does not exist": ("bash launch.sh prepare chek recordings", lambda: None),
    "a wrong folder": ("bash launch.sh prepare check recordngs", lambda: clips("recordings")),
    "a wrong file": (TRAIN.format("trian.jsonl"), lambda: None),
    "an empty folder": ("bash launch.sh prepare check recordings", lambda: os.mkdir("recordings")),
    "clips without transcripts": ("bash launch.sh prepare check recordings", lambda: clips("recordings", texts=False)),
    "one long recording": ("bash launch.sh prepare check recordings", lambda: wave("recordings/talk.wav", 90)),
    "a recording as a data set": ("bash launch.sh prepare pair talk.wav paired", lambda: wave("talk.wav")),
    "a recording without speech": ("bash launch.sh prepare cut talk.wav --out cuts.jsonl", lambda: wave("talk.wav", 5)),
    "an m4a without ffmpeg": (
        "bash launch.sh prepare cut talk.m4a --out cuts.jsonl",
        lambda: (write("talk.m4a", b"\0\0\0\x20ftypM4A "), PATCH.setenv("PATH", "/nowhere")),
    ),
    "cuts that are there already": (
        "bash launch.sh prepare cut talk.wav --out cuts.jsonl",
        lambda: (wave("talk.wav"), write("cuts.jsonl", "{}\n")),
    ),
    "cuts without transcripts": (
        TRAIN.format("cuts.jsonl"),
        lambda: (wave("talk.wav", 9), write("cuts.jsonl", '{"audio": "talk.wav", "start": 1, "end": 4.5, "text": ""}\n')),
    ),
    "long recordings among clips to transcribe": (
        "bash launch.sh prepare transcribe recordings",
        lambda: (clips("recordings", texts=False), wave("recordings/talk.wav", 90)),
    ),
    "an empty transcript": (TRAIN.format("spoilt"), spoil("spoilt/anna/002.txt", "")),
    "a transcript that is not UTF-8": (
        "bash launch.sh prepare check spoilt",
        spoil("spoilt/anna/002.txt", "Käse.".encode("latin-1")),
    ),
    "a clip that is cut off": (TRAIN.format("spoilt"), spoil("spoilt/anna/002.wav", b"RIFF")),
    "a table that names clips elsewhere": (TRAIN.format("table.csv"), table("audio,text", "/mnt/old/001.wav,Hello.")),
    "a table without a header that says what is what": ("bash launch.sh prepare check table.csv", table("a,b", "1,2", "3,4")),
    "broken JSON": (TRAIN.format("train.jsonl"), chatml(record() + "{'messages': []}\n")),
    "a misspelt role": (TRAIN.format("train.jsonl"), chatml(record(role="asistant"))),
    "audio that is not there": (TRAIN.format("train.jsonl"), chatml(record())),
    "a typo in a flag": (TRAIN.format("train.jsonl") + " --learning_rat 1e-4", chatml(record())),
    "two wrong values": (TRAIN.format("train.jsonl") + " --lora_r sixteen --batch_size 0", chatml(record())),
    "no output folder": ("bash launch.sh --train_manifest train.jsonl", chatml(record())),
    "4 bits for a full fine-tune": (TRAIN.format("train.jsonl") + " --quantize nf4 --lora_r 0", chatml(record())),
    "a GPU that is not there": (TRAIN.format("train.jsonl") + " --device cuda", chatml(record())),
    "nothing to resume": (TRAIN.format("train.jsonl") + " --resume runs/voice/checkpoints/step_10", chatml(record())),
    "a number of processes that is none": ("NPROC=two bash launch.sh --train_manifest train.jsonl", lambda: None),
    "a model that is not there": ("bash launch.sh generate --ckpt runs/voice/final --text Hello.", lambda: None),
    "the published model without a network": (
        "bash launch.sh generate --ckpt bosonai/higgs-audio-v2-generation-3B-base --text Hello.",
        lambda: (PATCH.setattr(constants, "HF_HUB_OFFLINE", True), PATCH.setattr(constants, "HF_HUB_CACHE", "cache")),
    ),
    "a reference that is not there": (f"{GENERATE} --ref_audio anna.wav", lambda: None),
    "a transcript that is a file's name, of none": (
        f"{GENERATE} --ref_audio anna.wav --ref_text anna.txt",
        lambda: wave("anna.wav"),
    ),
    "a recording without a codec": (f"{GENERATE} --ref_audio anna.wav --audio_tokenizer none", lambda: wave("anna.wav")),
    "a kind of sound file that cannot be written": (f"{GENERATE} --out hello.xyz", lambda: None),
    "exporting a run that has not saved": ("bash launch.sh export runs/voice out", lambda: os.makedirs("runs/voice")),
    "a report of nothing": ("bash launch.sh report runs/voice", lambda: os.makedirs("runs/voice")),
}


def said(command: str, make: Callable[[], None], ask, folder: Path, monkeypatch) -> tuple[int, str]:
    """Exit status and what stderr says, with the folder's own path taken out."""
    variables, words = dict(re.findall(r"(\w+)=(\S+)", command.split("bash")[0])), shlex.split(command.split("launch.sh ")[1])
    if is_for_launch_sh(words, variables):
        done = launch_sh(words, variables | {"VENV": str(folder / "none")})
        status, error = done.returncode, done.stderr
    else:
        name, argv = program(command, ask)
        make()
        with contextlib.redirect_stderr(io.StringIO()) as stream, contextlib.redirect_stdout(io.StringIO()):
            status = main_of(name, argv, monkeypatch)
        error = stream.getvalue()
    error = error[error.index("error: ") :] if "error: " in error else error
    return status, error.replace(f"{folder}/", "").replace(str(folder), ".").replace(f"{ROOT}/", "").strip()


def is_for_launch_sh(words: list[str], variables: dict[str, str]) -> bool:
    return "NPROC" in variables or words[0] == "trian"


def record_row(cells: Sequence[str | None]) -> None:
    """Add the row to the page that is being written; else it must be on the page. None: not known here."""
    shown = [None if cell is None else "<br>".join(line.strip() for line in cell.splitlines()) for cell in cells]
    line = "| " + " | ".join((cell or "").replace("|", "\\|") for cell in shown) + " |\n"
    if new := os.environ.get("NEW_PAGE"):
        with open(new, "a") as file:
            file.write(line)
    else:
        assert (line if cells[-1] else line[: -len(" |\n")]) in PAGE.read_text()


@pytest.fixture()
def folder(tmp_path, checkpoint_dir, codec_files, monkeypatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "codec").symlink_to(codec_files)
    (tmp_path / "bosonai").symlink_to(codec_files / "bosonai")
    (tmp_path / "checkpoint").symlink_to(checkpoint_dir)
    yield tmp_path
    PATCH.undo()


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    from test_readme import asked_of_python

    return asked_of_python.__wrapped__(tmp_path_factory)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_as_the_page_says(mistake, ask, folder, monkeypatch):
    command, make = MISTAKES[mistake]
    status, error = said(command, make, ask, folder, monkeypatch)
    assert status == 2 and "Traceback" not in error
    record_row((mistake, f"`{command}`", error))


if __name__ == "__main__":
    new = PAGE.with_suffix(".new")
    new.write_text(HEAD)
    os.environ["NEW_PAGE"] = str(new)
    status = pytest.main([__file__, "-q"])
    with open(new, "a") as file:
        file.write(STOPPED)
    status = status or pytest.main([str(Path(__file__).with_name("test_stopped.py")), "-q"])
    shutil.move(new, PAGE) if status == 0 else new.unlink()
    sys.exit(status)
