"""The end of a run: whatever fails there, what was trained is kept, and the message says how to go on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from test_export import same, weights
from test_resume import logged, settings

import checkpoint
import train
from common import CheckpointError
from export import pretrained, write


def states(output_dir: Path) -> list[str]:
    return [path.name for path in checkpoint.list_states(output_dir / "checkpoints")]


@pytest.fixture(scope="module")
def expected(toys, tmp_path_factory) -> dict:
    """The weights that two steps of a full fine-tune give."""
    output = tmp_path_factory.mktemp("expected") / "o"
    assert train.main(settings(toys, output, 0, max_steps=2, val_steps=0)) == 0
    assert not (output / "checkpoints").exists(), "--save_steps 0: no checkpoint is left once final/ is written"
    return weights(output / "final")


@pytest.mark.parametrize("name", ["evaluate", "write_final"])
def test_a_state_is_saved_before_what_may_fail(name, expected, toys, tmp_path, monkeypatch, capsys):
    """The last evaluation, or writing final/, ends the run: --resume auto goes on where it was, without --save_steps too."""

    def fail(*args, **kwargs):
        raise RuntimeError("injected") if name == "evaluate" else CheckpointError("final: no space left on device")

    argv = settings(toys, tmp_path / "o", 0, max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(train, name, fail)
        if name == "evaluate":
            with pytest.raises(RuntimeError, match="injected"):
                train.main(argv)
        else:
            assert train.main(argv) == 2
            error = capsys.readouterr().err
            assert "no space left on device" in error and "step_2" in error and "--resume auto" in error
    assert states(tmp_path / "o") == ["step_2"]
    assert train.main([*argv, "--resume", "auto"]) == 0
    assert same(weights(tmp_path / "o" / "final"), expected)
    assert [line["step"] for line in logged(tmp_path / "o") if line["split"] == "train"] == [1, 2]


def test_what_the_last_evaluation_finds_is_noted(toys, tmp_path):
    """The best evaluation is the last one: the checkpoint saved before it says so."""
    argv = settings(toys, tmp_path / "o", max_steps=2, save_steps=2, val_steps=2)
    assert train.main(argv) == 0
    state = checkpoint.read_state(tmp_path / "o" / "checkpoints" / "step_2")
    assert state["best"]["step"] == 2
    assert checkpoint.find_damage(tmp_path / "o" / "checkpoints" / "step_2") is None


def test_a_disk_too_small_for_the_state_is_a_warning(expected, toys, tmp_path, monkeypatch, capsys):
    """Without --save_steps nobody has made room for it; final/ may well fit."""

    def fail(*args):
        raise CheckpointError("70 GB needed, 20 GB free")

    monkeypatch.setattr(checkpoint, "_start_writing", fail)
    assert train.main(settings(toys, tmp_path / "o", 0, max_steps=2, val_steps=0)) == 0
    assert "warning: 70 GB needed, 20 GB free" in capsys.readouterr().err
    assert same(weights(tmp_path / "o" / "final"), expected)
    assert train.main(settings(toys, tmp_path / "p", 0, max_steps=2, save_steps=2)) == 2


def test_nothing_about_the_card_costs_the_weights(expected, toys, tmp_path, monkeypatch, capsys):
    """A line of another version in metrics.jsonl, and a manifest whose name no table holds."""
    original = train.train_step

    def step(*args, **kwargs):
        with open(tmp_path / "o" / "metrics.jsonl", "a") as file:
            file.write('{"split": "train", "loss": "none"}\n{"step": 1, "split": "train"}\n')
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", step)
    assert train.main(settings(toys, tmp_path / "o", 0, max_steps=2, val_steps=0)) == 0
    assert "has no model card" in capsys.readouterr().err
    assert same(weights(tmp_path / "o" / "final"), expected)
    assert train.main([*settings(toys, tmp_path / "o", 0, max_steps=3, save_steps=3), "--resume", "auto"]) == 2, "no state left"


@pytest.mark.parametrize("lora_r", [0, 4])
def test_the_base_may_be_gone_at_the_end(lora_r, expected, toys, tmp_path, monkeypatch, capsys):
    """Its configuration and tokenizer were copied at the start; only merging needs its weights."""
    base, original = tmp_path / "base", train.train_step
    shutil.copytree(toys / "checkpoint", base)

    def step(*args, **kwargs):
        shutil.rmtree(base, ignore_errors=True)
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", step)
    extra = {"merge_lora": True} if lora_r else {}
    assert train.main(settings(toys, tmp_path / "o", lora_r, base_ckpt=base, max_steps=2, val_steps=0, **extra)) == 0
    if lora_r:
        assert "warning" in (error := capsys.readouterr().err) and f"bash launch.sh merge {tmp_path / 'o' / 'final'} BASE" in error
        assert (tmp_path / "o" / "final" / "adapter_model.safetensors").is_file()
    else:
        assert same(weights(tmp_path / "o" / "final"), expected)
        assert (tmp_path / "o" / "final" / "tokenizer.json").is_file()


def test_final_may_be_a_link(expected, toys, tmp_path):
    """To a larger disk, say: the model is written there."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "final").symlink_to(tmp_path / "large" / "model")
    assert train.main(settings(toys, tmp_path / "o", 0, max_steps=2, val_steps=0, save_steps=0)) == 0
    assert (tmp_path / "o" / "final").is_symlink() and same(weights(tmp_path / "large" / "model"), expected)


@pytest.mark.parametrize("call", [1, 2])
def test_the_model_before_survives(call, tmp_path, monkeypatch):
    """Neither rename of the exchange can lose it, and the new one stays where it was written."""
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").touch()
    replace, calls = os.replace, [0]

    def fail(*args):
        calls[0] += 1
        if calls[0] == call:
            raise OSError("injected")
        replace(*args)

    monkeypatch.setattr(write.os, "replace", fail)
    with pytest.raises(CheckpointError, match="the new one is whole in"), write.whole_folder(tmp_path / "final") as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "final" / "old").exists() and (tmp_path / ".final.tmp" / "new").exists()


def test_a_kill_between_the_renames_is_mended(tmp_path, monkeypatch):
    """What a killed process has left is put back before anything else is done."""
    (tmp_path / ".final.old").mkdir()
    (tmp_path / ".final.old" / "old").touch()
    with pytest.raises(CheckpointError), write.whole_folder(tmp_path / "final"):
        raise OSError("disk full")
    assert (tmp_path / "final" / "old").exists()


def test_a_tokenizer_that_cannot_be_saved_is_copied(expected, toys, tmp_path, monkeypatch, capsys):
    load = pretrained.load_tokenizer

    def load_stubborn(folder):
        tokenizer = load(folder)

        def fail(*args, **kwargs):
            raise ValueError("injected")

        tokenizer.save_pretrained = fail
        return tokenizer

    monkeypatch.setattr(pretrained, "load_tokenizer", load_stubborn)
    for lora_r in (0, 4):
        assert train.main(settings(toys, tmp_path / f"{lora_r}", lora_r, max_steps=2, val_steps=0)) == 0
        assert "the tokenizer is copied" in capsys.readouterr().err
        assert load(tmp_path / f"{lora_r}" / "final").get_vocab() == load(toys / "checkpoint").get_vocab()
    assert same(weights(tmp_path / "0" / "final"), expected)


def test_an_output_folder_that_cannot_be_written_is_refused_at_once(toys, tmp_path, capsys, monkeypatch):
    """Before the model is loaded."""
    monkeypatch.setattr(train, "build_model", None)
    (tmp_path / "file").write_text("")
    assert train.main(settings(toys, tmp_path / "file" / "o", max_steps=2)) == 2
    assert "cannot be written" in capsys.readouterr().err
