"""No training on nothing: steps without targets, broken weights, texts that are commands, files that change while open."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import write_manifest
from safetensors.torch import load_file, save_file
from test_export import weights
from test_resume import logged, lose_clips, settings  # noqa: F401

import train
from common import DataError
from prepare.audio import load_codec
from prepare.manifest import read_manifest


def test_steps_without_targets_move_no_weight_and_end_the_run(lose_clips, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Every clip becomes unreadable after the first step; momentum and weight decay would go on changing the weights."""
    folder, lose = lose_clips
    lose(*range(31))
    argv = settings(folder, tmp_path / "o", 4, val_steps=0, batch_size=4, weight_decay=0.1, keep_last=0, save_steps=1)
    assert train.main([*argv, "--max_bad_samples", "1000", "--max_bad_steps", "3"]) == 2
    error = capsys.readouterr().err
    assert "no target on any rank, so nothing was learned" in error and "3 steps in a row were not finite, or without targets" in error
    lines = [line for line in logged(tmp_path / "o") if line["split"] == "train"]
    empty = [line["step"] for line in lines if line["text_targets"] + line["audio_targets"] == 0]
    assert len(empty) == 3 and lines[-1]["bad_steps"] == 3
    folders = [tmp_path / "o" / "checkpoints" / f"step_{step}" for step in (empty[0] - 1, empty[-1])]
    before, after = map(weights, folders)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_broken_samples_are_a_share_of_all(lose_clips, tmp_path, capsys):  # noqa: F811
    """5 % by default: two of 31 are too many, one is not, however often it is met."""
    folder, lose = lose_clips
    lose(7)
    assert train.main(settings(folder, tmp_path / "one", 4, val_steps=0, epochs=4, batch_size=4)) == 0
    lines = [line for line in logged(tmp_path / "one") if line["split"] == "train"]
    assert lines[-1]["bad_samples"] == 1
    lose(11, 12)
    assert train.main(settings(folder, tmp_path / "two", 4, val_steps=0, epochs=4, batch_size=4)) == 2
    assert "more than --max_bad_samples 0.05" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_the_checkpoints_fault(value, toys, tmp_path, capsys):
    """Not that of the samples, each of which would be skipped."""
    base = tmp_path / "base"
    shutil.copytree(toys / "checkpoint", base)
    tensors = load_file(base / "model.safetensors")
    tensors["layers.0.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert train.main(settings(toys, tmp_path / "o", base_ckpt=base, max_steps=2)) == 2
    error = capsys.readouterr().err
    assert "not finite before anything was trained" in error and "--base_ckpt" in error and "samples:" not in error


@pytest.mark.parametrize("token", ["<|eot_id|>", "<|audio_out_bos|>", "<|start_header_id|>"])
def test_a_text_is_no_command(token, toys, tmp_path, capsys):
    """Found before training, with record and field; it never becomes the token that it spells."""
    records = [json.loads(line) for line in (toys / "train.jsonl").read_text().splitlines()]
    text = next(turn for turn in records[4]["messages"] if isinstance(turn["content"], str))
    text["content"] += f" {token}"
    (tmp_path / "clips").symlink_to(toys / "clips")
    write_manifest(tmp_path / "train.jsonl", records)
    assert train.main(settings(toys, tmp_path / "o", train_manifest=tmp_path / "train.jsonl", max_steps=1)) == 2
    error = capsys.readouterr().err
    assert "record 4 " in error and f"the text holds {token}, which is a command" in error


@pytest.mark.parametrize("how", ["appended", "replaced"])
def test_a_manifest_that_changes_while_open_is_noticed(how, toys, tmp_path):
    path = tmp_path / "train.jsonl"
    shutil.copy(toys / "train.jsonl", path)
    (tmp_path / "clips").symlink_to(toys / "clips")
    manifest = read_manifest(path)
    assert manifest[1] and manifest.subset([0, 2])[1]
    if how == "appended":
        path.write_text(path.read_text() + "{}\n")
    else:
        (tmp_path / "new").write_text(path.read_text().replace("a", "b"))
        (tmp_path / "new").replace(path)
    for opened in (manifest, manifest.subset([0, 2])):
        with pytest.raises(DataError, match=r"train\.jsonl: has changed since it was opened"):
            opened[1]


def test_a_codec_without_some_weights_is_refused(codec_dir, tmp_path):
    """Upstream would keep random ones, and noise would be cached as codes. HuBERT's may be missing: it has its own files."""
    folder = tmp_path / "codec"
    shutil.copytree(codec_dir, folder, symlinks=False)
    tensors = torch.load(folder / "model.pth", weights_only=True)
    torch.save({n: t for n, t in tensors.items() if not n.startswith("semantic_model.")}, folder / "model.pth")
    assert load_codec(str(folder), "cpu")
    name = next(name for name in tensors if name.startswith("decoder_2."))
    torch.save({n: t for n, t in tensors.items() if n != name}, folder / "model.pth")
    with pytest.raises(DataError, match=f"1 of its weights are missing in model.pth, first {name}"):
        load_codec(str(folder), "cpu")
