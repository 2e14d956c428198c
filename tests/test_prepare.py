"""python -m tools.prepare: check, pair and show, on real files. (convert: test_forms.py; encode: test_audio.py)"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import write_manifest
from safetensors.numpy import save_file

from forms import scene_with_voices
from tools.prepare.__main__ import main as prepare


def line(text: str, audio: str, **extra) -> dict:
    clip = {"type": "audio", "audio_url": audio}
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": clip}], **extra}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


# ---- check

RNG = np.random.default_rng(0)


def tone(path: Path, sec: float = 1.0, rate: int = 16000, gain: float = 0.3, **kwargs) -> None:
    soundfile.write(path, gain * np.sin(np.arange(int(sec * rate)) / 20), rate, **kwargs)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """A folder with one good record of each kind and every kind of broken one: manifest.jsonl, and `faults.json`, which says
    for each broken record what its message has to contain."""
    folder = tmp_path_factory.mktemp("broken")
    for name, kwargs in {
        "good.wav": {},
        "stereo.flac": {"rate": 44100},
        "eight.ogg": {"rate": 8000},
        "loud.wav": {"gain": 1.5},
        "short.wav": {"sec": 0.01},
    }.items():
        tone(folder / name, **kwargs)
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(folder / "empty.wav", np.zeros(0), 16000)
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    (folder / "text.wav").write_text("this is no audio")
    (folder / "zero.wav").write_bytes(b"")
    (folder / "cut.wav").write_bytes((folder / "good.wav").read_bytes()[:9000])
    (folder / "folder.wav").mkdir()
    codes = RNG.integers(0, 64, (8, 50)).astype(np.int16)
    np.save(folder / "good.npy", codes)
    np.save(folder / "float.npy", codes.astype(np.float32))
    np.save(folder / "seven.npy", codes[:7])
    np.save(folder / "flat.npy", codes.ravel())
    np.save(folder / "none.npy", codes[:, :0])
    np.save(folder / "high.npy", codes + 64)
    np.save(folder / "low.npy", codes - 64)
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    save_file({"a": codes, "b": codes}, folder / "two.safetensors")
    (folder / "cut.npy").write_bytes((folder / "good.npy").read_bytes()[:200])
    (folder / "bad.safetensors").write_bytes(b"\x00" * 20)
    raw = io.BytesIO()
    soundfile.write(raw, np.full(8000, 0.1), 16000, format="WAV")
    encoded = base64.b64encode(raw.getvalue()).decode()

    good = [line("one", "good.wav"), line("two", "stereo.flac"), line("three", "eight.ogg"), line("four", "good.npy")]
    good += [line("five", str(folder / "good.wav")), line("silence", "silent.wav"), line("loud", "loud.wav")]
    raw_part = {"type": "audio", "audio_url": "", "raw_audio": encoded}
    good += [
        {
            "messages": [{"role": "user", "content": "six"}, {"role": "assistant", "content": raw_part}],
            "start_index": float("nan"),
        }
    ]
    part = line("x", "good.wav")["messages"][1]["content"]
    faults = [
        (line("x", "text.wav"), "text.wav is not readable audio"),
        (line("x", "zero.wav"), "zero.wav is not readable audio"),
        (line("x", "cut.wav"), "cut.wav is not readable audio: it is cut off: 9000 of 32044 bytes are there"),
        (line("x", "empty.wav"), "less than one frame"),
        (line("x", "short.wav"), "less than one frame"),
        (line("x", "nan.wav"), "no finite numbers"),
        (line("x", "folder.wav"), "does not exist"),
        (line("x", "missing.wav"), "does not exist; paths are relative"),
        (line("x", "../good.wav"), "leaves the manifest's folder"),
        (line("x", "/none/at/all.wav"), "does not exist"),
        (line("x", "a\0b.wav"), "does not exist"),
        (line("x", ""), "expected a path"),
        (line("x", None), "expected a path, found null"),
        (line("x", ["good.wav"]), "expected a path"),
        (line("x", "float.npy"), "float32"),
        (line("x", "seven.npy"), "[7, 50]"),
        (line("x", "flat.npy"), "[400]"),
        (line("x", "none.npy"), "[8, 0]"),
        (line("x", "high.npy"), "expected an integer array [8 codebooks, frames] of codes 0 to 63"),
        (line("x", "low.npy"), "codes -64"),
        (line("x", "objects.npy"), "cannot be read as codes"),
        (line("x", "cut.npy"), "cannot be read as codes"),
        (line("x", "bad.safetensors"), "cannot be read as codes"),
        (line("x", "two.safetensors"), "holds 2 tensors, expected one"),
        (line(None, "good.wav"), "expected text"),
        (line("x", "good.wav", start_index=2), "leaves no turn to train"),
        (line("x", "good.wav", start_index="0"), "expected a whole number"),
        (line("x", "good.wav", speaker=["a"]), "speaker: expected text"),
        ({"messages": float("nan")}, "expected a non-empty list of turns"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": part | {"duration": 0}}]},
            "0 seconds",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": part | {"offset": "1"}}]},
            "expected seconds",
        ),
        ({"messages": [{"role": "assistant", "content": part | {"offset": 9.0}}]}, "less than one frame"),
        ({"messages": [{"role": "assistant", "content": part | {"raw_audio": "%%"}}]}, "not base64"),
        ({"messages": [{"role": "assistant", "content": {"type": "video", "video_url": "x"}}]}, "expected text"),
        (["not", "an object"], "expected an object with `messages`"),
    ]
    write_manifest(
        folder / "manifest.jsonl",
        [item for pair in zip(good, [f for f, _ in faults]) for item in pair] + [f for f, _ in faults[len(good) :]],
    )
    (folder / "faults.json").write_text(json.dumps([message for _, message in faults]))
    return folder


def test_every_fault_is_named_and_the_good_records_survive(broken, checkpoint_dir, tmp_path, capsys):
    report = tmp_path / "report.json"
    command = [
        "check",
        str(broken / "manifest.jsonl"),
        "--base_ckpt",
        str(checkpoint_dir),
        "--report",
        str(report),
        "--num_workers",
        "2",
    ]
    assert prepare(command) == 1
    messages = json.loads((broken / "faults.json").read_text())
    found = json.loads(report.read_text())
    assert not found["trainable"]
    problems = [problem for items in found["problems"].values() for problem in items]
    assert len(problems) == len(messages) >= 30
    for message in messages:
        hits = [problem for problem in problems if message in problem]
        assert hits and all("manifest.jsonl record" in hit for hit in hits), message
    assert found["figures"]["records"].startswith("25 of 43"), "8 good ones, and those of which only the audio is bad"
    assert found["figures"]["clips by sample rate"] == "16,000 Hz: 4, 44,100 Hz: 1, 8,000 Hz: 1, codes: 1"
    assert "silent.wav" in found["notices"]["mostly silent"][0] and "loud.wav" in found["notices"]["clipped"][0]
    out = capsys.readouterr().out
    assert "training on this would fail" in out and "! unreadable audio" in out


def test_missing_audio_is_skipped_only_when_asked(tmp_path, capsys):
    tone(tmp_path / "a.wav")
    manifest = str(write_manifest(tmp_path / "m.jsonl", [line("here", "a.wav"), line("gone", "b.wav")]))
    assert prepare(["check", manifest]) == 1
    capsys.readouterr()
    assert prepare(["check", manifest, "--missing_audio", "skip"]) == 0
    out = capsys.readouterr().out
    assert "left out, their audio is missing: 1" in out and "record 1 (line 2)" in out and "training on this works" in out


def test_figures_and_reports(tmp_path, checkpoint_dir, capsys):
    """Hours, speakers, duplicates, outliers, steps and time; the three reports hold what the table says."""
    records = []
    for number in range(24):
        tone(tmp_path / f"{number}.wav", sec=1 + number / 24, gain=0.1 + number / 100)
        records.append(line("abcdefgh" * 2, f"{number}.wav", speaker=f"<b>{number % 3}</b>"))
    records += [records[0], line("a" * 300, "1.wav", speaker="d")]
    manifest = str(write_manifest(tmp_path / "m.jsonl", records))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"split": "train", "tokens_per_sec": 100.0}\n{"split": "val"}\n' * 3)
    options = ["--base_ckpt", str(checkpoint_dir), "--world_size", "2", "--batch_size", "4", "--like", str(tmp_path / "run")]
    for suffix in ("json", "md", "html"):
        assert prepare(["check", manifest, *options, "--report", str(tmp_path / f"r.{suffix}")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    figures = found["figures"]
    assert figures["speakers"] == "4, 1 to 9 records each" and figures["steps of an epoch"] == "4 on 2 GPU(s), 6.5 samples each"
    assert "at 100 tokens per second" in figures["time of an epoch"]
    assert len(found["notices"]["duplicates"]) == 1 and "record 24" in found["notices"]["duplicates"][0]
    assert ["record 25" in item for item in found["notices"]["text and duration do not fit"]] == [True]
    page, text = (tmp_path / "r.html").read_text(), (tmp_path / "r.md").read_text()
    for value in ("4, 1 to 9 records each", "record 25"):
        assert value in page and value in text
    assert prepare(["check", manifest, *options, "--max_tokens", "60"]) == 1
    assert "longer than --max_tokens 60" in capsys.readouterr().out
    assert prepare(["check", manifest, "--report", str(tmp_path / "r.pdf")]) == 2
    assert prepare(["check", str(tmp_path / "none.jsonl")]) == 2
    assert "Traceback" not in capsys.readouterr().err


# ---- pair


@pytest.fixture(scope="module")
def paired(tmp_path_factory) -> tuple[Path, Path]:
    """10,000 random records of 300 speakers, with copied clips, repeated texts and dialogues among them; and their pairing."""
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(1)
    for number in range(3000):
        np.save(folder / f"{number}.npy", rng.integers(0, 64, (8, 5)).astype(np.int16))
    for number in range(0, 3000, 50):  # the same content under another name
        (folder / f"copy{number}.npy").write_bytes((folder / f"{number}.npy").read_bytes())
    records = []
    for number in range(10_000):
        name = f"copy{number % 3000 // 50 * 50}" if number % 97 == 0 else number % 3000
        clip = {"type": "audio", "audio_url": f"{name}.npy"} | ({} if number < 3000 else {"offset": 0.04 * (number // 3000)})
        speaker = f"s{number % 300}" if number % 11 else None
        text = f"Sentence {rng.integers(4000)}."
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": clip}]
        if number % 53 == 0:
            turns += [
                {"role": "user", "content": "and on"},
                {"role": "assistant", "content": {"type": "audio", "audio_url": f"{rng.integers(3000)}.npy"}},
            ]
        records.append({"messages": turns} | ({"speaker": speaker} if speaker else {}))
    manifest = write_manifest(folder / "lines.jsonl", records)
    out = folder / "out"
    command = [
        "pair",
        str(manifest),
        str(out),
        "--val_share",
        "0.05",
        "--test_share",
        "0.05",
        "--hold_out_speakers",
        "5",
        "--ref_drop",
        "0.2",
    ]
    assert prepare(command) == 0
    return manifest, out


def heard(record: dict, folder: Path) -> list[tuple]:
    """What each clip of a record is, by its bytes."""
    parts = [
        part
        for turn in record["messages"]
        for part in (turn["content"] if isinstance(turn["content"], list) else [turn["content"]])
    ]
    clips = [part for part in parts if isinstance(part, dict) and part["type"] == "audio"]
    return [((folder / part["audio_url"]).read_bytes(), part.get("offset", 0)) for part in clips]


def test_nothing_leaks_between_splits_and_no_target_is_its_own_reference(paired):
    """Found without the command's own bookkeeping."""
    _, out = paired
    clips, said, speakers, count = {}, {}, {}, 0
    for split in ("train", "val", "test"):
        records = read_lines(out / f"{split}.jsonl")
        count += len(records)
        clips[split], said[split] = set(), set()
        speakers[split] = {record.get("speaker") for record in records} - {None}
        for record in records:
            own = heard(record, out)
            assert len(own) == len(set(own)) or (len(record["messages"]) > 3 and "start_index" not in record)
            clips[split].update(own)
            texts = [turn["content"] for turn in record["messages"] if turn["role"] == "user"]
            said[split].update((record["speaker"], text) for text in texts if "speaker" in record and text != "and on")
    assert count == 10_000
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not clips[a] & clips[b] and not said[a] & said[b]
    assert len(read_lines(out / "val.jsonl")) > 300
    assert len(speakers["test"] - speakers["train"] - speakers["val"]) >= 5
    report = json.loads((out / "leakage.json").read_text())
    assert report["leaks"] == 0 and report["written"]["val"]["reference: turn"] > 50


def test_references_are_of_the_speaker_and_phrased_as_inference_does(paired):
    manifest, out = paired
    originals = read_lines(manifest)
    speaker_of = {}
    for record in originals:
        for clip in heard(record, manifest.parent):
            speaker_of.setdefault(clip, set()).add(record.get("speaker"))
    styles = {"turn": 0, "system": 0, "none": 0}
    for record in read_lines(out / "train.jsonl"):
        if "speaker" not in record or sum(turn["content"] == "and on" for turn in record["messages"]):
            continue
        roles = [turn["role"] for turn in record["messages"]]
        if roles == ["user", "assistant"]:
            styles["none"] += 1
            continue
        reference = heard(record, out)[0]
        assert record["speaker"] in speaker_of[reference]
        if roles == ["system", "user", "assistant"]:
            styles["system"] += 1
            assert record["messages"][0]["content"] == scene_with_voices([record["messages"][0]["content"][1]])
        else:
            styles["turn"] += 1
            assert roles == ["user", "assistant"] * 2 and record["start_index"] == 3
    referenced = styles["turn"] + styles["system"]
    assert 0.65 < styles["turn"] / referenced < 0.75 and 0.15 < styles["none"] / (referenced + styles["none"]) < 0.3


def test_the_same_seed_gives_the_same_files(tmp_path, capsys):
    for number in range(40):
        np.save(tmp_path / f"{number}.npy", np.full((8, 5), number, np.int16))
    manifest = str(
        write_manifest(tmp_path / "m.jsonl", [line(f"text {i}", f"{i}.npy", speaker=f"s{i % 4}") for i in range(40)])
    )
    outputs = []
    for name, seed, extra in (
        ("a", "1", []),
        ("b", "1", []),
        ("c", "2", []),
        ("d", "1", ["--ref_per_line", "3", "--ref_drop", "0"]),
    ):
        assert prepare(["pair", manifest, str(tmp_path / name), "--seed", seed, "--val_share", "0.2", *extra]) == 0
        outputs.append([(tmp_path / name / f"{split}.jsonl").read_text() for split in ("train", "val")])
    assert outputs[0] == outputs[1] != outputs[2]
    assert len(outputs[0][1].splitlines()) == 8 and len(outputs[3][0].splitlines()) == 3 * 32
    assert not (tmp_path / "a" / "test.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--styles", "sung=1"], "the styles are turn and system"),
        (["--styles", "turn"], "expected turn=0.7,system=0.3"),
        (["--ref_drop", "2"], "--ref_drop between 0 and 1"),
        (["--val_share", "0.5", "--test_share", "0.5"], "leave nothing to train on"),
        (["--hold_out_speakers", "9"], "there are 1 speakers"),
        (["--hold_out_speakers", "zoe"], "no line of zoe"),
    ],
)
def test_impossible_pairings(options, message, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((8, 5), np.int16))
    manifest = str(write_manifest(tmp_path / "m.jsonl", [line("x", "a.npy", speaker="anna")]))
    assert prepare(["pair", manifest, str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


# ---- show


def test_show_prints_what_the_model_sees(toys, checkpoint_dir, capsys):
    """Of a clone with a reference: its turns, tokens and grid; the same marks with and without colours."""
    records = read_lines(toys / "train.jsonl")
    number = next(i for i, r in enumerate(records) if r.get("start_index") == 3 and len(r["messages"]) == 4)
    command = ["show", str(toys / "train.jsonl"), str(number), "--base_ckpt", str(checkpoint_dir)]
    assert prepare(command) == 0
    plain = capsys.readouterr().out
    assert f"record {number} (line {number + 1})" in plain and "assistant* " in plain and "assistant  " in plain
    assert plain.count("<|audio_out_bos|>*") == 1 and plain.count("<|audio_out_bos|>") == 2, "the reference does not train"
    grids = plain.split("spoken clip ")[1:]
    assert " 0 of " in grids[0] and " 0 of " not in grids[1]
    frames = np.load(toys / records[number]["messages"][3]["content"]["audio_url"]).shape[1]
    assert f"{8 * (frames + 1)} of {8 * (frames + 9)} cells trained" in grids[1]
    assert prepare([*command, "--color", "always"]) == 0
    colored = capsys.readouterr().out
    assert colored.count("\033[32m") == plain.count("*") and "\033[32m<|audio_out_bos|>\033[0m" in colored


def test_show_without_codes_or_record(toys, checkpoint_dir, tmp_path, capsys):
    tone(tmp_path / "a.wav")
    manifest = str(write_manifest(tmp_path / "m.jsonl", [line("abc", "a.wav", speaker="anna")]))
    assert prepare(["show", manifest, "0", "--base_ckpt", str(checkpoint_dir)]) == 0
    assert "no codes of its waveforms" in capsys.readouterr().out
    assert prepare(["show", manifest, "1", "--base_ckpt", str(checkpoint_dir)]) == 2
    assert "no record 1; there are 1" in capsys.readouterr().err


def test_the_front_door(capsys):
    assert prepare([]) == 2 and prepare(["--help"]) == 0 and prepare(["fix"]) == 2
    assert "references for zero-shot cloning" in capsys.readouterr().err
