"""transcribe.py and cut.py: recordings become a dataset that training reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from prepare import transcribe
from prepare.__main__ import main as prepare
from prepare.manifest import check
from prepare.forms import open_manifest

RATE = 16_000


def babble(sec: float, seed: int) -> np.ndarray:
    """Noise in syllables: any sound does for models with random weights."""
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(int(sec * RATE)) * (1 + np.sin(np.arange(int(sec * RATE)) / 800))).astype(np.float32)


@pytest.fixture()
def table(tmp_path) -> Path:
    """A recording of 20 s, and the table of its clips; the second has a text."""
    soundfile.write(tmp_path / "talk.wav", babble(20, 0), RATE)
    rows = [{"audio": "talk.wav", "start": 4.0 * i, "end": 4.0 * i + 3.5, "speaker": "anna", "text": ""} for i in range(5)]
    rows[1]["text"] = "Written by hand."
    path = tmp_path / "cuts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def talking_whisper(whisper_dir, tmp_path_factory) -> Path:
    """The tiny Whisper, kept from saying other tokens than letters."""
    folder = tmp_path_factory.mktemp("talking") / "whisper"
    shutil.copytree(whisper_dir, folder)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    vocabulary = json.loads((folder / "vocab.json").read_text())
    letters = {vocabulary[letter] for letter in "abcdefgh"}
    path.write_text(json.dumps(settings | {"suppress_tokens": [i for i in range(1765) if i not in letters]}))
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_table_gets_what_is_missing(table, judges, capsys):
    before = rows_of(table)
    command = ["transcribe", str(table), "--model", str(judges[0]), "--language", "en"]
    assert prepare(command) == 0
    rows, out = rows_of(table), capsys.readouterr().out
    print(out, rows)
    assert rows[1] == before[1] and "4 transcripts written, 1 were there" in out
