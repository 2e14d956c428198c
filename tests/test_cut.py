"""cut.py: long recordings become a table of clips, cut at pauses."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import wave
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from scipy.signal import lfilter

from prepare.__main__ import main as prepare
from prepare.cut import LONG_PAUSE_SEC, NO_PAUSE, TOO_SHORT, cut
from prepare.forms import open_manifest
from prepare.manifest import check
from prepare.speech import Recording

pytest.importorskip("silero_vad", reason="needs requirements-voice.txt")
RATE = 16_000
VOWELS = ((750, 1250, 2500), (480, 1950, 2600), (290, 2350, 3000), (450, 850, 2400), (320, 680, 2300))


def syllables(sec: float, seed: int = 0) -> np.ndarray:
    """What silero-vad takes for speech: pulses of a changing pitch through the formants of vowels, and noise between them."""
    rng, pieces = np.random.default_rng(seed), []
    while sum(map(len, pieces)) < sec * RATE:
        count = int(RATE * rng.uniform(0.12, 0.25))
        pitch = np.linspace(*(120 * rng.uniform(0.85, 1.2, 2)), count)
        sound = np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0) + 0.01 * rng.standard_normal(count)
        for formant, width in zip(VOWELS[rng.integers(len(VOWELS))], (80, 100, 140)):
            r = np.exp(-np.pi * width / RATE)
            sound = lfilter([1 - r], [1, -2 * r * np.cos(2 * np.pi * formant / RATE), r * r], sound)
        fricative = int(RATE * rng.uniform(0.03, 0.08))
        pieces += [0.5 * sound / np.abs(sound).max() * np.hanning(count) ** 0.3]
        pieces += [0.05 * rng.standard_normal(fricative) * np.hanning(fricative)]
    return np.concatenate(pieces)[: int(sec * RATE)].astype(np.float32)


def talk(*parts: float, seed: int = 0) -> np.ndarray:
    """Speech of so many seconds; negative numbers are pauses."""
    rng = np.random.default_rng(seed)
    hiss = [0.0005 * rng.standard_normal(int(-sec * RATE)) for sec in parts if sec < 0]
    return np.concatenate([hiss.pop(0) if sec < 0 else syllables(sec, seed + i) for i, sec in enumerate(parts)])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    """Sentences of 4, 5, 6 and 2 s with pauses of 0.4, 1.5 and 0.4 s, then 3 s of silence, a word, and silence."""
    path = tmp_path_factory.mktemp("recording") / "talk.wav"
    soundfile.write(path, talk(-0.5, 4, -0.4, 5, -1.5, 6, -0.4, 2, -3, 0.8, -1), RATE)
    return path


# ---- the choice of cuts


def pieces_of(*parts: float, min_sec: float = 3, max_sec: float = 15) -> list[tuple[float, float, str]]:
    at, speech = 0.0, []
    for sec in parts:
        speech += [(at, at + sec)] if sec > 0 else []
        at += abs(sec)
    found = cut(Recording(Path("x"), Path("x"), speech, np.zeros(math.ceil(at / 0.032))), min_sec, max_sec)
    return [(round(piece.start, 1), round(piece.end, 1), piece.dropped) for piece in found]


def test_cuts_are_at_the_longest_pauses():
    assert pieces_of(4, -0.3, 5, -0.6, 4, -0.3, 4) == [(0, 9.5, ""), (9.7, 18.2, "")]
    assert pieces_of(4, -0.3, 5) == [(0, 9.3, "")], "what is short enough is not cut"
    assert pieces_of(4, -1.2, 5) == [(0, 4.2, ""), (5.0, 10.2, "")], "but at a long pause"


def test_short_sentences_are_joined_or_dropped():
    assert pieces_of(5, -0.5, 1, -0.5, 5) == [(0, 12, "")]
    assert pieces_of(5, -4, 1, -4, 5) == [(0, 5.2, ""), (8.8, 10.2, TOO_SHORT), (13.8, 19, "")]
    assert pieces_of(1.5, -1.2, 2) == [(0, 4.7, "")], "a pause of 1.2 s is better kept than both sentences lost"


def test_speech_without_a_pause_is_dropped_and_nothing_else():
    assert pieces_of(5, -1, 20, -1, 5) == [(0, 5.2, ""), (5.8, 26.2, NO_PAUSE), (26.8, 32, "")]
    assert pieces_of(20) == [(0, 20, NO_PAUSE)] and pieces_of(-20) == []


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cuts_are_better(seed):
    """Against all ways to divide eight stretches; every clip fits the limits, and no two overlap."""
    rng = np.random.default_rng(seed)
    spoken, pauses = rng.uniform(0.3, 9, 8).round(2), rng.uniform(0.16, 2.5, 8).round(2)
    speech, at = [], 0.0
    for sec, pause in zip(spoken, pauses):
        speech.append((at, at + sec))
        at += sec + pause
    found = cut(Recording(Path("x"), Path("x"), speech, np.zeros(int(at / 0.032))), 3, 12)

    def cost(firsts: list[int]) -> float:
        total = sum(max(0.0, LONG_PAUSE_SEC - pauses[first - 1]) for first in firsts[1:])
        for a, b in pairwise([*firsts, 8]):
            start = speech[a][0] - (min(0.2, pauses[a - 1] / 2) if a else 0)
            sec = speech[b - 1][1] + min(0.2, pauses[b - 1] / 2) - start
            if sec > 12 and b - a > 1:
                return np.inf
            is_kept = 3 <= sec <= 12
            total += sum(max(0.0, p - LONG_PAUSE_SEC) for p in pauses[a : b - 1]) if is_kept else sum(spoken[a:b])
        return total

    ways = [[0, *(i for i in range(1, 8) if mask >> i & 1)] for mask in range(0, 256, 2)]
    assert cost([piece.first for piece in found]) == pytest.approx(min(map(cost, ways)))
    assert all(3 <= piece.sec <= 12 for piece in found if not piece.dropped)
    assert all(one.end <= other.start for one, other in pairwise(found))


# ---- the command


def test_a_recording_becomes_a_table(recording, tmp_path, capsys):
    """Read again as a dataset once it has texts; before it, the message says how to get them."""
    out = tmp_path / "cuts.jsonl"
    assert prepare(["cut", str(recording), "--out", str(out), "--speaker", "anna"]) == 0
    rows, shown = rows_of(out), capsys.readouterr().out
    assert [(round(row["start"]), round(row["end"])) for row in rows] == [(0, 10), (11, 20)]
    assert {(row["audio"], row["speaker"], row["text"]) for row in rows} == {(str(recording), "anna", "")}
    for row, (start, end) in zip(rows, ((0.5, 9.9), (11.4, 19.8))):  # with about 0.2 s around the speech
        assert row["start"] == pytest.approx(start - 0.2, abs=0.15) and row["end"] == pytest.approx(end + 0.2, abs=0.15)
    assert "2 clips, 0.3 of 0.4 minutes" in shown and "1 x shorter than --min_sec 3" in shown
    assert "dB" in shown and f"next: bash launch.sh prepare transcribe {out} --language en" in shown
    assert prepare(["check", str(out)]) == 2
    assert f"2 clips, no transcripts: bash launch.sh prepare transcribe {out}" in capsys.readouterr().err
    out.write_text("".join(json.dumps(row | {"text": "Hello there."}) + "\n" for row in rows))
    records, _ = check(open_manifest(out)[0])
    assert [record.audio[-1].duration_sec for record in records] == [pytest.approx(row["end"] - row["start"]) for row in rows]
    assert prepare(["cut", str(recording), "--out", str(out)]) == 2, "it has transcripts now"
    assert "it exists; choose another name, or replace it with --force" in capsys.readouterr().err
    assert rows_of(out)[0]["text"] == "Hello there."


def test_a_folder_other_rates_channels_and_formats(tmp_path, capsys):
    """Stereo at 44.1 kHz, FLAC in a subfolder, and m4a, which is decoded into a file beside the table."""
    speech = talk(-0.3, 4, -0.3)
    folder = tmp_path / "all"
    (folder / "more").mkdir(parents=True)
    stretched = np.interp(np.arange(len(speech) * 44100 // RATE) * RATE / 44100, np.arange(len(speech)), speech)
    soundfile.write(folder / "a.wav", np.stack([stretched, 0.2 * stretched], 1), 44100)
    soundfile.write(folder / "more" / "b.flac", speech, RATE)
    (folder / "notes.txt").write_text("not a recording")
    wanted = ["a.wav", "more/b.flac"]
    if shutil.which("ffmpeg"):
        command = ["ffmpeg", "-v", "error", "-i", str(folder / "more" / "b.flac"), str(folder / "c.m4a")]
        subprocess.run(command, check=True)
        wanted = ["a.wav", "cuts_audio/1_c.flac", "more/b.flac"]
    assert prepare(["cut", str(folder), str(folder / "a.wav"), "--out", str(folder / "cuts.jsonl")]) == 0
    rows = rows_of(folder / "cuts.jsonl")
    assert [row["audio"] for row in rows] == wanted and "speaker" not in rows[0]
    for row in rows:
        assert row["start"] == pytest.approx(0.1, abs=0.1) and row["end"] == pytest.approx(4.5, abs=0.15)
        assert soundfile.info(folder / row["audio"]).duration == pytest.approx(4.6, abs=0.1)
    assert not list(folder.glob(".*"))
    before = (folder / "cuts.jsonl").read_bytes()
    assert prepare(["cut", str(folder), "--out", str(folder / "cuts.jsonl"), "--force"]) == 0
    assert (folder / "cuts.jsonl").read_bytes() == before, "what was decoded is no recording of its own"


def test_levels_that_are_far_apart(tmp_path, capsys):
    for name, gain in (("near", 0.5), ("far", 0.05)):
        soundfile.write(tmp_path / f"{name}.wav", gain * talk(-0.3, 4, -0.3), RATE)
    assert prepare(["cut", str(tmp_path), "--out", str(tmp_path / "cuts.jsonl")]) == 0
    shown = capsys.readouterr().out
    far, near = tmp_path / "far.wav", tmp_path / "near.wav"
    assert f"{far} is 20 dB quieter than {near}" in shown and f"ffmpeg -i {far} -af volume=20dB OUT.wav" in shown


def test_mistakes(recording, tmp_path, capsys, monkeypatch):
    """One error each, status 2, and no output."""
    time = np.arange(8 * RATE) / RATE
    music = sum(0.1 * np.sin(2 * np.pi * hertz * time) * np.exp(-3 * (time % 0.5)) for hertz in (220, 277, 330, 440))
    for name, samples in {
        "music": music,
        "silent": np.zeros(8 * RATE),
        "short": talk(-1, 1, -1),
        "nothing": np.zeros(0),
    }.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, RATE)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "broken.wav").write_bytes(b"RIFF and no more")
    (tmp_path / "talk.m4a").write_bytes(b"\0" * 100)
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "folder").mkdir()
    soundfile.write(tmp_path / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    with wave.open(str(tmp_path / "long.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((30_000 * talk(16.0)).astype(np.int16).tobytes())
    out = tmp_path / "cuts.jsonl"
    for name, message in {
        "music.wav": "no speech in 0.1 minutes:\n  {}: sound, but no speech: music or noise",
        "silent.wav": "no speech in 0.1 minutes:\n  {}: silence",
        "short.wav": "no clip of 3 to 15 s; give other limits:\n  dropped  1 x shorter than --min_sec 3",
        "long.wav": "no clip of 3 to 15 s; give other limits:\n  dropped  1 x no pause to cut at within --max_sec 15",
        "nothing.wav": "{}: there is no audio in it",
        "empty.wav": "{} is not readable audio: a regular file of 1 to",
        "broken.wav": "{} is not readable audio: ",
        "nan.wav": "{} holds samples that are no finite numbers",
        "text.txt": "{}: expected a recording (.wav, .flac",
        "folder": "{}: no recording in this folder",
        "gone.wav": "{}: no such file or folder",
    }.items():
        assert prepare(["cut", str(tmp_path / name), "--out", str(out)]) == 2, name
        error = capsys.readouterr().err
        assert "error: " + message.format(tmp_path / name) in error and "Traceback" not in error, name
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "silero_vad", None)
        assert prepare(["cut", str(recording), "--out", str(out)]) == 2
    assert "missing (import of silero_vad halted" in (error := capsys.readouterr().err) and "requirements-voice.txt" in error
    monkeypatch.setenv("PATH", str(tmp_path))
    assert prepare(["cut", str(tmp_path / "talk.m4a"), "--out", str(out)]) == 2
    assert ".m4a needs ffmpeg, which is not installed" in capsys.readouterr().err
    for flags, message in {"--max_sec 40": "expected 0.5 <= min_sec < max_sec <= 30", "--out x.csv": "ends in .jsonl"}.items():
        assert prepare(["cut", str(recording), "--out", str(out), *flags.split()]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".cuts*")) and not (tmp_path / "cuts_audio").exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="needs espeak-ng")
def test_sentences_of_espeak_are_not_cut_inside(tmp_path):
    """By the real command: each of ten sentences is in one clip as a whole, and only the pauses between them are left out."""
    sentences = [f"This is sentence number {i}, and it goes on for about as long as people speak." for i in range(10)]
    at, parts, spans = 0.0, [], []
    for i, sentence in enumerate(sentences):
        path = tmp_path / f"{i}.wav"
        subprocess.run(["espeak-ng", "-w", str(path), sentence], check=True)
        samples, rate = soundfile.read(path)
        loud = np.flatnonzero(np.abs(samples) > 0.01)
        samples = samples[loud[0] : loud[-1]]
        parts += [samples, np.zeros(rate // 2)]
        spans.append((at, at + len(samples) / rate))
        at += len(samples) / rate + 0.5
        path.unlink()
    soundfile.write(tmp_path / "talk.wav", np.concatenate(parts), rate)
    command = [sys.executable, ROOT / "prepare" / "__main__.py", "cut", "talk.wav", "--out", "cuts.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "cuts.jsonl")
    for start, end in spans:
        assert sum(row["start"] <= start + 0.1 and end - 0.1 <= row["end"] for row in rows) == 1, (start, end, rows)
    assert rows[0]["audio"] == "talk.wav" and all(3 <= row["end"] - row["start"] <= 15 for row in rows)
