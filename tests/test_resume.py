"""Stop and go on: to the bit on the same ranks, and on another number of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ONLY_STEPS, ROOT, run_ranks
from safetensors.torch import load_file
from test_distributed import full
from torch.distributed.fsdp import fully_shard

import checkpoint
import data
import train
from common import CheckpointError
from config import to_argv
from process.signals import PREEMPTED


def settings(toys: Path, output_dir: Path, lora_r: int = 4, **extra) -> list[str]:
    values = ONLY_STEPS | {
        "train_manifest": toys / "train.jsonl",
        "val_manifest": toys / "val.jsonl",
        "base_ckpt": toys / "checkpoint",
        "output_dir": output_dir,
        "lora_r": lora_r,
        "lora_dropout": 0.1,
        "mixed_precision": "no",
        "batch_size": 2,
        "grad_accum": 2,
        "lr": 1e-3,
        "warmup_steps": 2,
        "epochs": 2,
        "num_workers": 0,
        "val_steps": 5,
        "device": "cpu",
    }
    return to_argv(values | extra)


def run(dist, argv: list[str]) -> dict[str, torch.Tensor]:
    model = train.train(train.parse_config(argv), dist)
    return {n: full(p) for n, p in model.named_parameters() if p.requires_grad}


def logged(output_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    timing = ("tokens_per_sec", "audio_sec_per_sec", "step_time_sec", "peak_memory_bytes", "mfu")
    timing += ("data_wait_sec", "rank_step_time_sec")
    return [{k: v for k, v in line.items() if k not in timing} for line in lines]


class Stop(Exception):
    """The moment a run is cut off."""


def run_and_stop(dist, argv: list[str], after: int) -> None:
    """The ordinary run, cut off after some steps."""
    original, calls = train.train_step, [0]

    def step(*args, **kwargs):
        if calls[0] == after:
            raise Stop
        calls[0] += 1
        return original(*args, **kwargs)

    train.train_step = step
    try:
        train.train(train.parse_config(argv), dist)
    except Stop:
        pass
    finally:
        train.train_step = original


@pytest.mark.parametrize("lora_r", [0, 4])
def test_resume_is_exact_to_the_bit(lora_r, toys, tmp_path):
    """N + M steps against N, stop, M on two ranks: every parameter bit and every logged value; then on one rank.

    The stop comes two steps after the checkpoint and in the middle of an epoch. On one rank instead of two the same
    micro-batches are used, so only the order of sums differs: measured 8e-8 of the largest parameter.
    """
    whole, parts, alone = tmp_path / "whole", tmp_path / "parts", tmp_path / "alone"
    expected = run_ranks(run, 2, settings(toys, whole, lora_r, save_steps=5))[0]
    run_ranks(run_and_stop, 2, settings(toys, parts, lora_r, save_steps=5), 7)
    assert [line["step"] for line in logged(parts)] == [1, 2, 3, 4, 5, 5, 6, 7]  # one evaluation among them
    assert not (parts / "final").exists()
    resumed = run_ranks(run, 2, settings(toys, parts, lora_r, save_steps=5, resume="auto"))[0]
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[n], p) for n, p in expected.items())
    assert logged(parts) == logged(whole)
    assert len(checkpoint.list_states(parts / "checkpoints")) == 2

    argv = settings(toys, alone, lora_r, grad_accum=4, resume=str(checkpoint.list_states(whole / "checkpoints")[0]))
    elsewhere = run_ranks(run, 1, argv)[0]
    scale = max(p.abs().max() for p in expected.values())
    worst = max((elsewhere[n] - p).abs().max() for n, p in expected.items()) / scale
    assert worst < 1e-5


CONFIGURATIONS = {
    "full, float32": {"lora_r": 0},
    "full, bf16": {"lora_r": 0, "mixed_precision": "bf16"},
    "full, bf16, layers recomputed": {"lora_r": 0, "mixed_precision": "bf16", "activation_checkpointing": "full"},
    "full, some layers recomputed": {"lora_r": 0, "activation_checkpointing": "selective"},
    "full, moving average": {"lora_r": 0, "ema": 0.9},
    "full, in host memory": {"lora_r": 0, "cpu_offload": True},
    "full, parts frozen": {"lora_r": 0, "freeze": r"embed_tokens,layers\.0\..*"},
    "full, whole model on each rank": {"lora_r": 0, "replicate": 2},
    "LoRA, float32": {},
    "LoRA, bf16": {"mixed_precision": "bf16"},
    "LoRA, bf16, without dropout": {"mixed_precision": "bf16", "lora_dropout": 0.0},
    "LoRA, float16": {"mixed_precision": "fp16"},
    "LoRA on 4 bits": {"mixed_precision": "bf16", "quantize": "nf4"},
    "LoRA, moving average": {"ema": 0.9},
    "LoRA, layers recomputed": {"activation_checkpointing": "full"},
    "by number of positions": {"max_tokens": 300, "grad_accum": 1},
    "two loader workers": {"num_workers": 2},
    "two data sets in a mixture": {"train_manifest": "TRAIN:2,VAL:0.5"},
    "voice term": {"consistency_loss_weight": 0.1},
    "weighted codebooks and losses": {"codebook_weights": "4,2,1,1,1,1,1,1", "text_loss_weight": 0.5},
}


def compare_resumed(dist, toys: Path, folder: Path) -> list[tuple[str, str]]:
    """Of each configuration, what differs between five steps and three, stop, resume from the second."""
    found = []
    for number, (name, extra) in enumerate(CONFIGURATIONS.items()):
        whole, parts = folder / f"{number}-whole", folder / f"{number}-parts"
        extra = {"save_steps": 2, "max_steps": 5, "val_steps": 2} | extra
        dist = train.setup_distributed("cpu", extra.get("replicate", 1))
        if manifest := extra.get("train_manifest"):
            extra["train_manifest"] = manifest.replace("TRAIN", f"{toys}/train.jsonl").replace("VAL", f"{toys}/val.jsonl")
        expected = run(dist, settings(toys, whole, **extra))
        run_and_stop(dist, settings(toys, parts, **extra), 3)
        resumed = run(dist, settings(toys, parts, resume="auto", **extra))
        found += [(name, parameter) for parameter in expected if not torch.equal(resumed[parameter], expected[parameter])]
        found += [(name, "metrics.jsonl")] * (dist.is_main and logged(parts) != logged(whole))
    return found


@pytest.mark.slow
def test_every_configuration_resumes_to_the_bit(toys, tmp_path):
    assert len(CONFIGURATIONS) >= 17
    assert run_ranks(compare_resumed, 2, toys, tmp_path, timeout_sec=900) == [[], []]


def test_offloading_changes_nothing(toys, tmp_path):
    """--cpu_offload, stopped and resumed, against a plain run: every bit."""
    whole, parts = (settings(toys, tmp_path / name, 0, max_steps=4, save_steps=2) for name in ("whole", "parts"))
    expected = run_ranks(run, 2, whole)[0]
    run_ranks(run_and_stop, 2, [*parts, "--cpu_offload"], 3)
    found = run_ranks(run, 2, [*parts, "--cpu_offload", "--resume", "auto"])[0]
    assert all(torch.equal(found[n], p) for n, p in expected.items())
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def test_files_hold_no_pickle(toys, tmp_path):
    run_ranks(run, 2, settings(toys, tmp_path / "o", 4, max_steps=2, save_steps=1))
    states = checkpoint.list_states(tmp_path / "o" / "checkpoints")
    assert [p.name for p in states] == ["step_1", "step_2"]
    written = [p for p in (tmp_path / "o").rglob("*") if p.is_file() and p.name != ".lock"]
    files = [p for p in written if "tensorboard" not in p.parts]
    assert {p.suffix for p in files} == {".json", ".jsonl", ".safetensors", ".md", ".yaml", ".txt"}
    names = {name for path in states[0].glob("*.safetensors") for name in load_file(path)}
    assert any(name.endswith(".exp_avg_sq") for name in names) and not any("base_layer" in name for name in names)


def small_model(dist):
    model = torch.nn.Linear(64, 64)
    fully_shard(model, mesh=dist.mesh)
    return model, torch.optim.AdamW(model.parameters())


def save_on_a_full_disk(dist, folder: str):
    """Saving to a disk that is full leaves nothing behind, says so on all ranks, and the old checkpoint still loads."""
    model, optimizer = small_model(dist)
    saver = checkpoint.Saver(Path(folder), model, optimizer)
    saver.start({"step": 1, "run": {}})
    saver.commit()
    before = full(model.weight)
    with torch.no_grad():
        model.weight.add_(1)
    messages = []
    for room in (0, 10**12):  # noticed beforehand; then a disk that fills up while it is written
        checkpoint.shutil.disk_usage = lambda path, room=room: SimpleNamespace(free=room)
        try:
            saver.start({"step": 2, "run": {}})
            saver.commit()
        except CheckpointError as error:
            messages.append(str(error))
    left = sorted(p.name for p in Path(folder).iterdir())
    checkpoint.check_state(Path(folder) / "step_1", model, optimizer)
    checkpoint.load_state(Path(folder) / "step_1", model, optimizer)
    return messages, left, torch.equal(full(model.weight), before)


@pytest.fixture()
def small_disk(tmp_path):
    """A file system of 100 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount"):
        pytest.skip("no mount command here")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_checkpoint(small_disk):
    for messages, left, equal in run_ranks(save_on_a_full_disk, 2, str(small_disk)):
        assert len(messages) == 2 and all("untouched" in message for message in messages)
        assert "GB needed" in messages[0] and "cannot be written" in messages[1]
        assert left == ["step_1"] and equal


def test_a_damaged_checkpoint_is_named_and_skipped(toys, tmp_path, capsys):
    """Truncated, or one byte flipped: `--resume auto` takes the one before, a path by name is an error."""
    dist = train.setup_distributed("cpu")
    argv = settings(toys, tmp_path / "o", 4, max_steps=2, save_steps=1)
    expected = run(dist, argv)
    newest = tmp_path / "o" / "checkpoints" / "step_2"
    (file,) = newest.glob("*.safetensors")
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content, message in ((whole[:-10], "bytes instead of"), (bytes(flipped), "sha256 differs")):
        file.write_bytes(content)
        assert train.main([*argv, "--resume", str(newest)]) == 2
        assert message in capsys.readouterr().err
    resumed = run(dist, [*argv, "--resume", "auto"])
    assert "passed over" in capsys.readouterr().err
    assert all(torch.equal(resumed[n], p) for n, p in expected.items())
    assert checkpoint.find_damage(newest) is None, "step 2 was saved anew"


def test_two_runs_cannot_share_a_folder(toys, tmp_path, capsys):
    argv = settings(toys, tmp_path / "o", 4, max_steps=1)
    hold = f"import pathlib; from process import lineage; held = lineage.lock(pathlib.Path({str(tmp_path / 'o')!r})); print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    assert train.main(argv) == 2
    assert f"in use by another run (process {other.pid} on" in capsys.readouterr().err
    other.kill()
    other.wait()
    assert train.main(argv) == 0


@pytest.fixture(scope="module")
def uninterrupted(toys, tmp_path_factory):
    """A whole run: its settings beyond the usual, its folder, its parameters."""
    whole, extra = tmp_path_factory.mktemp("runs") / "whole", {"epochs": 6, "save_steps": 1000}
    return extra, whole, run_ranks(run, 2, settings(toys, whole, 4, **extra))[0]


@pytest.mark.parametrize(
    ("number", "to_all"),
    [
        (signal.SIGTERM, True),
        pytest.param(signal.SIGUSR1, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_exactly(number, to_all, uninterrupted, toys, tmp_path):
    """Sent to the launcher, as a shell does, or to every process of the job, loader workers too, as a scheduler does: exit
    status 75, after Ctrl-C 0, a line that says how to go on, nothing lost."""
    extra, whole, expected = uninterrupted
    extra = extra | {"num_workers": int(to_all)}
    parts = tmp_path / "parts"
    argv = [
        sys.executable,
        "-m",
        "tools.launch",
        "--standalone",
        "--nproc_per_node=2",
        "train.py",
        *settings(toys, parts, 4, **extra),
    ]
    process = subprocess.Popen(
        argv, cwd=ROOT, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.time() + 120
    while not (parts / "metrics.jsonl").exists() or not (parts / "metrics.jsonl").read_text().count("train") >= 3:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True) if to_all else []
    for member in [process, *family]:
        member.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == (0 if number == signal.SIGINT else PREEMPTED), error
    assert f"received {number.name}: stopped after step " in error and "--resume auto" in error
    assert not (parts / "final").exists()
    resumed = run_ranks(run, 2, settings(toys, parts, 4, **extra, resume="auto"))[0]
    assert all(torch.equal(resumed[n], p) for n, p in expected.items())
    assert logged(parts) == logged(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_r": 0}, "lora_r was 4 and is 0"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"lora_targets": "q_proj"}, "lora_targets was 'self_attn,mlp,audio_mlp' and is 'q_proj'"),
        ({"val_manifest": ""}, "training_samples was 31 and is 30"),
    ],
)
def test_another_run_is_not_continued(change, message, toys, tmp_path, capsys):
    run(train.setup_distributed("cpu"), settings(toys, tmp_path / "o", 4, max_steps=1, save_steps=1))
    argv = settings(toys, tmp_path / "p", 4, max_steps=2, resume=str(tmp_path / "o" / "checkpoints" / "step_1"))
    assert train.main([*argv, *to_argv(change)]) == 2
    assert message in capsys.readouterr().err


def test_a_torn_metrics_line_does_not_stop_a_resume(toys, tmp_path):
    dist = train.setup_distributed("cpu")
    run(dist, settings(toys, tmp_path / "o", 4, max_steps=1, save_steps=1))
    with open(tmp_path / "o" / "metrics.jsonl", "a") as file:
        file.write('{"split": "train", "st')
    run(dist, settings(toys, tmp_path / "o", 4, max_steps=2, save_steps=1, resume="auto"))
    assert [line["step"] for line in logged(tmp_path / "o") if line["split"] == "train"] == [1, 2]


def test_resume_on_two_one_and_two_ranks(toys, tmp_path):
    """Two ranks, then one, then two again, each stopped a step after a checkpoint: no step is lost or doubled, and only the
    order of sums differs. Measured: 1e-7 of the parameters' norm."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run_ranks(run, 2, settings(toys, whole, 4, save_steps=2))[0]
    run_ranks(run_and_stop, 2, settings(toys, parts, 4, save_steps=2), 3)
    run_ranks(run_and_stop, 1, settings(toys, parts, 4, save_steps=2, grad_accum=4, resume="auto"), 3)
    found = run_ranks(run, 2, settings(toys, parts, 4, save_steps=2, resume="auto"))[0]
    difference = sum((found[n] - p).square().sum() for n, p in expected.items()) / sum(
        p.square().sum() for p in expected.values()
    )
    assert difference.sqrt() < 1e-5
    steps = [[(line["split"], line["step"]) for line in logged(folder)] for folder in (whole, parts)]
    assert steps[0] == steps[1]
    losses = [[line["loss"] for line in logged(folder)] for folder in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def run_and_terminate_while_saving(dist, argv: list[str]) -> None:
    """A run that gets SIGTERM while its first checkpoint is being written."""
    original = checkpoint._write_rows

    def write_rows(*args):
        checkpoint._write_rows = original
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    checkpoint._write_rows = write_rows
    train.train(train.parse_config(argv), dist)


def test_sigterm_while_saving(toys, tmp_path):
    """The checkpoint on its way is finished, the step too, and the run goes on from there to the bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run_ranks(run, 1, settings(toys, whole, 4, save_steps=2))[0]
    run_ranks(run_and_terminate_while_saving, 1, settings(toys, parts, 4, save_steps=2))
    kept = checkpoint.list_states(parts / "checkpoints")
    assert kept and not (parts / "final").exists() and all(checkpoint.find_damage(path) is None for path in kept)
    found = run_ranks(run, 1, settings(toys, parts, 4, save_steps=2, resume="auto"))[0]
    assert all(torch.equal(found[n], p) for n, p in expected.items())
    assert logged(parts) == logged(whole)


@pytest.fixture()
def lose_clips(toys, tmp_path, monkeypatch):
    """A copy of the toys, and a function that damages a clip of each of these records when the first step begins."""
    folder = tmp_path / "data"
    shutil.copytree(toys, folder)
    records, *_ = data.open_records(str(folder / "train.jsonl"))
    original = train.train_step

    def lose(*numbers: int) -> dict[Path, bytes]:
        whole = {records[number].audio[0].path: records[number].audio[0].path.read_bytes() for number in numbers}

        def step(*args, **kwargs):
            for path in whole:
                path.write_bytes(b"no codes any more")
            return original(*args, **kwargs)

        monkeypatch.setattr(train, "train_step", step)
        return whole

    yield folder, lose
    monkeypatch.undo()


def test_a_file_that_becomes_unreadable_is_left_out_and_counted(lose_clips, tmp_path, capsys):
    """The run goes on without the sample, names it, and counts it in metrics.jsonl."""
    folder, lose = lose_clips
    lose(7)
    run(train.setup_distributed("cpu"), settings(folder, tmp_path / "o", 4, val_steps=0, epochs=3, batch_size=4))
    assert f"1 sample left out of the loss\n  {folder / 'train.jsonl'} record 7 " in capsys.readouterr().err
    lines = [line for line in logged(tmp_path / "o") if line["split"] == "train"]
    assert lines[-1]["step"] == len(lines) == 12 and (tmp_path / "o" / "final").is_dir()
    counts = [line["bad_samples"] for line in lines]
    assert counts == sorted(counts) and counts[-1] == 1, "met once in each epoch, counted once"
    assert all(line["loss"] > 0 for line in lines)


def test_too_many_unreadable_files_end_the_run_until_they_are_mended(lose_clips, tmp_path, capsys, monkeypatch):
    folder, lose = lose_clips
    whole = lose(*range(20))
    argv = settings(folder, tmp_path / "o", 4, val_steps=0, batch_size=4, max_bad_samples=2)
    assert train.main(argv) == 2
    assert "more than --max_bad_samples 2. Saved at step" in capsys.readouterr().err
    assert len(checkpoint.list_states(tmp_path / "o" / "checkpoints")) == 1
    for path, content in whole.items():
        path.write_bytes(content)
    monkeypatch.undo()
    assert train.main([*argv, "--resume", "auto"]) == 0
    lines = [line for line in logged(tmp_path / "o") if line["split"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[-1]["bad_samples"] > 2


def test_files_respect_the_umask_and_hold_no_environment(toys, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_TOKEN", "never-to-be-written")
    before = os.umask(0o027)
    try:
        run(train.setup_distributed("cpu"), settings(toys, tmp_path / "o", 4, max_steps=2, save_steps=1))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "o").rglob("*") if path.is_file()]
    assert len(files) > 8 and {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "o").rglob("*") if path.is_dir()} == {0o750}
    assert not any(b"never-to-be-written" in path.read_bytes() for path in files)
