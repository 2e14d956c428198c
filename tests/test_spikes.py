"""Loss spikes: told from noise, kept, and reproduced by tools.replay."""

from __future__ import annotations

import json
import random
import re
import shutil

import numpy as np
import pytest
from conftest import run_ranks, write_manifest
from test_resume import settings

import metrics
import train
from tools import replay


def test_the_rule():
    """Noise and trends are no spikes, a jump is, and the spikes themselves do not hide the next one."""
    chance = random.Random(0)
    falling = [1 + 4 * 0.99**i + chance.gauss(0, 0.1) for i in range(500)]
    assert not any(metrics.is_spike(value, falling[max(0, i - 64) : i], 8.0) for i, value in enumerate(falling))
    before = falling[-64:]
    middle = sorted(before)[32]
    assert metrics.is_spike(middle + 1.5, before, 8.0) and not metrics.is_spike(middle - 1.5, before, 8.0)
    assert metrics.is_spike(middle + 1.5, [*before[:54], *[9.0] * 10], 8.0)
    assert not metrics.is_spike(9.0, before[:15], 8.0), "too few to judge by"
    assert not metrics.is_spike(9.0, before, 0.0), "switched off"
    assert not metrics.is_spike(1.05, [1.0] * 64, 8.0) and metrics.is_spike(1.1, [1.0] * 64, 8.0), "a constant loss"


def spiky_run(dist, argv: list[str]) -> None:
    train.train(train.parse_config(argv), dist)


@pytest.fixture(scope="module")
def spiky(toys, tmp_path_factory):
    """A run on two ranks among whose samples one is noise; its folder."""
    folder = tmp_path_factory.mktemp("spiky")
    np.save(folder / "noise.npy", np.random.default_rng(0).integers(0, 64, (8, 60)))
    answer = {"role": "assistant", "content": {"type": "audio", "audio_url": "noise.npy"}}
    odd = write_manifest(folder / "odd.jsonl", [{"messages": [{"role": "user", "content": "x"}, answer]}])
    extra = {"train_manifest": f"{toys / 'train.jsonl'}:5,{odd}", "seed": 1, "epochs": 1, "val_manifest": "", "val_steps": 0}
    extra |= {"lr": 5e-3, "save_steps": 31, "spike_threshold": 2.5, "grad_accum": 1, "batch_size": 2, "max_steps": 32}
    run_ranks(spiky_run, 2, settings(toys, folder / "o", 0, **extra))
    return folder / "o"


def test_a_spike_is_kept_and_replayed(spiky, capsys):
    """The odd sample makes the loss jump; replayed on one process, from the checkpoint before, its step has the same loss and
    gradient norm (measured within 5e-7), dropout included, and the sample is named first."""
    lines = [json.loads(line) for line in (spiky / "metrics.jsonl").read_text().splitlines()]
    step = lines[-1]["step"]
    assert [line["spikes"] for line in lines[-2:]] == [0, 1]
    files = sorted((spiky / "spikes").iterdir())
    assert [file.name for file in files] == [f"step_{step}-rank0.safetensors", f"step_{step}-rank1.safetensors"]
    assert replay.main([str(files[1])]) == 0
    said = capsys.readouterr().out
    assert f"step {step}, 2 micro-batches, weights of {spiky / 'checkpoints' / f'step_{step - 1}'}" in said
    worst = said.splitlines()[3]
    assert "odd.jsonl record 0 " in worst and len(re.findall(r"\.jsonl record ", said)) == 4
    for name, key in (("loss", "loss"), ("grad norm", "grad_norm")):
        now, then = map(float, re.search(rf"^{name} +(\S+) +(\S+)$", said, re.MULTILINE).groups())
        assert then == pytest.approx(lines[-1][key], rel=1e-6) and now == pytest.approx(then, rel=1e-5)
    assert replay.main([str(files[0]), "--resume", "base"]) == 0
    assert "weights of base" in capsys.readouterr().out


def test_replay_says_what_it_lacks(spiky, tmp_path, capsys):
    for file in (spiky / "spikes").glob("*-rank0*"):
        shutil.copy(file, tmp_path)
        assert replay.main([str(tmp_path / file.name)]) == 2
        assert "one file per rank" in capsys.readouterr().err
        assert replay.main([str(file), "--resume", str(tmp_path)]) == 2
        assert "not a whole training checkpoint" in capsys.readouterr().err
