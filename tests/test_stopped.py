"""Ctrl-C and a full disk in every stage from a recording to a voice: what is said, and that the same command then does it.

Each stage reads what the one before has made, so run the file as a whole. `python tests/test_mistakes.py` writes the page anew.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ROOT
from test_cut import talk
from test_mistakes import PAGE, ask, record_row  # noqa: F401
from test_readme import main_of, program

SMALL = "--audio_tokenizer codec --device cpu"
SPEAK = f"{SMALL} --max_new_tokens 20 --force_audio"
STAGES = {  # command -> the function after whose first call Ctrl-C is typed
    "prepare cut talk.wav --out made/cuts.jsonl": "prepare.cut:cut",
    "prepare transcribe made/cuts.jsonl --model whisper": "prepare.transcribe:Table.put",
    "prepare check made/cuts.jsonl --report made/check.html": "prepare.check:find_faults",
    "prepare pair made/cuts.jsonl made/paired --val_share 0.3": "prepare.pair:phrased",
    f"prepare encode made/paired/train.jsonl made/paired/val.jsonl --out made/codes {SMALL} --num_workers 1": (
        "prepare.encode:measure"
    ),
    f"--train_manifest made/paired/train.jsonl --val_manifest made/paired/val.jsonl --codes_dir made/codes {SMALL} "
    "--output_dir made/run --base_ckpt checkpoint --num_workers 0 --batch_size 2 --max_steps 3 --sample_steps 0 --resume auto": "train:train_step",
    "report made/run": "tools.report:charts",
    "export made/run made/model": "export.write:_write_weights",
    f"generate --ckpt made/model --text Hello. --out made/hello.wav {SPEAK}": "generate.engine:Engine._add",
    f"evaluate --ckpt made/model --lines made/paired/val.jsonl --out made/evaluation --asr_model none --sv_model none {SPEAK}": (
        "generate.evaluate:Judges.take"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, loud_dir, codec_files, talking_whisper) -> Iterator[Path]:
    """A recording and what stands for the published models; made/, which stages fill; full/, a disk of its own if that may be."""
    folder = tmp_path_factory.mktemp("stopped")
    soundfile.write(folder / "talk.wav", talk(-0.5, *(3, -2) * 5), 24000)
    models = {"codec": codec_files, "bosonai": codec_files / "bosonai", "checkpoint": loud_dir, "whisper": talking_whisper}
    for name, target in models.items():
        (folder / name).symlink_to(target)
    for name in ("made", "full"):
        (folder / name).mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", folder / "full"]
    is_disk = bool(shutil.which("mount")) and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield folder
    if is_disk:
        subprocess.run(["umount", folder / "full"], check=True)


@pytest.mark.parametrize("words", STAGES)
def test_a_stage_that_is_stopped(words, ask, folder, monkeypatch):  # noqa: F811
    monkeypatch.chdir(folder)
    name, argv = program(f"bash launch.sh {words}", ask)

    def run(argv: list[str]) -> tuple[int, str]:
        with contextlib.redirect_stderr(io.StringIO()) as stream, contextlib.redirect_stdout(io.StringIO()):
            status = main_of(name, argv, monkeypatch)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return status, stream.getvalue().replace(f"{folder}/", "")

    told = {}
    if os.path.ismount("full"):
        with full_disk(Path("made"), Path("full")):
            status, error = run([word.replace("made/", "full/") for word in argv])
        told["full"] = re.sub("[0-9a-f]{16}", "...", error[error.index("error: ") :].strip().replace("full/", "made/"))
        assert status == 2 and "no space left" in error.lower() and "Traceback" not in error
    with monkeypatch.context() as patch:
        ctrl_c_after(STAGES[words], patch)
        status, error = run(argv)
    told["stopped"] = next(line for line in error.splitlines() if "Ctrl-C" in line or "SIGINT" in line)
    assert status == (0 if name == "train" else 130) and "Traceback" not in error
    status, error = run(argv)
    if status == 2 and "--force" in error:  # what is done is kept until it is said that it may go
        status, error = run([*argv, "--force"])
    assert status == 0, error
    if "transcribe" in words:  # the tiny model always says the same
        rows = [json.loads(line) for line in Path("made/cuts.jsonl").read_text().splitlines()]
        Path("made/cuts.jsonl").write_text("".join(json.dumps(row | {"text": f"Line {i}."}) + "\n" for i, row in enumerate(rows)))
    record_row((f"`bash launch.sh {words}`", told["stopped"], told.get("full")))


@contextlib.contextmanager
def full_disk(like: Path, disk: Path) -> Iterator[None]:
    """What `like` holds on a disk that has no more room; empty afterwards."""
    shutil.copytree(like, disk, dirs_exist_ok=True)
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def ctrl_c_after(name: str, patch: pytest.MonkeyPatch) -> None:
    """SIGINT after the first call of module:function, or of module:Class.function."""
    module, path = name.split(":")
    *names, last = path.split(".")
    owner = functools.reduce(getattr, names, importlib.import_module(module))
    function: Callable = getattr(owner, last)

    def called(*args, **kwargs):
        result = function(*args, **kwargs)
        patch.undo()
        signal.raise_signal(signal.SIGINT)
        return result

    patch.setattr(owner, last, called)


def test_ctrl_c_while_python_imports(tmp_path):
    """Ends what launch.sh started without a word, as it ends any other program."""
    (tmp_path / "slow.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    command = [sys.executable, str(ROOT / "process" / "start.py"), str(tmp_path / "slow.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "" and process.returncode == -signal.SIGINT
