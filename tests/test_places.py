"""Odd places: each works, or ends with one line and nothing lost. A tokenizer that cannot be saved: test_last_mile.py."""

from __future__ import annotations

import base64
import dataclasses
import errno
import json
import os
import pickle
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist
from conftest import ROOT, run_ranks, write_manifest
from test_audio import digest, write_clips, write_random
from test_codec import write_wav
from test_resume import run, settings

import checkpoint
import prepare.__main__
import train
from common import CheckpointError, DataError
from prepare.audio import AudioStore
from prepare.codes_cache import CodesCache
from prepare.encode import encode_missing
from prepare.manifest import Mixture, read_manifest
from process import lineage

# ---- locks and clocks


def test_a_run_on_a_file_system_without_locks(toys, tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lineage.fcntl, "lockf", lockf)
    assert train.main(settings(toys, tmp_path / "o", max_steps=1, val_steps=0)) == 0
    assert "two runs in it would not notice each other" in capsys.readouterr().err


def test_setting_up_on_a_file_system_without_locks(tmp_path):
    """Stand-ins for flock, which fails, and for Python, which installs nothing."""
    (tmp_path / "flock").write_text("#!/bin/sh\nexit 1\n")
    makes_venv = f'mkdir -p {tmp_path}/venv/bin; cp "$0" {tmp_path}/venv/bin/python'
    (tmp_path / "python").write_text(f"#!/bin/sh\n[ -e {tmp_path}/venv/bin/python ] || {{ {makes_venv}; }}\n")
    for name in ("flock", "python"):
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "VENV": f"{tmp_path}/venv", "PYTHON": f"{tmp_path}/python"}
    done = subprocess.run(["bash", ROOT / "launch.sh", "setup"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "no locks on this file system" in done.stderr and (tmp_path / "venv" / ".installed").is_file()


def test_a_clock_that_steps_between_restarts(toys, tmp_path):
    """The files of the second checkpoint seem older than those of the first, and the others are from the future."""
    dist = train.setup_distributed("cpu")
    expected = run(dist, settings(toys, tmp_path / "whole", max_steps=3, val_steps=0))
    argv = settings(toys, tmp_path / "o", max_steps=3, val_steps=0, save_steps=1, keep_last=0)
    run(dist, argv)
    shutil.rmtree(tmp_path / "o" / "checkpoints" / "step_3")
    for path in (tmp_path / "o").rglob("*"):
        os.utime(path, (1, 1) if "step_2" in str(path) else (4e9, 4e9))
    found = run(dist, [*argv, "--resume", "auto"])
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    lines = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3]


# ---- caches of codes


@pytest.fixture()
def disk(tmp_path):
    """A file system of its own; returns its folder, and what makes it read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=False).returncode:
        pytest.skip("cannot mount a file system here")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    subprocess.run(["umount", folder], check=True)


def test_a_read_only_cache(disk, toys, codec_dir, tmp_path, capsys):
    """Filled by someone else: it is used; a clip that is not in it ends the run in one line."""
    folder, make_read_only = disk
    manifest = write_clips(tmp_path, 3)
    encode = ["encode", str(manifest), "--out", str(folder / "codes"), "--audio_tokenizer", str(codec_dir)]
    assert prepare.__main__.main(encode) == 0
    make_read_only()
    extra = {"train_manifest": manifest, "val_manifest": "", "val_steps": 0, "codes_dir": folder / "codes", "max_steps": 1}
    extra |= {"audio_tokenizer": codec_dir, "max_tokens": 200}
    assert train.main(settings(toys, tmp_path / "o", **extra)) == 0
    assert "the lengths cannot be kept, and are measured anew each time" in capsys.readouterr().err
    write_wav(tmp_path / "0.wav", 0.5, seed=99)
    assert train.main(settings(toys, tmp_path / "p", **extra)) == 2
    message = capsys.readouterr().err.split("error: ")[1]
    assert "codes cannot be written: [Errno 30] Read-only file system" in message and message.count("\n") == 1


def test_codes_that_are_cut_off_while_they_are_read(tmp_path):
    """The file is open, and becomes shorter: memory-mapped, it ended the process by SIGBUS."""
    expected = write_random(tmp_path, range(400))
    cache = CodesCache(tmp_path, 8)
    assert np.array_equal(cache.codes(digest(0)), expected[digest(0)])
    os.truncate(next(tmp_path.glob("*.codes")), 0)
    with pytest.raises(DataError, match=r"\.codes is damaged; delete it and .*\.clips, and encode again"):
        cache.codes(digest(399))
    again = pickle.loads(pickle.dumps(cache))  # as the loader's workers get it
    assert len(again) == 400


def encode_on_two_nodes(dist, manifest: Path, cases: list[list[Path]], codec_dir: Path) -> list[str]:
    """Each rank is the first of a node, with the caches that it sees; returns what is said in each case."""
    os.chdir(codec_dir)
    dist = dataclasses.replace(dist, local_rank=0)
    sizes, said, original = [], [], torch_dist.broadcast_object_list
    torch_dist.broadcast_object_list = lambda values, **how: (sizes.append(len(pickle.dumps(values))), original(values, **how))
    for caches in cases:
        store = AudioStore(8, 64, 25.0, caches[dist.rank], str(codec_dir))
        try:
            encode_missing(dist, store, [Mixture([read_manifest(manifest)])])
            said.append("")
        except DataError as error:
            said.append(str(error))
    assert 0 < max(sizes) < 1000, "clips were sent to every rank"
    return said


def test_caches_that_other_nodes_do_not_see(codec_dir, tmp_path):
    """Also one that was filled on the first node only: it has nothing to encode, the second has everything.

    The clips, of a megabyte each, are in the records: ranks tell each other only where they are.
    """
    folder = tmp_path / "waves"
    folder.mkdir()
    records = [json.loads(line) for line in write_clips(folder, 4).read_text().splitlines()]
    for record in records:
        path = folder / record["messages"][1]["content"].pop("audio_url")
        content = base64.b64encode(path.read_bytes() + bytes(10**6)).decode()
        record["messages"][1]["content"] |= {"audio_url": "", "raw_audio": content}
    shared = tmp_path / "shared"
    cases = [[shared, shared], [shared, tmp_path / "new"], [tmp_path / "a", tmp_path / "b"]]
    for said in run_ranks(encode_on_two_nodes, 2, write_manifest(tmp_path / "m.jsonl", records), cases, codec_dir):
        assert said[0] == ""
        for message, num_lost in zip(said[1:], (4, 2)):
            assert f"does not see {num_lost} clips there that other ranks have encoded" in message and "\n" not in message


# ---- folders that nodes share


def find_late(dist, output_dir: Path) -> list[str]:
    """Rank 1 sees no checkpoint for two seconds, then for longer than is waited."""
    found, original = [], checkpoint.list_states
    for lag_sec, lineage.LAG_SEC in ((2.0, 60.0), (60.0, 2.0)):
        started = time.monotonic()
        if dist.rank == 1:
            checkpoint.list_states = lambda folder: original(folder) if time.monotonic() - started > lag_sec else []  # noqa: B023
        try:
            found.append(str(lineage.find_newest(output_dir, dist)))
        except CheckpointError as error:
            found.append(str(error))
    return found


def test_a_listing_that_lags_is_waited_for(toys, tmp_path):
    assert train.main(settings(toys, tmp_path / "o", max_steps=1, val_steps=0, save_steps=1)) == 0
    for found, said in run_ranks(find_late, 2, tmp_path / "o"):
        assert found == str(tmp_path / "o" / "checkpoints" / "step_1")
        assert "ranks see different checkpoints; all nodes have to share this folder" in said


# ---- one broken validation clip


def test_a_broken_validation_clip_costs_no_best_checkpoint(toys, tmp_path, capsys):
    """It is named and counted, and evaluations of the same samples are compared."""
    records = [json.loads(line) for line in (toys / "val.jsonl").read_text().splitlines()]
    (tmp_path / "clips").symlink_to(toys / "clips")
    (tmp_path / "broken.npy").write_bytes(b"no codes")
    records[1]["messages"][-1]["content"] = {"type": "audio", "audio_url": "broken.npy"}
    val = write_manifest(tmp_path / "val.jsonl", records)
    extra = {"val_manifest": val, "val_steps": 2, "save_steps": 2, "keep_last": 1, "max_steps": 4}
    assert train.main(settings(toys, tmp_path / "o", **extra)) == 0
    said = capsys.readouterr().err
    assert "validation: 1 sample left out of the loss" in said and "broken.npy cannot be read as codes" in said
    *_, newest = checkpoint.list_states(tmp_path / "o" / "checkpoints")
    best = checkpoint.read_state(newest)["best"]
    assert best["bad_samples"] == 1
    assert checkpoint.find_damage(tmp_path / "o" / "checkpoints" / f"step_{best['step']}") is None
