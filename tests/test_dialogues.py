"""Dialogues: lines joined by `prepare pair --dialogues`, and the accuracy around a change of speaker."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_model, make_sample, write_manifest
from test_prepare import RNG, line, read_lines

import loss
import model_patch
import train
from collate import create_collator
from config import to_argv
from data import ChatMLDataset
from generate.lines import Chunking, line_of_request
from generate.official import as_prompt
from prepare.__main__ import main as prepare
from prepare.audio import AudioStore
from prepare.manifest import read_manifest

RATE = 16000
# start, end, speaker and text; between segments are pauses of 0.1 s, before the fifth one of 3 s
TALK = [
    (0.0, 0.4, "SPEAKER_00", "How are you?"),
    (0.5, 0.9, "SPEAKER_01", "Very well."),
    (1.0, 1.4, "SPEAKER_01", "And you?"),
    (1.5, 1.9, "SPEAKER_00", "I am tired."),
    (4.9, 5.3, "SPEAKER_02", "So am I."),
    (5.4, 5.8, "SPEAKER_00", "Let us go home."),
    (5.9, 6.3, "SPEAKER_02", "Good night."),
    (9.5, 9.9, "SPEAKER_00", "Nobody answers this."),
    (12.5, 12.9, "SPEAKER_01", "Nor this."),
    (15.5, 15.9, "SPEAKER_02", "Who is there?"),
]


@pytest.fixture(scope="module")
def talk(tmp_path_factory) -> Path:
    """A recording with the transcript that WhisperX writes."""
    folder = tmp_path_factory.mktemp("talk")
    soundfile.write(folder / "talk.wav", 0.1 * np.sin(np.arange(16 * RATE) / 9), RATE)
    names = ("start", "end", "speaker", "text")
    segments = [dict(zip(names, segment)) | {"words": []} for segment in TALK]
    (folder / "talk.json").write_text(json.dumps({"segments": segments, "language": "en"}))
    return folder


@pytest.fixture(scope="module")
def dialogues(talk) -> tuple[Path, list[dict]]:
    return pair_talk(talk)


def pair_talk(dataset: Path) -> tuple[Path, list[dict]]:
    """The folder that pair wrote, and the dialogues in it."""
    out = dataset.parent / f"{dataset.name} paired"
    options = ["--dialogues", "0.9", "--val_share", "0", "--styles", "turn=1", "--scene_share", "0"]
    assert prepare(["pair", str(dataset), str(out), *options]) == 0
    return out, [record for record in read_lines(out / "train.jsonl") if "speaker_changes_sec" in record.get("misc", {})]


def write_table(path: Path, audio: str) -> Path:
    rows = [f"{audio},{start},{end},{name},{text}" for start, end, name, text in TALK]
    path.write_text("\n".join(["audio,start,end,speaker,text", *rows]))
    return path


def said(text: str) -> list[tuple[str, str]]:
    """(tag, words) of each turn."""
    return [tuple(turn.split(" ", 1)) for turn in text.split("\n")]


def test_lines_of_one_recording_become_dialogues(talk, dialogues):
    """Each one is cut once from the recording, with its pauses; every line is used once, alone or in a dialogue."""
    out, found = dialogues
    spoken = {text: (start, end, name) for start, end, name, text in TALK}
    assert len(found) >= 2
    used = []
    for record in found:
        turns = said(record["messages"][-2]["content"])
        lines = [text for *_, text in TALK if any(text in turn for _, turn in turns)]
        assert " ".join(turn for _, turn in turns) == " ".join(lines)
        times = [spoken[text] for text in lines]
        clip = record["messages"][-1]["content"]
        assert (out / clip["audio_url"]).resolve() == talk / "talk.wav"
        assert (clip["offset"], clip["duration"]) == (times[0][0], pytest.approx(times[-1][1] - times[0][0]))
        numbers = {name: f"[SPEAKER{n}]" for n, name in enumerate(dict.fromkeys(name for *_, name in times))}
        names = [name for *_, name in times]
        switches = [i for i in range(1, len(names)) if names[i] != names[i - 1]]
        assert [tag for tag, _ in turns] == [numbers[names[i]] for i in [0, *switches]]
        assert record["misc"]["speaker_changes_sec"] == [pytest.approx(times[i][0] - times[0][0]) for i in switches]
        assert record["speaker"] == names[0] and all(b[0] - a[1] < 0.2 for a, b in itertools.pairwise(times))
        # every speaker has a reference, which is no line of the dialogue
        exchanges = record["messages"][:-2]
        assert [turn["content"].split(" ", 1)[0] for turn in exchanges[::2]] == list(numbers.values())
        for turn, name in zip(exchanges[::2], numbers):
            reference = turn["content"].split(" ", 1)[1]
            assert spoken[reference][2] == name and reference not in lines
        used += lines
    alone = [record for record in read_lines(out / "train.jsonl") if "speaker_changes_sec" not in record.get("misc", {})]
    used += [record["messages"][-2]["content"] for record in alone]
    assert sorted(used) == sorted(spoken)
    assert {"Nobody answers this.", "Nor this."} <= {record["messages"][-2]["content"] for record in alone}


@pytest.mark.parametrize("form", ["subtitles", "a table"])
def test_other_diarised_forms_give_the_same_dialogues(form, dialogues, tmp_path):
    if form == "subtitles":
        cues = [f"00:{start:06.3f} --> 00:{end:06.3f}\n<v {name}>{text}\n" for start, end, name, text in TALK]
        (tmp_path / "talk.vtt").write_text("WEBVTT\n\n" + "\n".join(cues))
        dataset = tmp_path / "talk.vtt"
    else:
        dataset = write_table(tmp_path / "talk.csv", "talk.wav")
    soundfile.write(tmp_path / "talk.wav", 0.1 * np.sin(np.arange(32 * RATE) / 9).reshape(-1, 2), RATE)
    _, found = pair_talk(dataset)
    for mine, theirs in zip(found, dialogues[1]):
        assert [turn["content"] for turn in mine["messages"][::2]] == [turn["content"] for turn in theirs["messages"][::2]]
        assert mine["misc"]["speaker_changes_sec"] == theirs["misc"]["speaker_changes_sec"]
        for ours, other in zip(mine["messages"][1::2], theirs["messages"][1::2]):
            assert [ours["content"][key] for key in ("offset", "duration")] == [
                pytest.approx(other["content"][key]) for key in ("offset", "duration")
            ]
    assert len(found) == len(dialogues[1])


def test_a_call_with_a_speaker_in_each_channel(tmp_path, capsys):
    """Straight from the call, or from what convert made of it: channels are speakers, each turn is heard from its own channel,
    and a pause from that of the turn before."""
    channels = np.stack([np.full(16 * RATE, 0.25), np.full(16 * RATE, -0.5)], 1)
    soundfile.write(tmp_path / "call.wav", channels, RATE)
    sides = ["left" if name == "SPEAKER_00" else "right" for *_, name, _ in TALK]
    rows = [f"call.wav,{start},{end},{side},{text}" for (start, end, _, text), side in zip(TALK, sides)]
    (tmp_path / "call.csv").write_text("\n".join(["audio,start,end,channel,text", *rows]))
    assert prepare(["convert", str(tmp_path / "call.csv"), str(tmp_path / "lines.jsonl")]) == 0
    lines = {text: (start, side) for (start, _, _, text), side in zip(TALK, sides)}
    pairs = [pair_talk(tmp_path / name) for name in ("call.csv", "lines.jsonl")]
    assert len(pairs[0][1]) == len(pairs[1][1]) >= 2
    for (out, found), (_, again) in zip(pairs, pairs[::-1]):
        for record, other in zip(found, again):
            assert record["messages"][-2] == other["messages"][-2] and record["misc"] == other["misc"]
            samples, rate = soundfile.read(out / record["messages"][-1]["content"]["audio_url"])
            texts = [text for text in lines if text in record["messages"][-2]["content"]]
            begin, sides = lines[texts[0]][0], [lines[text][1] for text in texts]
            switches = [lines[b][0] - begin for a, b in itertools.pairwise(texts) if lines[a][1] != lines[b][1]]
            assert record["misc"]["speaker_changes_sec"] == pytest.approx(switches) and len(switches) >= 1
            for text, side in zip(texts, sides):
                at = round((lines[text][0] - begin) * rate)
                heard = samples[at + 50 : at + round(0.48 * rate)]  # a line and the pause after it
                assert heard == pytest.approx(np.full(len(heard), {"left": 0.25, "right": -0.5}[side]), abs=1e-3)
            assert len(samples) == pytest.approx((lines[texts[-1]][0] - begin + 0.4) * rate, abs=2)
            for turn in record["messages"][1:-2:2]:
                assert "-channel" in turn["content"]["audio_url"]


def test_diarised_names_hold_in_one_recording(tmp_path):
    """SPEAKER_00 of one call is not SPEAKER_00 of another."""
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", np.full((8, 50), number, np.int16))
    clips = [{"type": "audio", "audio_url": f"{i % 2}.npy", "offset": 0.5 * (i // 2), "duration": 0.4} for i in range(4)]
    records = [line(f"text {i}", clip, speaker="SPEAKER_00") for i, clip in enumerate(clips)]
    assert prepare(["pair", str(write_manifest(tmp_path / "m.jsonl", records)), str(tmp_path / "out"), "--ref_drop", "0"]) == 0
    for record in read_manifest(tmp_path / "out" / "train.jsonl"):
        reference, target = record.audio
        assert reference.path == target.path and record.chatml.speaker == "SPEAKER_00"


def test_a_dialogue_is_asked_for_with_the_tokens_it_trained_on(dialogues, config, tokenizer, tmp_path):
    record = dialogues[1][0]
    exchanges = record["messages"][:-2]
    for turn in exchanges[1::2]:  # the codes of each clip are the same in both prompts
        assert turn["content"]["type"] == "audio"
    asked = {
        "text": record["messages"][-2]["content"],
        "ref_text": [turn["content"].split(" ", 1)[1] for turn in exchanges[::2]],
    }
    clip, count = np.zeros((8, 5), np.int16), len(exchanges) // 2
    np.save(tmp_path / "clip.npy", clip)
    for turn in record["messages"][1::2]:
        turn["content"] = {"type": "audio", "audio_url": "clip.npy"}
    store = AudioStore(config.audio_num_codebooks, config.audio_codebook_size, 25.0, tmp_path / "codes")
    trained = ChatMLDataset(read_manifest(write_manifest(tmp_path / "one.jsonl", [record])), tokenizer, store)[0]
    request = line_of_request(asked | {"ref_audio": ["clip.npy"] * count}, "0", tmp_path, "line 0", Chunking())
    prompt = as_prompt(ChatMLDataset([request.record([], request.chunks[0])], tokenizer, store)[0], tokenizer)
    assert torch.equal(trained.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    assert (
        tokenizer.decode(trained.input_ids[len(prompt.input_ids) :]) == "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
    )


def test_lines_of_given_speakers_are_joined(tmp_path):
    """Codes one after the other; waveforms too, at the higher rate. Lines of other speakers stay alone."""
    for number in range(12):
        np.save(tmp_path / f"{number}.npy", np.full((8, 10 + number), number, np.int16))
        rate = (RATE, 24000)[number % 2]
        soundfile.write(tmp_path / f"{number}.wav", np.full(rate // 2, 0.01 * number), rate)
    for suffix in ("npy", "wav"):
        names = ("anna", "ben", "cleo", "dora")
        records = [line(f"text {i}.", f"{i}.{suffix}", speaker=names[i % 4]) for i in range(12)]
        manifest, out = str(write_manifest(tmp_path / f"{suffix}.jsonl", records)), tmp_path / suffix
        options = ["--dialogues", "0.5", "--dialogue_speakers", "anna,ben,cleo", "--val_share", "0"]
        assert prepare(["pair", manifest, str(out), *options]) == 0
        found = [record for record in read_lines(out / "train.jsonl") if "misc" in record]
        assert 2 <= len(found) <= 3
        for record in found:
            numbers = [int(turn.split()[1][:-1]) for _, turn in said(record["messages"][-2]["content"])]
            assert len(numbers) in (2, 3) and 3 not in {number % 4 for number in numbers}
            path = out / record["messages"][-1]["content"]["audio_url"]
            if suffix == "npy":
                lengths = [10 + number for number in numbers]
                assert np.load(path)[0].tolist() == [number for number in numbers for _ in range(10 + number)]
                assert record["misc"]["speaker_changes_sec"] == [sum(lengths[:n]) / 25 for n in range(1, len(numbers))]
            else:
                samples, rate = soundfile.read(path)
                assert rate == max((RATE, 24000)[number % 2] for number in numbers)
                assert [samples[int((n + 0.5) * rate / 2)] for n in range(len(numbers))] == pytest.approx(
                    [0.01 * number for number in numbers], abs=2e-4
                )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dialogues", "0.5", "--dialogue_speakers", "anna,cleo"], "nothing to join"),  # cleo's lines have a system turn
        (["--dialogues", "0.5"], "nothing to join. Lines need speakers, and times in one recording"),
        (["--dialogues", "2"], "--dialogues too"),
        (["--dialogues", "0.5", "--dialogue_speakers", "anna,zoe"], "--dialogue_speakers anna,zoe: no line of zoe"),
        (["--dialogues", "0.5", "--dialogue_speakers", "anna"], "name two or more"),
        (["--dialogue_speakers", "anna,ben"], "and a share with --dialogues"),
    ],
)
def test_impossible_dialogues(options, message, tmp_path, capsys):
    for number in range(9):
        np.save(tmp_path / f"{number}.npy", np.full((8, 5), number, np.int16))
    records = [line(f"x {i}", f"{i}.npy", speaker=("anna", "ben", "cleo")[i % 3]) for i in range(9)]
    for record in records[2::3]:
        record["messages"].insert(0, {"role": "system", "content": "Speak slowly."})
    assert prepare(["pair", str(write_manifest(tmp_path / "m.jsonl", records)), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out" / "train.jsonl").exists()


# ---- the accuracy around a change of speaker


def test_codes_around_a_change_are_those_within_two_frames(config, tokenizer):
    """Cell by cell, and the same on the packed path and on upstream's padded one."""
    turns = [("user", "[SPEAKER0] a\n[SPEAKER1] b"), ("assistant", 9)]
    samples = [make_sample(tokenizer, *turns, seed=seed) for seed in range(3)]
    samples[0].changes, samples[2].changes = [4], [1, 8]
    batch = create_collator(config)(samples)
    K, T = 8, 9
    expected = torch.zeros_like(batch.near_changes)
    for clip, frames in ((0, {2, 3, 4, 5}), (2, {0, 1, 2, 6, 7, 8})):
        for k in range(K):
            for frame in frames:
                expected[k, clip * (T + K + 1) + 1 + frame + k] = True
    trained = batch.label_audio_ids != loss.IGNORE_INDEX
    is_eos = batch.label_audio_ids == config.audio_stream_eos_id
    assert torch.equal(batch.near_changes & trained & ~is_eos, expected)

    model = model_patch.patch_for_training(make_model(config))
    labels = loss.LabelSpec.of(config)
    with torch.no_grad():
        (packed, _), padded = train.forward(model, batch, labels), loss.dense_sums(model(**batch.model_inputs()), batch, labels)
    found = [loss.Objective().metrics(sums) for sums in (packed.losses, padded)]
    for name in ("speaker_change_loss", "speaker_change_accuracy"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)
    near = batch.near_changes & trained
    assert packed.losses.speaker_change.targets == near.sum()
    batch = create_collator(config)(samples[1:2])
    assert batch.near_changes is None
    with torch.no_grad():
        alone = train.forward(model, batch, labels)[0].losses
    assert loss.Objective().metrics(alone)["speaker_change_accuracy"] is None


def test_dialogues_train_and_are_evaluated(toys, tmp_path):
    """As a user would: the folder that pair wrote, two steps; the change of speaker is a figure of both splits."""
    np.save(tmp_path / "talk.npy", RNG.integers(0, 64, (8, 16 * 25)).astype(np.int16))
    lines = pair_talk(write_table(tmp_path / "talk.csv", "talk.npy"))[0] / "train.jsonl"
    flags = {"train_manifest": lines, "val_manifest": lines, "base_ckpt": toys / "checkpoint"}
    flags |= {"output_dir": tmp_path / "out", "audio_tokenizer": "none", "batch_size": 8}
    flags |= {"max_steps": 2, "mixed_precision": "no", "device": "cpu", "num_workers": 0}
    assert train.main(to_argv(flags)) == 0
    written = [json.loads(text) for text in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {line["split"] for line in written if line.get("speaker_change_loss", 0) > 0} == {"train", "val"}


def test_seconds_of_changes_are_checked(toys, capsys):
    record = read_lines(toys / "train.jsonl")[0] | {"misc": {"speaker_changes_sec": "1.5"}}
    assert prepare(["check", str(write_manifest(toys / "changes.jsonl", [record]))]) != 0
    assert 'misc.speaker_changes_sec: expected a list of seconds, found "1.5"' in capsys.readouterr().out
