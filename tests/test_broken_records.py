"""Records that no tool should write and some do: each is named with its line and a remedy, and the good ones stay readable.

What is wrong with audio files and codes is in test_prepare.py, what common mistakes say word by word in test_data.py.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import DataError
from data import ChatMLDataset
from prepare.audio import duration_sec
from prepare.forms import open_manifest
from prepare.manifest import check, parse_record, read_manifest

CLIP = {"type": "audio", "audio_url": "a.wav"}
GOOD = {"messages": [{"role": "user", "content": "Good day"}, {"role": "assistant", "content": CLIP}]}


def spoken(content, **extra) -> dict:
    return {"messages": [{"role": "user", "content": "Good day"}, {"role": "assistant", "content": content}], **extra}


def clip(**extra) -> dict:
    return spoken(CLIP | extra)


# A line of a manifest, or the object in it -> what has to be said about it.
BROKEN = [
    ('{"messages": [{"role": "assistant", "content": "x"}], "start_index": 1e999}', "start_index: expected a whole number"),
    ('{"messages": [{"role": "assistant", "content": "x"}], "start_index": Infinity}', "start_index: expected a whole number"),
    (GOOD | {"start_index": 10**400}, "leaves no turn to train"),
    (GOOD | {"start_index": -1}, "leaves no turn to train"),
    (GOOD | {"start_index": 0.5}, "start_index: expected a whole number"),
    (GOOD | {"start_index": True}, "start_index: expected a whole number"),
    (GOOD | {"speaker": 7}, "speaker: expected text"),
    (GOOD | {"misc": ["x"]}, "misc: expected an object"),
    (GOOD | {"Messages": []}, "unknown keys ['Messages']; put extra information under `misc`"),
    ('{"messages": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
    ('{"messages": [{"role": "assistant", "content": "x"}], "start_index": ' + "1" * 5000 + "}", "digits"),
    ('{"messages": [{"role": "user", "content": "cut o', "broken JSON (Unterminated string"),
    ("{} {}", "broken JSON (Extra data"),
    ('{"messages": [{"role": "user", "content": "Grüße"}]}'.encode("latin-1"), "not UTF-8 text"),
    (b'{"messages": "\x00"}', "broken JSON (Invalid control character"),
    ('{"messages": {"role": "assistant"}}', "messages: expected a non-empty list of turns"),
    ({"messages": [["assistant", "x"]]}, "messages[0]: expected an object with `role` and `content`"),
    ({"messages": [{"role": ["assistant"], "content": "x"}]}, "is not one of system, user, assistant"),
    ({"messages": [{"role": "tool", "content": "x"}]}, '"tool" is not one of system, user, assistant'),
    ({"messages": [{"role": "user", "content": "x", "recipient": "y"}]}, "only an assistant turn can have a recipient"),
    ({"messages": [{"role": "assistant", "content": "x", "name": "y"}]}, "unknown keys ['name']"),
    (spoken(""), "messages[1].content: empty, though the turn is to be trained"),
    (spoken([]), "messages[1].content: empty"),
    (spoken([{"type": "text", "text": ""}, ""]), "messages[1].content: empty"),
    (spoken([["nested"]]), "messages[1].content[0]: expected text"),
    (spoken(float("nan")), "messages[1].content: expected text"),
    ('{"messages": [{"role": "assistant", "content": "\\ud83d"}]}', "half a character"),
    (spoken([{"type": "text", "text": "\udc80"}]), "messages[1].content[0].text: half a character"),
    (clip(audio_url="\ud83d.wav"), "does not exist"),
    (clip(audio_url="a" * 5000 + ".wav"), "does not exist"),
    (clip(audio_url="/dev/zero"), "does not exist"),
    (clip(audio_url="~/a.wav"), "does not exist; paths are relative to the manifest's folder, or absolute"),
    (clip(audio_url="x/../../data/a.wav"), "leaves the manifest's folder; move the file there, or give its absolute path"),
    (clip(audio_url="nowhere.wav"), "does not exist"),
    (clip(audio_url={"url": "a.wav"}), "audio_url: expected a path"),
    (clip(audio_url="", raw_audio=""), "audio_url: expected a path"),
    (clip(raw_audio=3), "raw_audio: not base64"),
    (clip(raw_audio="\u00e4"), "raw_audio: not base64"),
    (clip(offset=1e308), "offset: expected seconds"),
    (clip(duration=float("-inf")), "duration: expected seconds"),
    (clip(duration=10**400), "duration: expected seconds"),
    (clip(duration=True), "duration: expected seconds"),
    (clip(audio_label_url=3), "audio_label_url: expected a path"),
    (clip(Offset=1), "unknown keys ['Offset'] of an audio part"),
]


@pytest.fixture()
def folder(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    soundfile.write(tmp_path / "data" / "a.wav", np.zeros(1600), 16000)
    os.symlink("gone.wav", tmp_path / "data" / "nowhere.wav")
    return tmp_path / "data"


def encoded(line) -> bytes:
    return line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()


def test_each_is_named_and_the_good_ones_stay(folder):
    manifest = folder / "m.jsonl"
    manifest.write_bytes(b"".join(encoded(line) + b"\n" + encoded(GOOD) + b"\r\n" for line, _ in BROKEN))
    opened = read_manifest(manifest)
    assert len(opened) == 2 * len(BROKEN)
    for index, (_, message) in enumerate(BROKEN):
        with pytest.raises(DataError) as problem:
            opened[2 * index]
        said = str(problem.value)
        assert message in said and "m.jsonl" in said and f"line {2 * index + 1}" in said
        said.encode()  # it can be written to a report
        assert opened[2 * index + 1].audio[0].path == folder / "a.wav"
    with pytest.raises(DataError, match=rf"{len(BROKEN)} records cannot be used:(\n.*){{20}}\n.*and {len(BROKEN) - 20} more"):
        check(opened)


def test_ten_hours_are_not_read_to_be_judged(folder):
    """A sparse file of 1.7 GB: only its header is ever touched."""
    rate, seconds = 24000, 36000
    with soundfile.SoundFile(folder / "long.wav", "w", rate, 1, "PCM_16") as file:
        file.write(np.zeros(rate))
    size = 44 + 2 * rate * seconds
    with open(folder / "long.wav", "r+b") as file:
        file.truncate(size)
        for at, value in ((4, size - 8), (40, size - 44)):
            file.seek(at)
            file.write(value.to_bytes(4, "little"))
    (part,) = parse_record(clip(audio_url="long.wav"), folder, "record 0").audio
    assert duration_sec(part) == seconds


def test_links_are_part_of_a_dataset(folder, tmp_path):
    os.symlink(folder, tmp_path / "linked")
    os.symlink(folder / "a.wav", tmp_path / "b.wav")
    assert parse_record(GOOD, tmp_path / "linked", "record 0").audio[0].path.is_file()
    assert parse_record(clip(audio_url="b.wav"), tmp_path, "record 0").audio[0].path.is_file()
    assert parse_record(clip(audio_url="linked/../b.wav"), tmp_path, "record 0").audio[0].path.is_file()


def test_a_recipient_before_start_index_does_not_train(folder, tokenizer):
    """Upstream gives labels to the recipient of every turn."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": CLIP, "recipient": "anna"}]
    value = {"messages": [*turns, *turns], "start_index": 3}
    dataset = ChatMLDataset([parse_record(value, folder, "record 0")], tokenizer, None)
    input_ids, label_ids = dataset.ids(dataset.records[0])
    official_ids, official_labels, *_ = prepare_chatml_sample(copy.deepcopy(value), tokenizer)
    trained = tokenizer.decode([token for token, label in zip(input_ids, label_ids) if label != -100])
    official = tokenizer.decode([token for token, label in zip(official_ids, official_labels) if label != -100])
    assert input_ids == official_ids and trained == "anna<|recipient|><|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
    assert official == "anna<|recipient|>" + trained


# ---- anything in the place of anything

WHOLE = {
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "A scene: "}, CLIP, "."]},
        {"role": "user", "content": "the reference"},
        {"role": "assistant", "content": CLIP | {"offset": 0.01, "duration": 0.05}},
        {"role": "user", "content": {"type": "text", "text": "the new text"}},
        {"role": "assistant", "content": ["Here: ", CLIP | {"audio_label_url": "a.wav"}], "recipient": "all"},
    ],
    "start_index": 3,
    "speaker": "anna",
    "misc": {"a": 1},
}
SWIFT = {
    "system": "Speak.",
    "messages": [
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}]},
        {"role": "gpt", "content": "<audio>", "loss": False},
        {"role": "user", "content": "Like <audio>"},
        {"from": "gpt", "value": [{"type": "audio_url", "audio_url": {"url": "a.wav"}}], "loss": True},
    ],
    "audios": ["a.wav", {"path": "a.wav"}],
    "start_index": 1,
    "lang": "en",
}
ROW = {
    "id": "1",
    "audio": {"path": "a.wav"},
    "text": "Good day",
    "speaker_id": 7,
    "start": 0.1,
    "end": 0.2,
    "ref_audio_file": "a.wav",
    "ref_transcript": "Before",
    "ref_speakers": [{"speaker_tag": "[SPEAKER0]", "ref_audio_file": "a.wav", "ref_transcript": "Before"}],
    "extra": [1],
}
ODD = [
    None,
    True,
    -1,
    0,
    1.5,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud83d",
    "a\0b",
    "../a.wav",
    "/",
    [],
    [[]],
    {},
]
ODD += [{"type": "audio"}, {"type": "text"}, {"type": []}, {"role": "user"}, CLIP, [CLIP], "assistant", "<audio>", "data:,"]


def places(value, found=()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*found, key) for key, _ in items] + [place for key, v in items for place in places(v, (*found, key))]


def changed(record, changes: list[tuple[int, object]]):
    record = copy.deepcopy(record)
    for number, odd in changes:
        possible = places(record)
        if possible:
            *path, last = possible[number % len(possible)]
            target = functools.reduce(lambda value, key: value[key], path, record)
            target[last] = copy.deepcopy(odd)
    return record


CHANGES = st.lists(st.tuples(st.integers(0, 99), st.sampled_from(ODD)), max_size=3)
QUICK = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@QUICK
@given(changes=CHANGES)
def test_nothing_but_a_data_error_comes_of_a_changed_record(changes, folder):
    with suppress(DataError) if changes else nullcontext():
        parse_record(changed(WHOLE, changes), folder, "record 0")


@pytest.mark.parametrize("record", [SWIFT, ROW], ids=["messages", "row"])
@QUICK
@given(changes=CHANGES)
def test_nothing_but_a_data_error_comes_of_a_changed_dataset(changes, record, folder):
    path = folder / "data.jsonl"
    path.write_text(json.dumps(changed(record, changes)) + "\n")
    with suppress(DataError) if changes else nullcontext():
        check(open_manifest(path)[0])
