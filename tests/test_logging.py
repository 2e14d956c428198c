"""Logging cannot end a run: what fails is counted, said, and written later where that is possible."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import loguru
import pytest
from conftest import ROOT
from test_resume import logged, settings, small_disk  # noqa: F401

import train
from process.log import Log
from process.monitor import Monitor, TensorBoard


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_full_disk_delays_lines(small_disk, capsys):  # noqa: F811
    """None is lost or torn: they are written when there is room again."""
    monitor = Monitor(small_disk, {})
    monitor.sinks.clear()
    monitor.write(split="train", step=1, loss=0.5)
    (small_disk / "ballast").write_bytes(b"")
    with pytest.raises(OSError), open(small_disk / "ballast", "wb") as file:
        while True:
            file.write(bytes(1000))
            file.flush()
    for step in range(2, 300):
        monitor.write(split="train", step=step, loss=0.5, text="x" * 50)
    error = capsys.readouterr().err
    assert "No space left on device" in error and "lines wait" in error and error.count("\n") < 10
    assert [line["step"] for line in lines(small_disk)] == list(range(1, len(lines(small_disk)) + 1)), "no torn line"
    (small_disk / "ballast").unlink()
    monitor.write(split="train", step=300, loss=0.5)
    assert [line["step"] for line in lines(small_disk)] == list(range(1, 301))


def test_a_failing_sink_is_counted(tmp_path, monkeypatch, capsys):
    def fail(self, *args):
        raise RuntimeError("the service is down")

    monkeypatch.setattr(TensorBoard, "write", fail)
    monitor = Monitor(tmp_path, {})
    for step in range(1, 101):
        monitor.write(split="train", step=step, loss=0.5)
    error = capsys.readouterr().err
    assert error.count("warning: TensorBoard: failed") == 7 and "failed 64 time(s): the service is down" in error
    assert len(lines(tmp_path)) == 100


def test_tensorboard_that_cannot_begin(tmp_path, capsys):
    """A file where its folder should be."""
    (tmp_path / "tensorboard").write_text("")
    Monitor(tmp_path, {}).write(split="train", step=1, loss=0.5)
    assert "warning: TensorBoard" in capsys.readouterr().err and len(lines(tmp_path)) == 1


def test_weights_and_biases_without_a_network(tmp_path, monkeypatch, capsys):
    """With a stand-in for the package that cannot be reached: kept offline, which `wandb sync` sends later."""
    logged_offline = []

    class Unreachable(types.ModuleType):
        class Error(Exception):
            pass

        def init(self, mode="online", **values):
            if mode != "offline":
                raise self.Error("no network")
            return types.SimpleNamespace(log=lambda curves, step: logged_offline.append(step))

    monkeypatch.setitem(sys.modules, "wandb", Unreachable("wandb"))
    Monitor(tmp_path, {}, project="mine").write(split="train", step=1, loss=0.5)
    assert "warning: --wandb mine: no network" in capsys.readouterr().err and logged_offline == [1]


def test_samples_that_cannot_be_written(toys, tmp_path, capsys):
    """OUTPUT/samples cannot be made: the run goes on without them."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "samples").write_text("in the way")
    argv = settings(toys, tmp_path / "o", max_steps=2, sample_steps=1, num_samples=1, audio_tokenizer="none", val_steps=0)
    assert train.main(argv) == 0
    assert "warning: samples of step 1 cannot be written" in capsys.readouterr().err
    assert {line["split"] for line in logged(tmp_path / "o")} == {"train", "val"}


@pytest.mark.parametrize("how", ["closed", pytest.param("full", marks=pytest.mark.slow)])
def test_stderr_may_be_gone(how, toys, tmp_path):
    """Closed from the start (2>&-), so that files of ours could get its number; or a full device."""
    argv = settings(toys, tmp_path / "o", max_steps=2, val_steps=0, num_workers=1)
    redirect = {"closed": ">&- 2>&-", "full": ">/dev/full 2>/dev/full"}[how]
    command = f'exec "{sys.executable}" tools/launch.py --standalone --nproc_per_node=1 train.py "$@" {redirect}'
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command, "bash", *argv], cwd=ROOT, env=environment, timeout=240, check=False)
    assert done.returncode == 0 and (tmp_path / "o" / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_on_a_full_disk(small_disk, capsys):  # noqa: F811
    """Its writer has a thread that fails later than it is asked; the lines of metrics.jsonl lie elsewhere."""
    monitor = Monitor(small_disk, {})
    monitor.path = small_disk.parent / "metrics.jsonl"
    for step in range(1, 400):
        monitor.write(split="train", step=step, **{f"value{i}": 0.5 for i in range(20)})
        if step % 100 == 0:
            for sink in monitor.sinks:
                monitor._try("TensorBoard", sink.writer.flush)
    assert "warning: TensorBoard" in capsys.readouterr().err
    assert len(monitor.path.read_text().splitlines()) == 399


# ---- OUTPUT/log.txt


def test_everything_printed_is_kept_with_the_time(toys, tmp_path, capfd, monkeypatch):
    """And what is not shown: the first batch, and what libraries warn of, on a resume too; nothing of the bar."""
    original, before = train.train_step, (sys.stdout, sys.stderr, logging.getLogger("transformers").handlers)

    def step(*args, **kwargs):
        warnings.warn("of Python", UserWarning, stacklevel=2)
        logging.getLogger("transformers.models").warning("of transformers")
        logging.getLogger("torch.distributed").warning("of torch")
        loguru.logger.warning("of loguru")
        print("on stdout")
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", step)
    argv = settings(toys, tmp_path / "o", max_steps=2, val_steps=1, save_steps=1)
    assert train.main(argv) == 0
    shown, kept = "".join(capfd.readouterr()), (tmp_path / "o" / "log.txt").read_text()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d .*\S", line) for line in kept.splitlines())
    for words in ("on stdout", "saved ", "checkpoints/step_1\n", ", copy_share 0.0", ", eos_accuracy 0.", "finished: "):
        assert words in shown and words in kept, words
    for words in (
        "  input_ids ",
        "torch.int64",
        "text loss 5.",
        "of Python",
        "of transformers",
        "of torch",
        "of loguru",
        "started: ",
    ):
        assert words not in shown and words in kept, words
    assert "it/s" not in kept and "step/s" not in kept and "train:" in shown
    assert all("train: " not in line or line.endswith("]") for line in shown.splitlines()), "a line within the bar"
    assert (sys.stdout, sys.stderr, logging.getLogger("transformers").handlers) == before
    assert train.main([*argv, "--max_steps", "3", "--resume", "auto", "--verbose"]) == 0
    shown, both = capfd.readouterr().err, (tmp_path / "o" / "log.txt").read_text()
    assert both.startswith(kept) and "  input_ids " in shown and both.count("  input_ids ") == 2


def test_the_error_that_ends_a_run_is_kept(toys, tmp_path, monkeypatch):
    assert train.main(settings(toys, tmp_path / "o", base_ckpt=tmp_path / "nowhere" / "deep")) == 2
    assert "error: " in (log := (tmp_path / "o" / "log.txt").read_text()) and "nowhere/deep" in log and "Traceback" not in log
    monkeypatch.setattr(train, "train_step", None)
    with pytest.raises(TypeError):
        train.main(settings(toys, tmp_path / "p", max_steps=1))
    assert "Traceback" in (tmp_path / "p" / "log.txt").read_text()


def test_a_full_disk_delays_lines_of_the_log(small_disk, capsys):  # noqa: F811
    """Of rank 1, whose lines say so."""
    (small_disk / "ballast").write_bytes(b"")
    with Log(small_disk / "log.txt", rank=1):
        print("first", file=sys.stderr)
        with pytest.raises(OSError), open(small_disk / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1000))
        for number in range(2000):
            print(f"line {number}", file=sys.stderr)
        error = capsys.readouterr().err
        assert error.count("log.txt: its lines wait: [Errno 28] No space left") == 1 and "line 1999" in error
        (small_disk / "ballast").unlink()
        print("last", file=sys.stderr)
    lines = [line.split(" ", 2)[2] for line in (small_disk / "log.txt").read_text().splitlines()]
    assert lines == [f"rank 1: {line}" for line in ("first", *(f"line {number}" for number in range(2000)), "last")]
