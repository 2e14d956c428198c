"""What a run does that is told nothing: it evaluates, samples and saves once per epoch, as far as it can, and says so."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_ranks
from test_train import main_error, metrics

import checkpoint
import train
from config import Config, to_argv
from prepare.__main__ import main as prepare
from prepare.manifest import share_held_out
from process import fit, lineage


def plain(toys: Path, output_dir: Path, **extra) -> list[str]:
    """As a user who asks for nothing but a tiny model on a CPU, two steps an epoch."""
    values = {"train_manifest": toys / "train.jsonl", "base_ckpt": toys / "checkpoint", "output_dir": output_dir}
    values |= {"audio_tokenizer": "none", "device": "cpu", "num_workers": 0, "mixed_precision": "no"}
    return to_argv(values | {"batch_size": 14, "epochs": 2, "num_samples": 1} | extra)


@pytest.fixture(scope="module")
def told_nothing(toys, tmp_path_factory):
    """(folder, what was printed) of two epochs; and the same, killed in the second and resumed."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(train, "log", lambda dist, message: said.append(message))
        assert train.main(plain(toys, folder / "o")) == 0
    return folder / "o", "\n".join(said)


def test_once_per_epoch(told_nothing):
    folder, said = told_nothing
    assert [(line["step"], line["epoch"]) for line in metrics(folder, "train")] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    assert [line["step"] for line in metrics(folder, "val")] == [2, 4]
    assert [line["step"] for line in metrics(folder, "sample")] == [0, 2, 4]
    assert [path.name for path in checkpoint.list_states(folder / "checkpoints")] == ["step_2", "step_4"]
    assert "28 training samples, 4 steps, 1 rank(s) on cpu" in said and "warning" not in said
    assert re.search(r"each checkpoint has 0.00\d+ GB, the newest 2 and the best are kept; [\d.e+]+ GB are free", said)
    assert re.search(r"samples take \d+ % of the time; --num_samples, or", said)
    assert json.loads((folder / "config.json").read_text())["val_steps"] is None


def test_warm_up_is_a_share_of_the_data(toys, tmp_path):
    """On any number of ranks, and in steps where their number is given."""
    cfg = Config(lr=1.0, warmup_steps=None, epochs=100)
    by_ranks = {}
    for per_epoch in (40, 20):
        run, rates = train.Run.__new__(train.Run), {}
        run.cfg, run.loader = cfg, type("Loader", (), {"num_samples": 40})
        for step in range(100 * per_epoch):
            before, after = (train.data.Position(*divmod((step + i) * 40 // per_epoch, 40)) for i in (0, 1))
            _, decayed = run.progress(train.TrainState(step, before))
            rates[after] = train.lr_at(*run.warm_up(train.TrainState(step + 1, after)), decayed, cfg)
        by_ranks[per_epoch] = rates
    one, two = by_ranks[40], by_ranks[20]
    assert max(one.values()) == one[(3, 0)] == two[(3, 0)] == 1.0 and list(one.values())[:2] == pytest.approx(
        [1 / 120, 2 / 120]
    )
    assert all(abs(one[at] - two[at]) < 0.01 for at in two)
    run.cfg = Config(lr=1.0, warmup_steps=None, max_steps=200)
    rates = [
        train.lr_at(*run.warm_up(train.TrainState(step + 1)), run.progress(train.TrainState(step))[1], run.cfg)
        for step in range(200)
    ]
    assert rates[:7] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1]) and rates[-1] < 1e-3


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_told_nothing_resumes(ranks, told_nothing, toys, tmp_path):
    """From the end of the first epoch, in other micro-batches: what is held out, when and how fast are as before."""
    folder, _ = told_nothing
    shutil.copytree(folder, tmp_path / "o")
    shutil.rmtree(tmp_path / "o" / "checkpoints" / "step_4")
    argv = plain(toys, tmp_path / "o", batch_size=7, grad_accum=2 // ranks, resume="auto")
    _ = run_ranks(resume, ranks, argv) if ranks > 1 else train.main(argv)
    lines, before = metrics(tmp_path / "o", "train"), metrics(folder, "train")
    assert [line["step"] for line in metrics(tmp_path / "o", "val")] == [2, 4]
    assert [line["step"] for line in metrics(tmp_path / "o", "sample")] == [0, 2, 4]
    assert [line["lr"] for line in lines] == [line["lr"] for line in before]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in before], rel=1e-5)


def resume(dist, argv: list[str]) -> None:
    train.train(train.parse_config(argv), dist)


def test_a_run_of_before_keeps_its_settings(toys, tmp_path, capsys):
    """Started when nothing was held out, evaluated or saved by default, or by flags that say so: the same flags continue it."""
    zeros = {"val_steps": 0, "sample_steps": 0, "warmup_steps": 0}
    assert train.main(plain(toys, tmp_path / "o", save_steps=2, max_steps=2, **zeros)) == 0
    assert train.main(plain(toys, tmp_path / "o", max_steps=4, resume="auto")) == 0
    before = "--val_steps 0 --sample_steps 0 --save_steps 2 --warmup_steps 0 --activation_checkpointing none"
    assert f"as in the run that is continued: {before}\n" in capsys.readouterr().err
    assert {line["split"] for line in map(json.loads, open(tmp_path / "o" / "metrics.jsonl"))} == {"train"}
    assert [path.name for path in checkpoint.list_states(tmp_path / "o" / "checkpoints")] == ["step_2", "step_4"]
    capsys.readouterr()
    argv = plain(toys, tmp_path / "o", max_steps=5, resume="auto", best_by="code_match")
    assert "is measured on samples" in main_error(argv, capsys), "the settings together are checked again"


def test_what_fits_is_chosen_once(toys, tmp_path, monkeypatch, capsys):
    """On a GPU with room for nothing but short clips; later the same, whatever room there is; never against a flag."""
    manifest, zeros = tmp_path / "many.jsonl", dict.fromkeys(("val_steps", "sample_steps", "warmup_steps"), 0)
    manifest.write_text((toys / "train.jsonl").read_text() * 8)
    (tmp_path / "clips").symlink_to(toys / "clips")

    def start(room: float, **extra) -> tuple[dict, str]:
        monkeypatch.setattr(fit, "free_bytes", lambda device: int(room))
        argv = plain(toys, tmp_path / "o", train_manifest=manifest, grad_accum=1, resume="auto", **zeros | extra)
        assert train.main([*argv[: (at := argv.index("--batch_size"))], *argv[at + 2 :]]) == 0
        said = capsys.readouterr().err
        return json.loads((tmp_path / "o" / "config.json").read_text()), said

    config, said = start(100e9, max_steps=1)
    tokens = config["max_tokens"]
    lengths = np.load(next((tmp_path / "o" / "codes").glob("lengths-*.npy")))
    assert tokens == lengths.sum() // 50 and config["activation_checkpointing"] == "none"
    assert f"chosen: --max_tokens {tokens} --activation_checkpointing none; " in said and "93.1 GB free" in said
    again, said = start(1, max_steps=2)
    assert again["max_tokens"] == tokens and "chosen: " not in said and f"--max_tokens {tokens}" in said
    (state,) = checkpoint.list_states(tmp_path / "o" / "checkpoints")[-1:]
    assert (
        checkpoint.read_state(state)["settings"]["max_tokens"] == checkpoint.read_state(state)["data"]["max_tokens"] == tokens
    )


def test_a_planner_that_cannot_answer(tmp_path, monkeypatch):
    """Its own words, and four samples. What is given is taken as it is."""
    dist = SimpleNamespace(device=torch.device("cpu"), world_size=1, is_main=True)
    dist.gather, dist.from_main, dist.together = lambda value: [value], lambda value: value, lambda work: work()
    said: list[str] = []
    monkeypatch.setattr(fit, "log", lambda dist, message: said.append(message))
    monkeypatch.setattr(fit, "free_bytes", lambda device: 1)
    monkeypatch.setattr(fit, "ROOT", tmp_path)
    cfg = Config(train_manifest="m", output_dir="o")
    found = fit.choose(cfg, dist, lambda: np.full(1000, 500))
    assert (found.batch_size, found.max_tokens, found.activation_checkpointing) == (4, 0, "none")
    assert re.search(r"^chosen: --batch_size 4; what fits is not known: .*No such file", said[-1])
    assert fit.choose(replace(cfg, batch_size=7), dist, None).batch_size == 7
    assert fit.choose(replace(cfg, max_tokens=700), dist, None).max_tokens == 700


@pytest.mark.parametrize("count", [1, 2, 9, 10, 31])
def test_tiny_data(count, toys, tmp_path, capsys):
    """Nothing is held out of fewer than ten records, and of more no more than a tenth."""
    manifest = tmp_path / "few.jsonl"
    manifest.write_text("".join((toys / "train.jsonl").read_text().splitlines(keepends=True)[:count]))
    (tmp_path / "clips").symlink_to(toys / "clips")
    assert train.main(plain(toys, tmp_path / "o", train_manifest=manifest, dry_run=True)) == 0
    said, held = capsys.readouterr().err, {10: 1, 31: 3}.get(count, 0)
    assert f"{count - held} training samples" in said
    assert (f"{held} training records are held out" if held else f"{count} records are too few to hold any out") in said


def test_how_many_are_held_out():
    assert [round(share_held_out(0.02, n) * n) for n in (10, 31, 40, 100, 200, 1000)] == [1, 3, 4, 4, 4, 20]
    assert share_held_out(0.3, 10) == 0.3 and share_held_out(0.05, 12, most=0.5) == 4 / 12


def test_what_cannot_happen_is_said(toys, tmp_path, capsys):
    steps = {"max_steps": 3, "warmup_steps": 20, "val_steps": 25, "sample_steps": 4, "save_steps": 50}
    assert train.main(plain(toys, tmp_path / "o", dry_run=True, **steps)) == 0
    error = capsys.readouterr().err
    for name, what in {
        "warmup": "never reaches its peak",
        "val": "at the end only",
        "sample": "of the base",
        "save": "only the last",
    }.items():
        assert re.search(rf"warning: --{name}_steps {steps[f'{name}_steps']}: the run has 3 steps: .*{what}", error)


def test_fewer_checkpoints_where_the_disk_is_small(toys, tmp_path, capsys, monkeypatch):
    """Those that fit are kept; where not even one fits, the run that asked for none goes on, the one that asked ends."""
    usage, free = shutil.disk_usage, [4]
    size = 4 * 3 * 38_400  # of this LoRA
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=int(size * (free[0] + 0.5))))
    argv = plain(toys, tmp_path / "o", lora_r=4, sample_steps=0, keep_last=5, epochs=4)
    assert train.main(argv) == 0
    error = capsys.readouterr().err
    assert "warning: room for 4 checkpoints: --keep_last is 2 instead of 5" in error
    assert len(checkpoint.list_states(tmp_path / "o" / "checkpoints")) == 2
    free[0] = 0
    assert train.main(plain(toys, tmp_path / "p", lora_r=4, sample_steps=0, epochs=1)) == 0
    assert "no checkpoint can be written" in capsys.readouterr().err and (tmp_path / "p" / "final").is_dir()
    assert "no checkpoint can be written" in main_error(
        plain(toys, tmp_path / "q", lora_r=4, sample_steps=0, save_steps=1), capsys
    )


def test_a_disk_that_fills_up(toys, tmp_path, capsys, monkeypatch):
    """Without room for the last checkpoint the model is finished and the one before stays whole; a signal then is an error."""
    usage, free = shutil.disk_usage, [10**12, 10**12, 0, 0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free.pop(0) if free else 0))
    argv = plain(toys, tmp_path / "o", lora_r=4, sample_steps=0)
    assert train.main(argv) == 0
    assert capsys.readouterr().err.count("no checkpoint can be written") == 1 and (tmp_path / "o" / "final").is_dir()
    (kept,) = checkpoint.list_states(tmp_path / "o" / "checkpoints")
    assert checkpoint.find_damage(kept) is None and checkpoint.read_state(kept)["step"] == 2
    original = train.train_step

    def step(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", step)
    assert "no checkpoint can be written" in main_error(plain(toys, tmp_path / "p", lora_r=4, sample_steps=0), capsys)


def test_samples_that_cannot_be_made_end_no_run(toys, tmp_path, capsys):
    """Nobody asked for them: without a codec they are codes, without audio there are none. Asked for, both are errors."""
    argv = plain(toys, tmp_path / "o", audio_tokenizer=tmp_path / "nowhere", max_steps=1)
    assert train.main(argv) == 0
    assert "without sound: --audio_tokenizer" in capsys.readouterr().err and len(metrics(tmp_path / "o", "sample")) == 2
    record = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    (tmp_path / "text.jsonl").write_text(json.dumps(record) + "\n")
    text = {"train_manifest": tmp_path / "text.jsonl", "max_steps": 1}
    assert train.main(plain(toys, tmp_path / "p", **text)) == 0
    assert "no samples: --sample_steps: no record looked at ends with an audio answer" in capsys.readouterr().err
    assert "no record looked at" in main_error(plain(toys, tmp_path / "q", sample_steps=1, **text), capsys)


def test_a_run_killed_in_its_first_epoch_begins_again(tmp_path):
    """Nothing was saved by then; after two epochs something must have been."""
    lines = [{"split": "train", "step": step, "epoch": step // 50} for step in range(1, 101)]
    for count, is_refused in ((49, False), (99, False), (100, True)):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:count]))
        if is_refused:
            with pytest.raises(train.CheckpointError, match="no whole checkpoint"):
                lineage.refuse_unsaved(tmp_path, None)
        else:
            assert lineage.refuse_unsaved(tmp_path, None) == count


# ---- prepare pair


@pytest.mark.parametrize(("lines", "speakers", "held"), [(20, 1, 2), (40, 2, 4), (100, 5, 4), (400, 20, 8)])
def test_pair_keeps_validation_lines_with_references(lines, speakers, held, tmp_path):
    """Two in a hundred would be too few to evaluate, and of those some would have lost their reference."""
    records = [
        {"speaker": f"s{i % speakers}", "messages": [{"role": "user", "content": f"line {i}"}, answer(tmp_path, i)]}
        for i in range(lines)
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert prepare(["pair", str(tmp_path / "m.jsonl"), str(tmp_path / "out"), "--ref_drop", "0.5"]) == 0
    written = json.loads((tmp_path / "out" / "leakage.json").read_text())["written"]
    kinds = Counter(written["val"])
    assert sum(kinds.values()) == held and sum(written["train"].values()) == lines - held
    assert sum(count for kind, count in kinds.items() if kind.startswith("reference: ")) >= min(4, held)


def answer(folder: Path, number: int) -> dict:
    np.save(
        folder / f"{number}.npy",
        np.full((8, 5 + number % 7), number % 64, np.int16) + np.arange(5 + number % 7, dtype=np.int16),
    )
    return {"role": "assistant", "content": {"type": "audio", "audio_url": f"{number}.npy"}}
