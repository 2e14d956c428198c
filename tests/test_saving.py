"""Checkpoints written beside training: it goes on meanwhile, failures are heard, the best one stays, restarts find them."""

from __future__ import annotations

import errno
import json
import math
import os
import time

import pytest
from test_resume import logged, run, settings

import checkpoint
import train
from generate.best import note


def names(output_dir) -> list[str]:
    return [path.name for path in checkpoint.list_states(output_dir / "checkpoints")]


def steps(output_dir) -> list[int]:
    return [line["step"] for line in logged(output_dir) if line["split"] == "train"]


def test_training_goes_on_while_a_checkpoint_is_written(toys, tmp_path, monkeypatch):
    """The checkpoint of step 2 is not written before step 4 is logged: whoever waited for it would wait forever."""
    original, output = checkpoint._write_rows, tmp_path / "o"

    def write_late(*args):
        deadline = time.time() + 60
        while len(steps(output)) < 4:
            assert time.time() < deadline, "training waits for its checkpoint"
            time.sleep(0.01)
        return original(*args)

    monkeypatch.setattr(checkpoint, "_write_rows", write_late)
    run(train.setup_distributed("cpu"), settings(toys, output, 4, max_steps=5, save_steps=2, keep_last=0, best_by=""))
    assert names(output) == ["step_2", "step_4", "step_5"]
    for folder in checkpoint.list_states(output / "checkpoints"):
        assert checkpoint.find_damage(folder) is None
        assert json.loads((folder / "state.json").read_text())["step"] == int(folder.name.removeprefix("step_"))


def test_a_failed_write_ends_the_run_at_one_of_the_next_steps(toys, tmp_path, monkeypatch, capsys):
    original, calls, output = checkpoint._write_rows, [], tmp_path / "o"

    def write_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    monkeypatch.setattr(checkpoint, "_write_rows", write_once)
    argv = settings(toys, output, 4, save_steps=2, val_steps=0)
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert "step_4: cannot be written ([Errno 28] No space left on device); earlier checkpoints are untouched" in error
    assert names(output) == ["step_2"] and not list((output / "checkpoints").glob(".step_*"))
    assert 4 <= len(steps(output)) <= 6, "the next checkpoint would have been due at step 6"
    assert train.main([*argv, "--resume", "auto"]) == 0
    assert steps(output) == list(range(1, 17))


def test_the_best_checkpoint_is_kept(toys, tmp_path, monkeypatch):
    """An evaluation that is the best so far is saved, and kept beyond --keep_last until a better one comes; that survives a
    resume, which only knows it from state.json."""
    output, real, losses = tmp_path / "o", train.evaluate, iter([3.0, 1.0, 2.0, 2.5, 2.0, 0.5])
    monkeypatch.setattr(train, "evaluate", lambda *args: real(*args) | {"loss": next(losses)})
    argv = settings(toys, output, 4, val_steps=1, save_steps=3, keep_last=1)
    dist = train.setup_distributed("cpu")
    run(dist, [*argv, "--max_steps", "3"])
    assert names(output) == ["step_2", "step_3"]
    run(dist, [*argv, "--max_steps", "5", "--resume", "auto"])
    assert names(output) == ["step_2", "step_5"]
    run(dist, [*argv, "--max_steps", "6", "--resume", "auto"])
    assert names(output) == ["step_6"]
    assert checkpoint.read_state(output / "checkpoints" / "step_6")["best"] == {"metric": "loss", "value": 0.5, "step": 6}


@pytest.mark.parametrize(
    ("value", "bad_samples", "best", "expected"),
    [
        (1.0, 0, {}, True),
        (1.0, 0, {"metric": "loss", "value": 2.0}, True),
        (1.0, 0, {"metric": "loss", "value": 1.0}, False),
        (1.0, 0, {"metric": "audio_loss", "value": 0.5}, True),  # another metric is no rival
        (1.0, 3, {}, True),  # a broken clip does not keep all checkpoints from being the best
        (1.0, 3, {"metric": "loss", "value": 1.0, "bad_samples": 3}, False),
        (1.0, 3, {"metric": "loss", "value": 0.5}, True),  # not the same samples as before
        (math.nan, 0, {}, False),
        (None, 0, {}, False),
    ],
)
def test_what_counts_as_better(value, bad_samples, best, expected):
    noted = note(best, "loss", {"loss": value, "bad_samples": bad_samples}, 7)
    assert (noted.get("step") == 7) is expected


def test_a_run_resumed_where_it_ends_is_finished(toys, tmp_path):
    """Into another folder, which has no step of its own."""
    argv = settings(toys, tmp_path / "o", 4, max_steps=2, save_steps=1)
    dist = train.setup_distributed("cpu")
    run(dist, argv)
    first = tmp_path / "o" / "checkpoints" / "step_1"
    run(dist, [*settings(toys, tmp_path / "best", 4, max_steps=1), "--resume", str(first)])
    assert (tmp_path / "best" / "final" / "adapter_model.safetensors").is_file()


def test_only_its_own_launcher_restarts_a_run(toys, tmp_path, monkeypatch, capsys):
    """Under --max_restarts a second attempt continues what the first began, but nobody else's run in the same folder."""
    output = tmp_path / "o"
    argv = settings(toys, output, 4, save_steps=1, val_steps=0)
    monkeypatch.setenv("LAUNCH_ID", "this one")
    assert train.main([*argv, "--max_steps", "1"]) == 0
    assert train.main([*argv, "--max_steps", "2"]) == 2, "no restart"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.main([*argv, "--max_steps", "2"]) == 0
    assert steps(output) == [1, 2]
    capsys.readouterr()
    for variable, value in (("LAUNCH_ID", "another one"), ("LAUNCH_ID", ""), ("TORCHELASTIC_RUN_ID", "none")):
        monkeypatch.setenv(variable, value)
        assert train.main([*argv, "--max_steps", "3"]) == 2
        assert "holds a run already" in capsys.readouterr().err
