"""forms.py: every form of dataset becomes the ChatML one would have written by hand."""

from __future__ import annotations

import base64
import contextlib
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from common import DataError
from config import to_argv
from prepare import forms, prompts
from prepare.__main__ import main as prepare
from prepare.forms import convert, open_manifest, recognise
from prepare.manifest import check, parse_record, read_manifest
from prepare.rows import Reading


@pytest.fixture()
def folder(tmp_path) -> Path:
    """Three clips at the places the forms below name."""
    for name in ("a.wav", "b.wav", "r.wav", "wavs/a.wav", "wavs/b.wav", "anna/a.wav", "ben/b.wav"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.zeros(1600), 16000)
    return tmp_path / "data"


def line(text: str, audio: str, **extra) -> dict:
    """The ChatML one would write by hand."""
    clip = {"type": "audio", "audio_url": audio}
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": clip}], **extra}


def exchange(text: str, audio: str) -> list[dict]:
    return line(text, audio)["messages"]


def write_json(path: Path, value) -> Path:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path, *values) -> Path:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path


def ms_swift(folder: Path) -> Path:
    return write_lines(
        folder / "swift.jsonl",
        {
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "<audio>"},
                {"role": "user", "content": [{"type": "text", "text": "Like <audio> please"}]},
                {"role": "assistant", "content": "<audio>"},
            ],
            "audios": ["a.wav", "r.wav", "b.wav"],
            "speaker": "anna",
        },
        {"messages": [{"role": "assistant", "content": "Good day"}], "audios": ["a.wav"]},
        {"messages": [{"role": "assistant", "content": "<audio>Good day."}], "audios": ["a.wav"], "speaker": "anna"},
        {
            "messages": [
                {"role": "user", "content": "Say: Good day."},
                {"role": "assistant", "content": "<audio>Good day."},
            ],
            "audios": ["a.wav"],
        },
        {"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": ""}], "audios": "b.wav"},
    )


def openai_parts(folder: Path) -> Path:
    raw = base64.b64encode((folder / "r.wav").read_bytes()).decode()
    return write_json(
        folder / "openai.json",
        [
            {
                "messages": [
                    {"role": "developer", "content": "Speak."},
                    {
                        "role": "user",
                        "content": [{"type": "input_audio", "input_audio": {"data": raw, "format": "wav"}}, "Hello"],
                    },
                    {"role": "Assistant", "content": {"type": "audio_url", "audio_url": {"url": "a.wav"}}},
                    {"role": "user", "content": [{"type": "audio", "audio": f"data:audio/wav;base64,{raw}"}]},
                    {"role": "assistant", "content": [{"type": "audio_url", "audio_url": f"file://{folder}/b.wav"}]},
                ]
            }
        ],
    )


def sharegpt(folder: Path) -> Path:
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "<audio>"}]
    return write_json(folder / "chat.json", [{"system": "Speak.", "conversations": turns, "audios": ["a.wav"], "lang": "en"}])


def sharegpt_pairs(folder: Path) -> Path:
    pairs = [{"human": "Hello", "assistant": "<audio>"}, {"human": "Bye", "assistant": "<audio>"}]
    record = {"system": "Speak.", "conversation": pairs, "audios": ["a.wav", "b.wav"], "start_index": 2}
    return write_lines(folder / "pairs.jsonl", record)


def exported_chats(folder: Path) -> Path:
    """Columns that some records do not use are null, and turns say by themselves whether they train."""
    turns = [
        {"role": "user", "content": "Before", "name": None, "loss": None},
        {"role": "assistant", "content": {"type": "audio", "audio_url": "r.wav"}, "tool_calls": [], "loss": False},
        {"role": "user", "content": "Bye", "name": None, "loss": None},
        {"role": "assistant", "content": {"type": "audio", "audio_url": "b.wav"}, "loss": True},
    ]
    return write_lines(folder / "chats.jsonl", {"messages": turns, "tools": None, "speaker": None})


def samples(folder: Path) -> Path:
    (folder / "a.txt").write_text("Hello\n", encoding="utf-8")
    (folder / "r.txt").write_text("Before", encoding="utf-8")
    voices = [
        {"speaker_tag": "[SPEAKER0]", "ref_audio_file": "a.wav", "ref_transcript": "Hello"},
        {"speaker_tag": "[SPEAKER1]", "ref_audio_file": "r.wav", "ref_transcript": "Before"},
    ]
    rows = [
        {"id": "1", "audio_file": "a.wav", "transcript_file": "a.txt", "duration": 0.1, "speaker_id": "anna", "scene": "quiet"},
        {"id": "2", "audio_file": "b.wav", "transcript": "Bye", "ref_audio_file": "r.wav", "ref_transcript_file": "r.txt"},
        {"id": "3", "audio_file": "b.wav", "transcript": "Bye", "ref_audio_file": "r.wav", "speaker_id": None},
        {"id": "4", "audio_file": "b.wav", "transcript": "[SPEAKER0] Hi [SPEAKER1] Bye", "ref_speakers": voices},
    ]
    write_json(folder / "metadata.json", {"dataset_info": {"total_samples": 4}, "samples": rows})
    return folder


def ljspeech(folder: Path) -> Path:
    (folder / "metadata.csv").write_text('a|Dr. "X|Doctor "X\nb|Bye|\n', encoding="utf-8")
    return folder


def audio_folder_jsonl(folder: Path) -> Path:
    write_lines(
        folder / "metadata.jsonl", {"file_name": "a.wav", "transcription": "Hello"}, {"file_name": "b.wav", "text": "Bye"}
    )
    return folder


def audio_folder_csv(folder: Path) -> Path:
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(
            [["file_name", "transcription", "speaker_id"], ["a.wav", "Hello,\nyou", "7"], ["b.wav", "Bye", ""]]
        )
    return folder


def kaldi(folder: Path) -> Path:
    (folder / "wav.scp").write_text("u1 a.wav\nrec\twavs/b.wav\n")
    (folder / "text").write_text("u1 Hello\nu2\tBye now\n")
    (folder / "utt2spk").write_text("u1 anna\nu2 ben\n")
    (folder / "segments").write_text("u1 u1 0.0 0.1\nu2 rec 0.05 0.1\n")
    return folder


def pairs(folder: Path) -> Path:
    for name in ("a.wav", "b.wav", "r.wav"):
        (folder / name).unlink()
    for name in ("wavs/a.wav", "wavs/b.wav"):
        (folder / name).unlink()
    (folder / "anna" / "a.txt").write_text("Hello\r\n", encoding="utf-8-sig")
    (folder / "ben" / "b.txt").write_text("Bye")
    return folder


def tsv(folder: Path) -> Path:
    (folder / "lines.tsv").write_text("Path\tSentence\tclient_id\tage\na.wav\tHello\tanna\t30\nb.wav\tBye\tnan\t\n")
    return folder / "lines.tsv"


def common_voice(folder: Path) -> Path:
    """Quotes are mere characters, and clips lie in a folder of their own."""
    (folder / "wavs").rename(folder / "clips")
    for name in ("a.wav", "b.wav"):
        (folder / name).unlink()
    lines = ["client_id\tpath\tsentence", '1f\ta.wav\t"Hello', '2e\tb.wav\t"Bye," he said.']
    (folder / "validated.tsv").write_text("\n".join(lines) + "\n")
    return folder / "validated.tsv"


def quoted_tsv(folder: Path) -> Path:
    """As pandas writes it."""
    lines = ["audio\ttext\tspeaker", 'a.wav\t"Hello ""you"""\tnan', 'b.wav\t"Bye\tnow"\tben']
    (folder / "quoted.tsv").write_text("\r\n".join(lines) + "\r\n")
    return folder / "quoted.tsv"


def rows(folder: Path) -> Path:
    return write_lines(
        folder / "rows.jsonl",
        {"audio_filepath": "a.wav", "text": "Hello", "offset": 0.05, "duration": 0.05},
        {"audio": {"path": "b.wav"}, "sentence": "Bye", "duration": float("nan"), "ref_audio": "r.wav", "ref_text": "Before"},
    )


BARE = Reading(normalize=False, phrasing=None)  # rows as they are written
SYSTEM = {"role": "system", "content": "Speak."}
QUIET = {"role": "system", "content": f"{prompts.INSTRUCTION}\n\n<|scene_desc_start|>\nquiet\n<|scene_desc_end|>"}
VOICE = [
    {"type": "text", "text": "Generate audio following instruction.\n\n<|scene_desc_start|>\nSPEAKER0: "},
    {"type": "audio", "audio_url": "r.wav"},
    {"type": "text", "text": "\n<|scene_desc_end|>"},
]
LIKE = [{"type": "text", "text": "Like "}, {"type": "audio", "audio_url": "r.wav"}, {"type": "text", "text": " please"}]
RAW = {"type": "audio", "raw_audio": "RIFF", "audio_url": ""}  # only where it stands matters to the ids
TWO_VOICES = exchange("[SPEAKER0] Hello", "a.wav") + exchange("[SPEAKER1] Before", "r.wav")
WITH_REFERENCE = {"messages": exchange("Before", "r.wav") + exchange("Bye", "b.wav"), "start_index": 3}
BY_HAND = {
    ms_swift: (
        "messages",
        [
            {
                "messages": [*exchange("Hello", "a.wav"), {"role": "user", "content": LIKE}, *exchange("x", "b.wav")[1:]],
                "speaker": "anna",
            },
            line("Good day", "a.wav"),
            line("Good day.", "a.wav", speaker="anna"),
            line("Say: Good day.", "a.wav"),
            line("Bye", "b.wav"),
        ],
    ),
    openai_parts: (
        "messages",
        [
            {
                "messages": [
                    SYSTEM,
                    {"role": "user", "content": [RAW, "Hello"]},
                    *exchange("", "a.wav")[1:],
                    {"role": "user", "content": [RAW]},
                    *exchange("", "b.wav")[1:],
                ]
            }
        ],
    ),
    sharegpt: ("messages", [{"messages": [SYSTEM, *exchange("Hello", "a.wav")]}]),
    sharegpt_pairs: (
        "messages",
        [{"messages": [SYSTEM, *exchange("Hello", "a.wav"), *exchange("Bye", "b.wav")], "start_index": 3}],
    ),
    exported_chats: ("messages", [WITH_REFERENCE]),
    samples: (
        "samples",
        [
            {"messages": [QUIET, *exchange("Hello", "a.wav")], "speaker": "anna"},
            WITH_REFERENCE,
            {"messages": [{"role": "system", "content": VOICE}, *exchange("Bye", "b.wav")]},
            {"messages": TWO_VOICES + exchange("[SPEAKER0] Hi [SPEAKER1] Bye", "b.wav"), "start_index": 5},
        ],
    ),
    ljspeech: ("LJSpeech", [line('Doctor "X', "wavs/a.wav"), line("Bye", "wavs/b.wav")]),
    audio_folder_jsonl: ("audio folder", [line("Hello", "a.wav"), line("Bye", "b.wav")]),
    audio_folder_csv: ("audio folder", [line("Hello,\nyou", "a.wav", speaker="7"), line("Bye", "b.wav")]),
    kaldi: ("Kaldi", [line("Hello", "a.wav", speaker="anna"), line("Bye now", "wavs/b.wav", speaker="ben")]),
    pairs: ("pairs", [line("Hello", "anna/a.wav", speaker="anna"), line("Bye", "ben/b.wav", speaker="ben")]),
    tsv: ("table", [line("Hello", "a.wav", speaker="anna"), line("Bye", "b.wav")]),
    common_voice: (
        "table",
        [line('"Hello', "clips/a.wav", speaker="1f"), line('"Bye," he said.', "clips/b.wav", speaker="2e")],
    ),
    quoted_tsv: ("table", [line('Hello "you"', "a.wav"), line("Bye\tnow", "b.wav", speaker="ben")]),
    rows: ("table", [line("Hello", "a.wav"), WITH_REFERENCE]),
}


@pytest.mark.parametrize("make", BY_HAND, ids=lambda make: make.__name__)
def test_every_form_is_the_chatml_written_by_hand(make, folder, tokenizer, tmp_path, capsys):
    """The official ids, labels and audio of each record; then: what was written checks, and converts to itself."""
    path = make(folder)
    form, expected = BY_HAND[make]
    assert recognise(path) == form
    opened, conversion = open_manifest(path, reading=BARE)
    records = list(check(opened)[0])
    assert len(records) == len(expected) and conversion.form == form
    for record, wanted in zip(records, expected):
        ours = prepare_chatml_sample(record.chatml, tokenizer)
        official = prepare_chatml_sample(json.loads(json.dumps(wanted)), tokenizer)
        assert ours[:2] == official[:2]
        assert [Path(part.audio_url).name for part in ours[2]] == [Path(part.audio_url).name for part in official[2]]
        assert record.chatml.speaker == wanted.get("speaker")

    once, twice = folder / "once.jsonl", tmp_path / "twice.jsonl"
    assert prepare(["convert", str(path), str(once)]) == 0
    assert f"{form}, {len(expected)} records" in capsys.readouterr().out
    assert recognise(once) is None
    check(read_manifest(once))
    once_again = folder / "again.jsonl"
    assert prepare(["convert", str(once), str(once_again)]) == 0 and once_again.read_bytes() == once.read_bytes()
    assert prepare(["convert", str(once), str(twice)]) == 0
    check(read_manifest(twice))
    assert prepare(["convert", str(once), str(once)]) == 2


@pytest.mark.parametrize("make", BY_HAND, ids=lambda make: make.__name__)
def test_every_form_trains(make, folder, codec_dir, toys, tmp_path, capsys):
    """Two steps of train.py, as a user would take them: read, encoded by a codec, trained."""
    path, output = make(folder), tmp_path / "out"
    flags = {"train_manifest": path, "output_dir": output, "base_ckpt": toys / "checkpoint", "audio_tokenizer": codec_dir}
    flags |= {"max_steps": 2, "batch_size": 2, "mixed_precision": "no", "device": "cpu", "num_workers": 0}
    flags |= {"codes_dir": codec_dir / "codes"}  # to the codec all these clips are one
    assert train.main(to_argv(flags)) == 0
    form, expected = BY_HAND[make]
    assert f"{form}, read as ChatML: {len(expected)} records" in capsys.readouterr().err
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["audio_targets"] > 0 for line in lines)


def test_repairs_are_counted(folder):
    repairs = open_manifest(ms_swift(folder))[1].repairs
    assert repairs["`<audio>` tags became audio parts"] == 4
    assert repairs["a clip with its transcript became the answer to it, phrased as inference does"] == 2
    assert repairs["the clip became the assistant's turn, which had no words of its own"] == 1
    repairs = open_manifest(sharegpt(folder))[1].repairs
    assert repairs["from / value became role / content"] == 2 and repairs['role "gpt" became "assistant"'] == 1
    assert repairs["`lang` went to `misc`"] == 1
    repairs = open_manifest(exported_chats(folder))[1].repairs
    assert repairs == {"turns whose `loss` is off stand before `start_index` now": 1}
    assert open_manifest(common_voice(folder), reading=BARE)[1].repairs == {"clips were found in clips/": 2}


def test_what_is_known_beside_goes_to_misc_or_is_counted(folder):
    path = write_lines(folder / "r.jsonl", {"audio": "a.wav", "text": "x", "lang": "en", "words": ["x"], "age": None})
    (_, record), *_ = (conversion := convert(path, BARE)).records
    assert record["misc"] == {"lang": "en"} and conversion.repairs == {"`words` was left out": 1}


def test_offsets_are_kept(folder):
    first, second = (record for _, record in convert(rows(folder), BARE).records)
    assert first["messages"][1]["content"] == {"type": "audio", "audio_url": "a.wav", "offset": 0.05, "duration": 0.05}
    _, (_, segment) = convert(kaldi(folder), BARE).records
    assert segment["messages"][1]["content"] == {"type": "audio", "audio_url": "wavs/b.wav", "offset": 0.05, "duration": 0.05}
    assert "offset" not in second["messages"][3]["content"]
    (folder / "t.csv").write_text("path,text,start_time,end_time\na.wav,Hello,0.025,0.075\n")
    ((_, third),) = convert(folder / "t.csv", BARE).records
    assert third["messages"][1]["content"] == {"type": "audio", "audio_url": "a.wav", "offset": 0.025, "duration": 0.05}


@pytest.mark.parametrize("indent", [None, 1])
def test_large_files_are_recognised_by_their_beginning(indent, folder, monkeypatch):
    monkeypatch.setattr(forms, "PEEKED_BYTES", 8)
    path = samples(folder) / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=indent))
    assert recognise(path) == "samples"
    assert recognise(ms_swift(folder)) == "messages"
    assert recognise(write_lines(folder / "m.jsonl", line("Hello", "a.wav"), {"messages": [], "audios": []})) is None


def test_inserted_turns_shift_the_first_that_trains(folder):
    record = {"system": "Speak.", "messages": exchange("x", "r.wav") + exchange("y", "a.wav"), "start_index": 3}
    ((_, made),) = convert(write_lines(folder / "m.jsonl", record)).records
    assert made == {"messages": [SYSTEM, *record["messages"]], "start_index": 4}
    record = {"messages": [SYSTEM, {"role": "assistant", "content": "y"}], "audios": ["a.wav"], "start_index": 1}
    ((_, made),) = convert(write_lines(folder / "m.jsonl", record)).records
    assert made == {"messages": [SYSTEM, *exchange("y.", "a.wav")], "misc": {"text": "y"}}


def test_plain_chatml_is_left_alone(folder):
    for record in (
        line("Hello", "a.wav"),
        WITH_REFERENCE,
        line("x", "a.wav", misc={"audio": 3}),
        {"messages": 3},
        {"messages": [{}]},
    ):
        assert recognise(write_lines(folder / "m.jsonl", record)) is None
    (folder / "m.jsonl").write_text("{broken\n")
    assert recognise(folder / "m.jsonl") is None, "the reader names what is wrong"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", '{"prompt": "x", "answer": "y"}\n', r"(?s)found keys \['answer', 'prompt'\].*LJSpeech"),
        ("m.csv", "first,second\n1,2\n", r"a first line of \[\"first\", \"second\"\]"),
        ("m.json", "3", "not a form of dataset known here: found"),
        (
            "swift.jsonl",
            '{"messages": [{"role": "user", "content": "<audio><audio>"}], "audios": ["a.wav"]}',
            "2 <audio> tags but 1 audios",
        ),
        (
            "swift.jsonl",
            '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}], "audios": ["a.wav"]}',
            "no <audio> tag; write <audio> where",
        ),
        (
            "swift.jsonl",
            '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<audio>You."}], "audios": ["a.wav"]}',
            'turn 1: a clip and then "You.", .* if it is the clip\'s transcript, make it the user\'s turn',
        ),
        ("swift.jsonl", '{"messages": [], "audios": [3]}', r"record 0 .*audios\[0\]: expected a path to audio, found 3"),
        ("swift.jsonl", '{"messages": [], "audios": ["https://x.y/a.wav"]}', "download it"),
        ("swift.jsonl", '{"messages": [], "images": ["x.png"], "audios": []}', "images and videos"),
        ("rows.jsonl", '{"audio": "a.wav", "text": ""}', r"rows\.jsonl: 1 clips, no transcripts: bash launch\.sh prepare transcribe .*rows\.jsonl"),
        ("rows.jsonl", '{"audio": "a.wav", "text": [1]}', r"text: expected text, found \[1\]"),
        ("rows.jsonl", '{"audio": "a.wav", "text": "x", "offset": "soon"}', "offset: expected seconds"),
        ("rows.jsonl", '{"audio": "a.wav", "transcript_file": "none.txt"}', "none.txt cannot be read"),
        (
            "rows.jsonl",
            '{"id": 1, "audio": "a.wav", "text": "x"}\n{"id": 1, "audio": "b.wav", "text": "y"}',
            "id '1' was used before",
        ),
        ("metadata.csv", "a|one\nb\n", r"metadata\.csv line 2: no text"),
        ("metadata.json", '{"samples": [{"audio_file": "a.wav"}]}', r"metadata\.json sample 0: no text"),
        ("wav.scp", "u1 a.wav\n", "text: missing or empty"),
        ("table.csv", 'audio,text\na.wav,"open\nb.wav,x\n', r"table\.csv line 2: broken table: unexpected end of data"),
        (
            "table.csv",
            "audio,text\na.wav,Hello, you\n",
            r"table\.csv line 2: 3 fields under a header of 2; a text that holds ','",
        ),
        ("table.csv", 'audio,text\n"a.wav","two\nlines"\n\nb.wav\n', r"table\.csv line 5: 1 fields under"),
        (
            "list.txt",
            "wavs/a.wav|Hello|anna\n",
            r'list\.txt: unclear which field is what \(1: "wavs/a.wav" \| 2: "Hello" \| 3: "anna"\); say it with --columns audio=1,text=2',
        ),
        ("metadata.csv", "a|one\na|two\n", r"line 2: id 'a' was used before, at .*line 1; give each sample its own"),
        ("rows.jsonl", '{"audio": "a.wav", "transcript_file": "../x/a.txt"}', "transcript_file: .*leaves the dataset's folder"),
        ("rows.jsonl", '{"audio": "a.wav", "transcript_file": "/dev/zero"}', "it is no regular file"),
        ("rows.jsonl", '{"audio": "a.wav", "transcript_file": "a.wav"}', "a.wav cannot be read as UTF-8 text"),
        ("rows.jsonl", '{"audio": "a.wav", "text": "x", "ref_speakers": [{}]}', r"ref_speakers\[0\]: no ref_audio"),
        ("rows.jsonl", '{"audio": "../a.wav", "text": "x"}', "leaves the manifest's folder; move the file there"),
        (
            "chats.jsonl",
            '{"messages": [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y", "loss": false}]}',
            r"messages\[1\]: `loss` is off here but not in turn 0; .* split the record",
        ),
        (
            "chats.jsonl",
            '{"messages": [{"role": "assistant", "content": "x", "audio": {"id": "1"}}]}',
            r"messages\[0\]: unknown keys \['audio'\]; a turn has `role` and `content`",
        ),
        ("chats.jsonl", '{"messages": [{"role": "gpt", "content": "x"}], "misc": "x"}', "misc: expected an object"),
        ("chats.jsonl", '{"messages": [{"role": "gpt", "content": "x"}], "start_index": true}', "expected a whole number"),
        ("table.csv", "audio,text\n".encode("utf-16"), "not UTF-8 text"),
    ],
)
def test_mistakes_are_named(name, content, message, folder):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        check(open_manifest(path)[0])


def test_folders_without_a_form_are_listed(tmp_path):
    with pytest.raises(DataError, match="no such manifest file or folder"):
        recognise(tmp_path / "none")
    with pytest.raises(DataError, match="found an empty folder"):
        recognise(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"(?s)found files notes\.md.*Kaldi"):
        recognise(tmp_path)


def test_no_command_of_a_kaldi_folder_is_run(folder):
    kaldi(folder)
    (folder / "wav.scp").write_text(f"u1 touch {folder}/ran |\nrec wavs/b.wav\n")
    with pytest.raises(DataError, match=r"text line 1: wav.scp gives a command for 'u1'; commands are not run"):
        open_manifest(folder)
    assert not (folder / "ran").exists()


def test_kaldi_files_that_disagree(folder):
    kaldi(folder)
    (folder / "text").write_text("u1 Hello\nu3 Bye\n")
    with pytest.raises(
        DataError, match=r"(?s)text line 2: 'u3' has no line .* in segments.*segments line 2: 'u2' has no line in"
    ):
        open_manifest(folder)
    (folder / "segments").unlink()
    with pytest.raises(
        DataError, match=r"(?s)text line 2: 'u3' has no line in wav.scp.*wav.scp line 2: 'rec' has no line in text"
    ):
        open_manifest(folder)


def test_two_clips_beside_one_text(folder):
    soundfile.write(pairs(folder) / "anna" / "a.flac", np.zeros(1600), 16000)
    with pytest.raises(DataError, match=r"a\.wav: id 'anna/a' was used before, at .*a\.flac"):
        open_manifest(folder)


def test_only_chatml_is_written_over(folder, capsys):
    audio_folder_jsonl(folder)
    (folder / "notes").write_text("mine")
    before = {path: path.read_bytes() for path in (folder / "metadata.jsonl", folder / "notes", folder / "a.wav")}
    for path in (*before, Path("/dev/null"), folder):
        assert prepare(["convert", str(folder), str(path)]) == 2
        assert "only ChatML is written over" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())
    assert prepare(["convert", str(folder), str(folder / "new" / "out.jsonl")]) == 0
    assert prepare(["convert", str(folder), str(folder / "new" / "out.jsonl")]) == 0
    write_lines(folder / "metadata.jsonl", {"file_name": "a.wav"})
    content = (folder / "new" / "out.jsonl").read_bytes()
    assert prepare(["convert", str(folder), str(folder / "new" / "out.jsonl")]) == 2
    assert [path.name for path in (folder / "new").iterdir()] == ["out.jsonl"] and content.count(b"\n") == 2
    assert (folder / "new" / "out.jsonl").read_bytes() == content


def test_half_a_character_survives_to_be_named(folder, capsys):
    path = write_lines(folder / "m.jsonl", line("x", "a.wav", speaker="ä"))
    path.write_text(path.read_text(encoding="utf-8").replace('"x"', '"\\ud83d"'), encoding="utf-8")
    assert prepare(["convert", str(path), str(folder / "out.jsonl")]) == 0
    assert b'"\\ud83d"' in (folder / "out.jsonl").read_bytes()
    with pytest.raises(DataError, match=r"record 0 .*half a character"):
        check(read_manifest(folder / "out.jsonl"))


def test_all_problems_are_told_at_once(folder):
    path = write_lines(folder / "rows.jsonl", {"audio": "a.wav", "text": "x"}, {"audio": "a.wav"}, {"text": "y"})
    with pytest.raises(DataError, match=r"2 records cannot be used:\n.*record 1 .*\n.*record 2 "):
        open_manifest(path)
    kept, conversion = open_manifest(path, tolerant=True)
    assert len(kept) == 1 and len(conversion.problems) == 2


# ---- anything at all

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "<audio>", "a.wav", "text"])
)
NAMES = st.sampled_from(
    ["messages", "role", "content", "type", "text", "audio", "audio_url", "audios", "from", "value", "conversations", "samples"]
    + [
        "raw_audio",
        "input_audio",
        "data",
        "path",
        "start_index",
        "speaker",
        "misc",
        "offset",
        "duration",
        "system",
        "ref_audio",
        "id",
    ]
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)
PARTS = (
    st.dictionaries(st.sampled_from(["type", "text", "audio_url", "raw_audio", "offset", "duration"]), SCALARS, max_size=4)
    | JSON
)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "Human"]) | SCALARS, "content": PARTS | st.lists(PARTS, max_size=3)}
)
CHATS = st.fixed_dictionaries(
    {"messages": st.lists(TURNS | JSON, max_size=3)}, optional={"audios": JSON, "start_index": JSON, "misc": JSON}
)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@QUICK
@given(value=CHATS | JSON)
def test_no_json_breaks_the_parser(value, tmp_path):
    with contextlib.suppress(DataError):
        parse_record(value, tmp_path, "record 0")


@QUICK
@given(values=st.lists(CHATS | JSON, min_size=1, max_size=3))
def test_no_json_breaks_the_conversion(values, tmp_path):
    path = tmp_path / "fuzz.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    with contextlib.suppress(DataError):
        check(open_manifest(path)[0])


TOKENS = st.sampled_from(
    [*',;|\t\n\r" \0', '""', "audio", "text", "speaker", "start", "end", "a.wav", "u1", "-1", "nan", "\r\n", "ä"]
)
CONTENT = st.binary(max_size=60) | st.text(alphabet='{}[]":,|\n\\ausewvtxd01', max_size=60).map(str.encode)
TABLES = st.lists(TOKENS, max_size=30).map("".join).map(str.encode)
HEADERS = st.sampled_from([b"", b"audio,text\n", b"audio\ttext\tspeaker\n", b"audio|text\n", b"u1 a.wav\n", b"u1 u1 0 0.1\n"])


@QUICK
@given(content=CONTENT | TABLES, header=HEADERS, name=st.sampled_from(["fuzz.json", "fuzz.csv", "fuzz.tsv", "fuzz.txt"]))
def test_no_bytes_break_the_readers(content, header, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(header + content)
    with contextlib.suppress(DataError):
        check(open_manifest(path)[0])


@QUICK
@given(content=TABLES, header=HEADERS, name=st.sampled_from(["wav.scp", "text", "utt2spk", "segments"]))
def test_no_lines_break_a_kaldi_folder(content, header, name, folder):
    kaldi(folder)
    (folder / name).write_bytes(header + content)
    with contextlib.suppress(DataError):
        check(open_manifest(folder)[0])
