"""transcribe.py: clips get their transcripts, by a model or from a script; what to type is said where they are missing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import _context

import train
from config import to_argv
from generate.judges import Recogniser
from prepare import transcribe
from prepare.__main__ import main as prepare
from prepare.forms import open_manifest
from prepare.manifest import check

RATE = 16_000


def noise(sec: float, seed: int = 0) -> np.ndarray:
    """Any sound does for models with random weights."""
    return (0.1 * np.random.default_rng(seed).standard_normal(round(sec * RATE))).astype(np.float32)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture()
def table(tmp_path) -> Path:
    """A recording of 20 s, and the table of its five clips; the second has a text."""
    soundfile.write(tmp_path / "talk.wav", noise(20), RATE)
    rows = [{"audio": "talk.wav", "start": 4.0 * i, "end": 4.0 * i + 3.5, "speaker": "anna", "text": ""} for i in range(5)]
    rows[1]["text"] = "Written by hand."
    return write_rows(tmp_path / "cuts.jsonl", rows)


@pytest.fixture()
def folder(tmp_path) -> Path:
    """Three clips; the first has its text."""
    for name in ("a", "sub/b", "sub/c"):
        path = tmp_path / "clips" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise(1.5, ord(name[-1])), RATE)
    (tmp_path / "clips" / "a.txt").write_text("Written by hand.")
    return tmp_path / "clips"


def run(*words, status: int = 0) -> None:
    assert prepare(["transcribe", *map(str, words)]) == status


# ---- tables and folders


def test_a_table_gets_what_is_missing_and_nothing_else(table, judges, capsys):
    """Then it is a dataset; with nothing missing no model is loaded; --force replaces all."""
    before = rows_of(table)
    run(table, "--model", judges[0], "--language", "en")
    rows, out = rows_of(table), capsys.readouterr().out
    assert rows[1] == before[1] and all(row["text"] for row in rows)
    assert all(row | {"text": ""} == old | {"language": "en", "confidence": row["confidence"]}
               for row, old in list(zip(rows, before))[2:])  # fmt: skip
    assert f"4 transcripts written, 1 were there: {table}" in out and "language en 4" in out
    assert f"4 of low confidence: listen, and correct its `text` in {table}, or take the line out\n  talk.wav from " in out
    records, _ = check(open_manifest(table)[0])
    assert [record.audio[-1].offset_sec for record in records] == [0, 4, 8, 12, 16]
    run(table, "--model", "no/such/model")
    assert "0 transcripts written, 5 were there" in capsys.readouterr().out and rows_of(table) == rows
    run(table, "--model", judges[0], "--force")
    assert rows_of(table)[1]["text"] != "Written by hand." and rows_of(table)[0]["text"] == rows[0]["text"]


def test_a_folder_gets_a_text_beside_each_clip(folder, judges, capsys):
    run(folder, "--model", judges[0])
    assert (folder / "a.txt").read_text() == "Written by hand."
    assert (folder / "sub/b.txt").read_text().strip() and (folder / "sub/c.txt").read_text().strip()
    out = capsys.readouterr().out
    assert f"2 transcripts written, 1 were there: {folder}" in out and "sub/b.wav (0." in out
    assert len(check(open_manifest(folder)[0])[0]) == 3
    run(folder, "--model", judges[0], "--force")
    assert (folder / "a.txt").read_text() != "Written by hand."


def test_what_was_done_before_an_interruption_is_kept(table, judges, monkeypatch):
    """Ctrl-C at the third clip; the next run only does the other two."""
    done: list[int] = []
    put = transcribe.Table.put

    def interrupted(self, i, found):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(i)
        put(self, i, found)

    monkeypatch.setattr(transcribe.Table, "put", interrupted)
    assert prepare(["transcribe", str(table), "--model", str(judges[0]), "--batch_size", "1"]) == 130
    assert [bool(row["text"]) for row in rows_of(table)] == [True, True, True, False, False]
    monkeypatch.setattr(transcribe.Table, "put", lambda self, i, found: (done.append(i), put(self, i, found)))
    run(table, "--model", judges[0])
    assert done == [0, 2, 3, 4] and all(row["text"] for row in rows_of(table))


def killed(table: Path, model: Path) -> None:
    """Run by another process."""
    put, count = transcribe.Table.put, 0

    def kill(self, i, found):
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, i, found)

    transcribe.Table.put, transcribe.SAVE_SEC = kill, 0.0
    run(table, "--model", model, "--batch_size", 1)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(table, judges, capsys):
    process = _context.Process(target=killed, args=(table, judges[0]))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [bool(row["text"]) for row in rows_of(table)] == [True, True, True, False, False]
    run(table, "--model", judges[0])
    assert "2 transcripts written, 3 were there" in capsys.readouterr().out


def test_clips_that_cannot_be_read_do_not_stop_the_others(folder, judges, capsys):
    (folder / "sub/b.wav").write_bytes(b"RIFF and no more")
    run(folder, "--model", judges[0], status=2)
    shown = capsys.readouterr()
    assert "1 transcripts written" in shown.out and "error: 1 clips could not be read:\n  sub/b.wav" in shown.err
    assert (folder / "sub/c.txt").is_file()


# ---- models


def test_whisper(table, talking_whisper, whisper_dir, capsys):
    """Batches give what single clips give; the language is the one given, or what Whisper guesses; confidence is measured."""
    run(table, "--model", talking_whisper, "--batch_size", 3)
    rows = rows_of(table)
    assert {len(row["text"]) for row in rows if "language" in row} != {0} and {"en", "zh"} >= {
        row.get("language", "en") for row in rows
    }
    model = Recogniser(str(talking_whisper), torch.device("cpu"), "")
    clips = [noise(sec, seed) for seed, sec in enumerate((2.0, 5.5, 1.0))]
    together, alone = model(clips), [model([clip])[0] for clip in clips]
    assert [found.text for found in together] == [found.text for found in alone]
    assert [found.confidence for found in together] == pytest.approx([found.confidence for found in alone], rel=1e-4)
    run(table, "--model", talking_whisper, "--language", "zh", "--force")
    assert {row["language"] for row in rows_of(table)} == {"zh"}
    run(table, "--model", talking_whisper, "--language", "xx", "--force", status=2)
    assert "--language xx: expected one of en, zh" in capsys.readouterr().err


def test_confidence_of_whisper_is_the_mean_probability_of_its_tokens(talking_whisper):
    """By the scores of `generate`, before tokens were suppressed."""
    recogniser = Recogniser(str(talking_whisper), torch.device("cpu"), "en")
    clip = noise(3.0)
    features = recogniser.extractor(clip, sampling_rate=RATE, return_tensors="pt")["input_features"]
    asked = {"language": "en", "task": "transcribe", "return_dict_in_generate": True, "output_logits": True}
    with torch.inference_mode():
        made = recogniser.model.generate(features, **asked)
    tokens = made.sequences[0, -len(made.logits) :]
    chances = [logits[0].softmax(-1)[token].item() for logits, token in zip(made.logits, tokens)]
    chances = [chance for chance, token in zip(chances, tokens.tolist()) if token < 256]
    (found,) = recogniser([clip])
    assert found.confidence == pytest.approx(float(np.exp(np.mean(np.log(chances)))), rel=1e-3) and found.text


def test_clips_without_a_word_leave_the_table(table, judges, tmp_path, capsys):
    """A CTC model that finds nothing but blanks in silence: its head is made so."""
    from transformers import Wav2Vec2ForCTC

    silent = tmp_path / "silent"
    shutil.copytree(judges[0], silent)
    model = Wav2Vec2ForCTC.from_pretrained(silent)
    model.lm_head.bias.data[0] = 1e4
    model.save_pretrained(silent)
    rows = rows_of(table)
    run(table, "--model", silent)
    assert [row["text"] for row in rows_of(table)] == ["Written by hand."]
    beside = table.with_name("cuts.left_out.jsonl")
    assert [row["start"] for row in rows_of(beside)] == [0, 8, 12, 16]
    assert f"left out 4 clips without a word, 0 not in the script -> {beside}" in capsys.readouterr().out
    write_rows(table, [rows[0]])
    run(table, "--model", silent, status=2)
    assert f"{table}: no clip has a word; it is left as it is" in capsys.readouterr().err
    assert rows_of(table) == [rows[0]] and len(rows_of(beside)) == 4


# ---- scripts


def test_a_script_gives_its_own_words(table, judges, tmp_path, capsys):
    """With a model of random weights for the clip without a text; the other four have what a recogniser would find."""
    rows = [row | {"confidence": 0.3} for row in rows_of(table)]
    spoken = [
        "the quick brown focks jumps over the lazy dog",
        "and in nineteen eighty four it rested",
        "",
        "no body came to the house",
    ]
    for row, text in zip(rows, [*spoken, "no body came to the house"]):
        row["text"] = text
    write_rows(table, rows)
    script = tmp_path / "script.txt"
    script.write_text(
        "Chapter 1\n\n“The quick, brown fox jumps\nover the lazy dog – and in 1984 it rested.” Nobody came to the house!\n"
    )
    run(table, "--model", judges[0], "--text", script)
    rows, out = rows_of(table), capsys.readouterr().out
    assert [row["text"] for row in rows] == [
        "“The quick, brown fox jumps over the lazy dog –",
        "and in 1984 it rested.”",
        "Nobody came to the house!",
        "Nobody came to the house!",
    ]
    assert rows[0]["recognised"] == spoken[0] and rows[0]["start"] == 0 and rows[2]["start"] == 12
    beside = table.with_name("cuts.left_out.jsonl")
    assert [row["start"] for row in rows_of(beside)] == [8.0] and rows_of(beside)[0]["text"]
    assert f"left out 0 clips without a word, 1 not in the script -> {beside}" in out
    assert f"2 of 21 words of {script} are in no clip" in out and "low confidence" not in out
    script.write_text(script.read_text().replace("brown", "red"))  # corrected, and aligned once more
    run(table, "--text", script)
    assert rows_of(table)[0]["text"] == "“The quick, red fox jumps over the lazy dog –"
    assert [row | {"text": ""} for row in rows_of(table)] == [row | {"text": ""} for row in rows]


def test_a_script_of_something_else_changes_nothing(table, judges, tmp_path, capsys):
    run(table, "--model", judges[0])
    before = table.read_bytes()
    script = tmp_path / "script.txt"
    for text, message in {
        "Four score and seven years ago our fathers brought forth": f"{table}: no clip fits {script}; it is left as it is",
        " ... \n": f"--text {script}: there is no word in it",
    }.items():
        script.write_text(text)
        run(table, "--text", script, status=2)
        assert message in capsys.readouterr().err and table.read_bytes() == before


# ---- mistakes


def test_mistakes(table, folder, judges, tmp_path, capsys):
    soundfile.write(tmp_path / "long.wav", noise(31), RATE)
    (tmp_path / "long").mkdir()
    shutil.copy(tmp_path / "long.wav", tmp_path / "long" / "long.wav")
    (tmp_path / "none").mkdir()
    long = write_rows(tmp_path / "long.jsonl", [{"audio": "long.wav", "text": ""}])
    chat = write_rows(tmp_path / "chat.jsonl", [{"messages": []}])
    gone = write_rows(tmp_path / "gone.jsonl", [{"audio": "gone.wav", "start": 0, "end": 1, "text": ""}])
    named = write_rows(tmp_path / "named.jsonl", [{"said": "x"}])
    (tmp_path / "t.csv").write_text("audio,text\ntalk.wav,\n")
    (tmp_path / "listed").mkdir()
    for name in "ab":
        shutil.copy(folder / "a.wav", tmp_path / "listed" / f"{name}.wav")
    (tmp_path / "listed" / "metadata.csv").write_text("a|Hello there.\nb|How are you?\n")
    cut = "1 clips are longer than 30 s; cut them first: bash launch.sh prepare cut"
    for words, message in {
        (tmp_path / "nothing",): "nothing: expected a folder of clips, or a .jsonl",
        (tmp_path / "nothing.jsonl",): "nothing.jsonl: no such file or folder",
        (tmp_path / "t.csv",): "t.csv: expected a folder of clips, or a .jsonl with a row for each",
        (tmp_path / "none",): "none: no recording in this folder",
        (tmp_path / "listed",): "listed: a dataset that has its transcripts already (LJSpeech)",
        (tmp_path / "long",): f"{cut} {tmp_path / 'long'} --out cuts.jsonl",
        (long,): f"{cut} RECORDING --out cuts.jsonl",
        (chat,): "chat.jsonl record 0 (line 1): expected a row with audio and text",
        (named,): "named.jsonl record 0 (line 1): no audio; expected a column of audio",
        (gone,): "error: 1 clips could not be read:",
        (table, "--model", tmp_path / "nothing"): f"--model {tmp_path / 'nothing'}: cannot be loaded: ",
        (table, "--model", judges[1]): f"--model {judges[1]}: expected Whisper, or a model with a CTC head and its tokenizer",
        (table, "--batch_size", 0): "--batch_size: expected 1 or more",
        (folder, "--text", table): f"--text needs a table: bash launch.sh prepare cut {folder} --out cuts.jsonl",
        (table, "--text", tmp_path / "nothing"): "nothing: cannot be read",
    }.items():
        before = table.read_bytes()
        run(*words, *([] if "--model" in words else ["--model", judges[0]]), status=2)
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error and table.read_bytes() == before, (words, error)


# ---- what says that transcripts are missing


def test_missing_transcripts_say_what_to_type(folder, table, tmp_path, toys, capsys):
    """The same words from check, pair, convert and training."""
    (folder / "a.txt").unlink()
    remedy = f"error: {folder}: 3 .wav found, no transcripts: bash launch.sh prepare transcribe {folder}\n"
    assert prepare(["check", str(folder)]) == 2 and remedy in capsys.readouterr().err
    assert prepare(["pair", str(folder), str(tmp_path / "paired")]) == 2 and remedy in capsys.readouterr().err
    assert prepare(["convert", str(folder), str(tmp_path / "out.jsonl")]) == 2 and remedy in capsys.readouterr().err
    flags = {"train_manifest": folder, "base_ckpt": toys / "checkpoint", "output_dir": tmp_path / "o", "device": "cpu"}
    assert train.main(to_argv(flags)) == 2 and remedy in capsys.readouterr().err
    (folder / "a.txt").write_text("Hello.")
    for name, text in {
        "some": "3 .wav found, 2 without a transcript: bash launch.sh prepare transcribe",
        "most": "no c.txt beside it; bash launch.sh prepare transcribe",
    }.items():
        assert prepare(["check", str(folder)]) == (2 if name == "some" else 1)
        shown = capsys.readouterr()
        assert text in shown.err + shown.out
        (folder / "sub/b.txt").write_text("Hello there.")
    for name in ("one", "two"):
        (tmp_path / "long").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "long" / f"{name}.flac", np.zeros(61 * RATE), RATE)
    assert prepare(["check", str(tmp_path / "long")]) == 2
    long = (
        f"2 .flac found, no transcripts; cut long recordings: bash launch.sh prepare cut {tmp_path / 'long'} --out cuts.jsonl"
    )
    assert long in capsys.readouterr().err
    recording = tmp_path / "long" / "one.flac"
    assert prepare(["check", str(recording)]) == 2
    assert f"text too, or bash launch.sh prepare cut {recording} --out cuts.jsonl" in capsys.readouterr().err
    rows = rows_of(table)
    assert prepare(["pair", str(table), str(tmp_path / "paired")]) == 2
    assert "no text; write it (a .jsonl: bash launch.sh prepare transcribe FILE), or leave it out" in capsys.readouterr().err
    write_rows(table, [row | {"text": ""} for row in rows])
    assert prepare(["pair", str(table), str(tmp_path / "paired")]) == 2
    assert f"{table}: 5 clips, no transcripts: bash launch.sh prepare transcribe {table}" in capsys.readouterr().err
