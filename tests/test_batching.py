"""data.py: token budgets without waste, long samples, mixtures of manifests, manifests too large to be read at once."""

from __future__ import annotations

import json
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from conftest import make_model, open_dataset, write_manifest

import data
import model_patch
import train
from collate import create_collator
from common import DataError
from data import Batching, Position, epoch_order
from prepare import forms
from prepare.manifest import check, read_manifest, split_weights


def long_tailed_lengths(num_samples: int, seed: int = 0) -> np.ndarray:
    """Positions of clones whose target lasts 1 to 60 s, most of them short: 25 frames and about 4 tokens per second."""
    seconds = np.clip(np.random.default_rng(seed).lognormal(1.8, 0.8, num_samples), 1, 60)
    return (40 + 29 * seconds).astype(np.int32)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_sample_once_in_micro_batches_of_the_budget(world_size):
    lengths = long_tailed_lengths(1000)
    order = epoch_order([1000], [1], 0, 0)
    bounds = Batching(max_tokens=4096, lengths=lengths).bounds(order)
    steps = list(data.plan_steps(order, bounds, world_size, grad_accum=2))
    used = [i for step in steps for micro_batch in step for i in micro_batch if i >= 0]
    assert used == order.tolist() and sorted(used) == list(range(1000))
    assert all(len(step) % world_size == 0 for step in steps)
    for a, b in pairwise(bounds):
        assert lengths[order[a:b]].sum() <= 4096 or b == a + 1


def test_a_token_budget_is_filled_alike():
    """1,000 clones of 1 to 60 s: micro-batches are 96 % full, and the fullest of 8 ranks' holds 1.03 times their mean on
    average. In batches of 8 samples it holds 1.5 times the mean."""
    lengths, order = long_tailed_lengths(1000), epoch_order([1000], [1], 0, 0)

    def costs(batching: Batching) -> np.ndarray:
        bounds = batching.bounds(order)
        sums = np.array([lengths[order[a:b]].sum() for a, b in pairwise(bounds)])
        return sums[: len(sums) // 8 * 8].reshape(-1, 8)

    by_tokens, by_number = costs(Batching(max_tokens=8192, lengths=lengths)), costs(Batching(8))
    assert by_tokens.mean() > 0.93 * 8192
    assert (by_tokens.max(1) / by_tokens.mean(1)).mean() < 1.1 < (by_number.max(1) / by_number.mean(1)).mean()


def test_epochs_differ_and_repeat():
    orders = [epoch_order([200], [1], seed, epoch).tolist() for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    assert orders[0] == orders[3] and len(set(map(tuple, orders))) == 3


@pytest.fixture()
def toy_dataset(toys, config, tokenizer):
    return open_dataset(toys / "train.jsonl", config, tokenizer)


def test_lengths_are_the_model_s(toy_dataset, config):
    """What a record takes is known without the model, to the position."""
    collator = create_collator(config)
    lengths, problems = data.measure_lengths(toy_dataset, collator)
    assert not problems
    model = model_patch.patch_for_training(make_model(config))
    for index in range(0, len(toy_dataset), 5):
        batch = collator([toy_dataset[index]])
        with torch.no_grad():
            mask = model(**batch.model_inputs()).attention_mask
        assert lengths[index] == mask.sum()


def test_ranks_and_workers_share_the_measuring(toy_dataset, config):
    collator = create_collator(config)
    alone, _ = data.measure_lengths(toy_dataset, collator)
    parts = [data.measure_lengths(toy_dataset, collator, rank, 3, num_workers=rank)[0] for rank in range(3)]
    assert (sum(parts) == alone).all() and (alone > 0).all()
    assert all(((part > 0) | (alone != part)).all() for part in parts)


def test_loader_with_a_budget_resumes_at_any_step(toy_dataset, config):
    collator = create_collator(config)
    lengths, _ = data.measure_lengths(toy_dataset, collator)
    batching = Batching(max_tokens=3 * int(lengths.max()), lengths=lengths)

    def run(position, **kwargs):
        loader = data.Loader(toy_dataset, collator, batching, seed=3, **kwargs)
        return list(loader.epoch(position))

    whole = run(Position(0, 0))
    names = [batch.sources for (batch,), _ in whole]
    assert sorted(chain(*names)) == sorted(record.source for record in toy_dataset.records)
    for done in (1, len(whole) - 1):
        rest = run(whole[done - 1][1])
        assert [batch.sources for (batch,), _ in rest] == names[done:]
    halves = [run(whole[0][1], rank=rank, world_size=2) for rank in (0, 1)]
    together = [part[0][0].sources for pair in zip(*halves) for part in pair]
    assert together[: len(names) - 1] == names[1:]
    if len(names[0]) > 1:
        with pytest.raises(DataError, match="--max_tokens must not change"):
            run(Position(0, 1))


# ---- long samples


def dialogue(num_exchanges: int, **extra) -> dict:
    exchange = [
        {"role": "user", "content": "say it"},
        {"role": "assistant", "content": {"type": "audio", "audio_url": "a.npy"}},
    ]
    return {"messages": exchange * num_exchanges, **extra}


@pytest.fixture()
def long_dataset(tmp_path, config, tokenizer):
    np.save(tmp_path / "a.npy", np.zeros((8, 50), np.int16))
    records = [dialogue(1), dialogue(4), dialogue(4, start_index=7), dialogue(2)]
    return open_dataset(write_manifest(tmp_path / "m.jsonl", records), config, tokenizer)


def fit(dataset, config, exchanges: float, long: str):
    """Fit to a budget of so many exchanges."""
    collator = create_collator(config)
    lengths, _ = data.measure_lengths(dataset, collator)
    return data.fit_lengths(dataset, collator, lengths, int(exchanges * lengths[0]), long)


def test_long_samples_are_an_error(long_dataset, config):
    with pytest.raises(
        DataError, match=r"2 records are longer than --max_tokens \d+.*--long skip.*\n.*record 1 .*\n.*record 2 "
    ):
        fit(long_dataset, config, 3, "error")


def test_long_samples_are_skipped_and_listed(long_dataset, config):
    dataset, lengths, changes = fit(long_dataset, config, 3, "skip")
    assert [record.source[-16:] for record in dataset.records] == ["ecord 0 (line 1)", "ecord 3 (line 4)"]
    assert len(lengths) == 2 and len(changes) == 2 and all("left out" in change for change in changes)
    with pytest.raises(DataError, match="every record is longer"):
        fit(long_dataset, config, 0.5, "skip")


def test_long_samples_are_cropped_to_whole_turns(long_dataset, config):
    """The record whose only trained turn is the last one cannot be cropped."""
    dataset, lengths, changes = fit(long_dataset, config, 2.5, "crop")
    assert len(dataset) == 3 and dataset.num_turns == {1: 4}
    assert "cropped to its first 4 turns" in changes[0] and "left out" in changes[1]
    cropped, plain = dataset[1], dataset[2]
    assert torch.equal(cropped.input_ids, plain.input_ids) and torch.equal(cropped.label_ids, plain.label_ids)
    assert torch.equal(cropped.audio_ids_concat, plain.audio_ids_concat)
    assert lengths[1] == lengths[2]


# ---- mixtures


def test_weights_of_a_mixture(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b,c:d.jsonl"
    for path in (a, b):
        path.write_text("{}\n")
    assert split_weights(str(b)) == [(str(b), 1.0)], "a file of that name"
    assert split_weights(f"{a}:2, {a}:0.5,{a}") == [(str(a), 2.0), (str(a), 0.5), (str(a), 1.0)]
    with pytest.raises(DataError, match="'x' is not a weight"):
        split_weights(f"{a}:x")
    with pytest.raises(DataError, match="above 0"):
        split_weights(f"{a}:0")


def test_an_epoch_of_a_mixture_uses_records_by_weight():
    sizes, weights = [10, 40, 5], [2, 0.5, 1]
    epochs = [epoch_order(sizes, weights, 0, epoch) for epoch in range(4)]
    for order in epochs:
        counts = np.bincount(order, minlength=55)
        assert (counts[:10] == 2).all() and (counts[50:] == 1).all() and counts[10:50].sum() == 20
    counts = np.bincount(np.concatenate(epochs[:2]), minlength=55)
    assert (counts[10:50] == 1).all(), "two halves are one pass"
    assert not np.array_equal(epochs[0], epochs[1])


def test_text_only_replay_among_audio(toys, tmp_path, config, tokenizer):
    """Batches of any composition, in a mixture that resumes."""
    text = {"messages": [{"role": "user", "content": "one and one"}, {"role": "assistant", "content": "two"}]}
    write_manifest(tmp_path / "text.jsonl", [text] * 5)
    records, *_ = data.open_records(f"{toys / 'train.jsonl'},{tmp_path / 'text.jsonl'}:2")
    assert len(records) == len(read_manifest(toys / "train.jsonl")) + 5
    assert records[len(records) - 1].source.startswith(str(tmp_path / "text.jsonl"))
    store = open_dataset(toys / "train.jsonl", config, tokenizer).store
    dataset = data.ChatMLDataset(records, tokenizer, store)
    loader = data.Loader(dataset, create_collator(config), Batching(4))
    steps = list(loader.epoch(Position(0, 0)))
    used = [source for (batch,), _ in steps for source in batch.sources]
    assert len(used) == loader.num_samples == len(records) + 5
    assert sum(source.startswith(str(tmp_path)) for source in used) == 10
    rest = [batch.sources for (batch,), _ in loader.epoch(steps[2][1])]
    assert rest == [batch.sources for (batch,), _ in steps[3:]]


def test_held_out_records_are_a_part_of_each(toys):
    records, *_ = data.open_records(f"{toys / 'train.jsonl'}:3")
    rest, held = data.hold_out(records, 0.3, seed=0)
    names = [{record.source for record in part} for part in (rest, held, records)]
    assert names[0] | names[1] == names[2] and not names[0] & names[1]
    assert len(held) == round(0.3 * len(records)) and rest.weights == [3.0]


# ---- large manifests


def test_an_index_reads_single_records(tmp_path):
    """Blank lines and missing line ends at every place, and characters that are line ends elsewhere."""
    record = json.dumps(dialogue(1) | {"misc": {"text": "\u2028 \x85"}}, ensure_ascii=False)
    np.save(tmp_path / "a.npy", np.zeros((8, 50), np.int16))
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(["", record, "   ", "\r", record + "\r", record]).encode())
    opened = read_manifest(path)
    assert [record.source for record in opened] == [f"{path} record {i} (line {n})" for i, n in enumerate([2, 5, 6])]
    assert opened.subset(np.array([2]))[0].source == f"{path} record 2 (line 6)"
    with pytest.raises(IndexError):
        opened[3]


def test_a_large_manifest_is_checked_as_it_is_read(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.zeros((8, 50), np.int16))
    path = write_manifest(tmp_path / "m.jsonl", [dialogue(1), {"messages": []}])
    with pytest.raises(DataError, match="record 1"):
        data.open_records(str(path))
    monkeypatch.setattr(forms, "CHECKED_AT_START", 1)
    records, *_ = data.open_records(str(path))
    assert len(records[0].audio) == 1
    with pytest.raises(DataError, match="record 1"):
        records[1]


def test_all_problems_are_named_at_once_and_missing_audio_can_be_skipped(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 50), np.int16))
    missing = json.loads(json.dumps(dialogue(1)).replace("a.npy", "none.npy"))
    path = write_manifest(tmp_path / "m.jsonl", [missing, dialogue(1), {"messages": 3}, missing])
    with pytest.raises(DataError, match=r"3 records cannot be used:\n.*record 0 .*\n.*record 2 .*\n.*record 3 "):
        check(read_manifest(path))
    with pytest.raises(DataError, match=r"^[^\n]*record 2 [^\n]*$"):
        check(read_manifest(path), skip_missing=True)
    path = write_manifest(tmp_path / "m.jsonl", [missing, dialogue(1)])
    kept, skipped = check(read_manifest(path), skip_missing=True)
    assert len(kept) == 1 and kept[0].source.endswith("record 1 (line 2)") and "none.npy does not exist" in skipped[0]
    path = write_manifest(tmp_path / "m.jsonl", [missing])
    with pytest.raises(DataError, match="every record is missing"):
        check(read_manifest(path), skip_missing=True)


# ---- the whole run


def test_a_run_with_a_budget_and_a_mixture(toys, tmp_path, capsys):
    """Micro-batches fill the budget, every record trains once per epoch, text twice, and lengths are measured once."""
    text = {"messages": [{"role": "user", "content": "one and one"}, {"role": "assistant", "content": "two"}]}
    write_manifest(tmp_path / "text.jsonl", [text] * 3)
    output = tmp_path / "o"
    argv = f"--train_manifest {toys / 'train.jsonl'},{tmp_path / 'text.jsonl'}:2 --base_ckpt {toys / 'checkpoint'} --max_tokens 400"
    argv += " --val_steps 0 --sample_steps 0"
    argv += f" --output_dir {output} --device cpu --num_workers 1 --epochs 2 --save_steps 3 --keep_last 0 --long skip"
    dist = train.setup_distributed("cpu")
    train.train(train.parse_config(argv.split()), dist)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    by_epoch = [[line for line in lines if line["epoch"] == epoch] for epoch in (0, 1)]
    targets = [[sum(line[name] for line in part) for name in ("text_targets", "audio_targets")] for part in by_epoch]
    assert targets[0] == targets[1]
    assert max(line["tokens"] / (1 - line["padding_ratio"]) for line in lines) <= 400.01
    assert "measuring 34 records" in capsys.readouterr().err
    train.train(train.parse_config([*argv.split(), "--resume", str(output / "checkpoints" / "step_3")]), dist)
    assert "measuring" not in capsys.readouterr().err
    again = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
