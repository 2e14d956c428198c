"""data.py: manifests read as upstream reads them, mistakes named, every sample used once."""

from __future__ import annotations

import base64
import io
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from conftest import open_dataset, write_manifest
from safetensors.numpy import save_file

import data
from collate import create_collator
from common import DataError
from data import Batching, Position, epoch_order
from prepare.audio import read_waveform
from prepare.manifest import AudioPart, check, parse_record, read_manifest


@pytest.fixture()
def folder(tmp_path):
    codes = np.random.default_rng(0).integers(0, 64, (8, 50)).astype(np.int16)
    np.save(tmp_path / "a.npy", codes)
    save_file({"codes": codes[:, :30]}, tmp_path / "b.safetensors")
    return tmp_path


def clip(url="a.npy", **extra):
    return {"type": "audio", "audio_url": url, **extra}


def clone(**extra):
    return {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "A scene: "}, clip("b.safetensors"), "."]},
            {"role": "user", "content": "the reference"},
            {"role": "assistant", "content": clip("b.safetensors")},
            {"role": "user", "content": {"type": "text", "text": "the new text"}},
            {"role": "assistant", "content": ["Here it is: ", clip()]},
        ],
        **extra,
    }


@pytest.mark.parametrize(
    "extra", [{}, {"start_index": 3}, {"start_index": 3, "speaker": "x", "misc": {"a": 1}}, {"start_index": float("nan")}]
)
def test_ids_are_the_official_ones(extra, folder, config, tokenizer):
    """Bit for bit what upstream makes of the same JSON, given as a dictionary."""
    record = clone(**extra)
    dataset = open_dataset(write_manifest(folder / "m.jsonl", [record]), config, tokenizer)
    sample = dataset[0]
    input_ids, label_ids, audio, _ = prepare_chatml_sample(json.loads(json.dumps(record)), tokenizer)
    assert sample.input_ids.tolist() == input_ids and sample.label_ids.tolist() == label_ids
    assert len(audio) == len(sample.audio_ids_start) == 3
    assert sample.audio_ids_start.tolist() == [0, 30, 60] and sample.audio_ids_concat.shape == (8, 110)
    assert dataset[0].label_ids.tolist() == label_ids, "a second reading differs"


def test_json_list_and_jsonl_are_the_same(folder, config, tokenizer):
    records = [clone(), clone(start_index=3)]
    (folder / "list.json").write_text(json.dumps(records, indent=2))
    lines = open_dataset(write_manifest(folder / "lines.jsonl", records), config, tokenizer)
    listed = open_dataset(folder / "list.json", config, tokenizer)
    assert len(listed) == len(lines) == 2
    assert torch.equal(listed[1].label_ids, lines[1].label_ids)


def test_start_index_masks_text_and_audio(folder, config, tokenizer):
    whole, masked = open_dataset(write_manifest(folder / "m.jsonl", [clone(), clone(start_index=3)]), config, tokenizer)
    audio_out = whole.input_ids == config.audio_out_token_idx
    assert (whole.label_ids[audio_out] >= 0).tolist() == [True, True]
    assert (masked.label_ids[audio_out] >= 0).tolist() == [False, True]
    supervised = masked.label_ids >= 0
    assert tokenizer.decode(masked.input_ids[supervised]) == "Here it is: <|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
    batch = create_collator(config)([masked])
    assert batch.num_targets()[1].tolist() == [51] * 8


def test_offset_and_duration_of_codes(folder, config, tokenizer):
    record = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": clip(offset=0.4, duration=1.0)}]}
    sample = open_dataset(write_manifest(folder / "m.jsonl", [record]), config, tokenizer)[0]
    assert torch.equal(sample.audio_ids_concat, torch.from_numpy(np.load(folder / "a.npy")[:, 10:35].astype(np.int64)))


def test_label_audio(folder, config, tokenizer):
    np.save(folder / "label.npy", (np.load(folder / "a.npy") + 1) % 64)
    record = clone()
    record["messages"][-1]["content"][1]["audio_label_url"] = "label.npy"
    sample = open_dataset(write_manifest(folder / "m.jsonl", [record]), config, tokenizer)[0]
    assert torch.equal(sample.audio_label_ids_concat[:, :60], sample.audio_ids_concat[:, :60])
    assert torch.equal(sample.audio_label_ids_concat[:, 60:], (sample.audio_ids_concat[:, 60:] + 1) % 64)
    record["messages"][-1]["content"][1]["audio_label_url"] = "b.safetensors"
    dataset = open_dataset(write_manifest(folder / "m.jsonl", [record]), config, tokenizer)
    with pytest.raises(DataError, match="30 frames, audio_url 50"):
        dataset[0]


# ---- mistakes


def broken(path, value):
    """A clone record with the value at a path of keys replaced, or removed with the value `...`."""
    record = clone()
    target = record
    for key in path[:-1]:
        target = target[key]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("just text", "expected an object with `messages`"),
        (broken(["messages"], ...), r"messages: expected a non-empty list of turns, found keys \[\]"),
        (broken(["messages"], []), "messages: expected a non-empty list"),
        (broken(["messages", 1, "role"], "narrator"), r'messages\[1\]\.role: "narrator" is not one of system, user, assistant'),
        (broken(["messages", 1, "role"], ...), r"messages\[1\]\.role: null"),
        (broken(["messages", 1], 3), r"messages\[1\]: expected an object"),
        (broken(["messages", 1, "content"], None), r"messages\[1\]\.content: expected text"),
        (broken(["messages", 4, "content", 1], {"type": "video"}), r"messages\[4\]\.content\[1\]: expected text"),
        (
            broken(["messages", 4, "content", 1], clip("no.wav")),
            r"messages\[4\]\.content\[1\]\.audio_url: audio file .*no\.wav does not exist",
        ),
        (broken(["messages", 4, "content", 1], clip(7)), r"audio_url: expected a path, found 7"),
        (broken(["messages", 4, "content", 1], clip(offset=-1)), r"offset: expected seconds, found -1"),
        (broken(["messages", 4, "content", 1], clip(raw_audio="%%")), "raw_audio: not base64"),
        (broken(["messages", 0, "content", 1], clip(audio_label_url="a.npy")), "only an assistant turn has label audio"),
        (clone(start_index=5), "start_index: 5 leaves no turn to train"),
        (clone(start_index="3"), "start_index: expected a whole number"),
        (clone(speaker=3), "speaker: expected text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages: no assistant turn from start_index on"),
        (
            {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}], "start_index": 1},
            "no assistant turn",
        ),
        (clone(extra=3), r"unknown keys \['extra'\]"),
    ],
)
def test_mistakes_name_record_and_field(record, message, folder):
    manifest = write_manifest(folder / "m.jsonl", [clone(), record])
    with pytest.raises(DataError, match=r"m\.jsonl record 1 \(line 2\): .*" + message):
        check(read_manifest(manifest))


def test_mistakes_of_the_file(folder):
    with pytest.raises(DataError, match=r"none\.jsonl: no such manifest"):
        read_manifest(folder / "none.jsonl")
    (folder / "m.jsonl").write_text(json.dumps(clone()) + '\n\n{"messages": [}\n')
    with pytest.raises(DataError, match=r"m\.jsonl line 3: broken JSON .* column 15"):
        check(read_manifest(folder / "m.jsonl"))
    (folder / "m.json").write_text('[\n{"messages": []},\n{"messages" []}\n]')
    with pytest.raises(DataError, match=r"m\.json line 3: broken JSON"):
        check(read_manifest(folder / "m.json"))
    separator = {"messages": [{"role": "assistant", "content": "one\u2028line \x85 still"}]}
    (folder / "m.jsonl").write_text(json.dumps(separator, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert len(check(read_manifest(folder / "m.jsonl"))[0]) == 1
    (folder / "m.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        check(read_manifest(folder / "m.jsonl"))
    (folder / "m.jsonl").write_bytes(b"\xff\xfe{\x00")
    with pytest.raises(DataError, match="UTF-8"):
        check(read_manifest(folder / "m.jsonl"))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((7, 5), np.int16), r"int16 \[7, 5\]; expected an integer array \[8 codebooks, frames\]"),
        (np.zeros((8, 5), np.float32), r"float32 \[8, 5\]"),
        (np.zeros((8, 0), np.int16), r"int16 \[8, 0\]"),
        (np.full((8, 5), 64, np.int16), "codes 64 to 64; .* 0 to 63"),
        (np.full((8, 5), -1, np.int16), "codes -1 to -1"),
        (np.array([{}], dtype=object), "cannot be read as codes"),
    ],
)
def test_wrong_codes(codes, message, folder, config, tokenizer):
    np.save(folder / "a.npy", codes, allow_pickle=True)
    dataset = open_dataset(write_manifest(folder / "m.jsonl", [clone()]), config, tokenizer)
    with pytest.raises(DataError, match=rf"record 0 .*messages\[4\]\.content\[1\]: .*a\.npy.*{message}"):
        dataset[0]


def test_a_damaged_codes_file(folder, config, tokenizer):
    (folder / "b.safetensors").write_bytes(b"not safetensors")
    dataset = open_dataset(write_manifest(folder / "m.jsonl", [clone()]), config, tokenizer)
    with pytest.raises(DataError, match=r"b\.safetensors cannot be read as codes"):
        dataset[0]


def test_waveforms(folder):
    rng = np.random.default_rng(0)
    stereo = rng.uniform(-0.5, 0.5, (3200, 2)).astype(np.float32)
    soundfile.write(folder / "a.wav", stereo, 16000, subtype="FLOAT")
    part = AudioPart(folder / "a.wav", 0.05, 0.1, True, "here")
    samples, rate = read_waveform(part, "record 0")
    assert rate == 16000 and np.allclose(samples, stereo[800:2400].mean(axis=1))
    raw = io.BytesIO()
    soundfile.write(raw, stereo, 16000, format="WAV", subtype="FLOAT")
    encoded = base64.b64encode(raw.getvalue()).decode()
    record = {"messages": [{"role": "assistant", "content": {"type": "audio", "raw_audio": encoded}}]}
    (part,) = parse_record(record, folder, "record 0").audio
    assert len(read_waveform(part, "record 0")[0]) == 3200
    (folder / "b.wav").write_text("this is text")
    with pytest.raises(DataError, match=r"b\.wav is not readable audio"):
        read_waveform(AudioPart(folder / "b.wav", None, None, True, "here"), "record 0")
    with pytest.raises(DataError, match="no audio left"):
        read_waveform(AudioPart(folder / "a.wav", 9.0, None, True, "here"), "record 0")


# ---- loader


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_samples", [1, 7, 24, 25])
def test_every_sample_once_and_equal_ranks(world_size, num_samples):
    order = epoch_order([num_samples], [1], seed=3, epoch=0)
    bounds = Batching(2).bounds(order)
    steps = list(data.plan_steps(order, bounds, world_size, grad_accum=2))
    used = [index for step in steps for micro_batch in step for index in micro_batch]
    assert used == order.tolist() and sorted(used) == list(range(num_samples))
    assert all(len(step) % world_size == 0 for step in steps)
    assert sum(not micro_batch for step in steps for micro_batch in step) < world_size


def test_order_is_a_function_of_seed_and_epoch():
    orders = [tuple(epoch_order([50], [1], seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert epoch_order([50], [1], 1, 1).tolist() == list(orders[3])
    assert epoch_order([5], [1], 0, 0, shuffle=False).tolist() == [0, 1, 2, 3, 4]


@pytest.fixture()
def toy_loader(toys, config, tokenizer):
    dataset = open_dataset(toys / "train.jsonl", config, tokenizer)
    shutil.rmtree(toys / "codes", ignore_errors=True)

    def make(**kwargs):
        settings = {"grad_accum": 2, "seed": 5} | kwargs
        batching = Batching(settings.pop("batch_size", 3))
        return data.Loader(dataset, create_collator(config), batching, **settings)

    return make


def seen(steps):
    return [[batch.sources for batch in batches] for batches, _ in steps]


def test_workers_change_nothing_and_survive_epochs(toy_loader):
    plain, workers = toy_loader(), toy_loader(num_workers=2)
    for epoch in (0, 1):
        expected = list(plain.epoch(Position(epoch, 0)))
        found = list(workers.epoch(Position(epoch, 0)))
        assert seen(found) == seen(expected) and len(found) == plain.num_steps(Position(0, 0), 1)
        for (a, _), (b, _) in zip(found, expected):
            assert all(torch.equal(x.audio_out_ids, y.audio_out_ids) for x, y in zip(a, b))


def test_position_resumes_also_at_another_world_size(toy_loader):
    loader = toy_loader()
    steps = list(loader.epoch(Position(0, 0)))
    position = steps[1][1]
    assert seen(loader.epoch(position)) == seen(steps[2:])
    halves = [list(toy_loader(rank=rank, world_size=2, grad_accum=1).epoch(position)) for rank in (0, 1)]
    together = [[a[0][0].sources, b[0][0].sources] for a, b in zip(*halves)]
    flat = [sources for step in together for sources in step]
    expected = [sources for step in seen(steps[2:]) for sources in step]
    assert flat[: len(expected)] == expected
    assert len(flat) - len(expected) <= 1, "at most one micro-batch of padding"


def test_fillers_are_not_trained(toy_loader):
    loader = toy_loader(batch_size=4, rank=2, world_size=3, grad_accum=1)
    *_, (batches, position) = loader.epoch(Position(0, 0))
    text, audio = batches[0].num_targets()
    assert position.samples_done == loader.num_samples
    assert loader.num_samples % 12 <= 8 and text == 0 and audio.sum() == 0 and len(batches[0]) == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_sample_is_left_out_and_named(num_workers, folder, config, tokenizer):
    """Its micro-batch goes on with the others; one that has no other sample becomes a filler without targets."""
    np.save(folder / "bad.npy", np.full((8, 5), 99))
    bad = clone()
    bad["messages"][2]["content"]["audio_url"] = "bad.npy"
    dataset = open_dataset(write_manifest(folder / "m.jsonl", [clone(), bad, bad]), config, tokenizer)
    loader = data.Loader(dataset, create_collator(config), Batching(2), num_workers=num_workers, shuffle=False)
    ((mixed,), half), ((empty,), end) = loader.epoch(Position(0, 0))
    assert (half.samples_done, end.samples_done) == (2, 3)
    assert len(mixed.sources) == 1 and "record 0 " in mixed.sources[0]
    for batch, record in ((mixed, 1), (empty, 2)):
        (problem,) = batch.unreadable
        assert f"record {record} " in problem and "bad.npy holds codes 99 to 99" in problem and "\n" not in problem
    assert mixed.num_targets()[0] > 0 and mixed.num_targets()[1].sum() > 0
    assert empty.num_targets()[0] == 0 and empty.num_targets()[1].sum() == 0 and len(empty) == 1


def test_special_tokens_in_text_are_an_error(folder, config, tokenizer):
    record = clone()
    record["messages"][1]["content"] = "say <|AUDIO_OUT|> aloud"
    dataset = open_dataset(write_manifest(folder / "m.jsonl", [record]), config, tokenizer)
    loader = data.Loader(dataset, create_collator(config), Batching(1))
    with pytest.raises(DataError, match=r"record 0 .*4 audio placeholders but 3 clip.*literally"):
        next(loader.epoch(Position(0, 0)))
