"""What earlier versions have stored still reads, orders its data and trains on as it did then; see make_golden_run.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import huggingface_hub
import pytest
import transformers
from conftest import ROOT
from make_golden_run import FLAGS, GOLDEN, order
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file

import checkpoint
import export.__main__
import train
from config import AUDIO_TOKENIZER, REVISIONS
from prepare.audio import codec_folder, import_codec


def test_order():
    """Of epochs, micro-batches and steps: another order would repeat or leave out samples in runs that are resumed."""
    assert json.loads(json.dumps(order())) == json.loads((GOLDEN / "order.json").read_text())


@pytest.mark.parametrize("version", range(1, checkpoint.FORMAT + 1))
def test_stored_checkpoints(version, tmp_path, monkeypatch):
    """Each is exported as it is, and resumed: the next steps see the samples, and have the losses, that they had then."""
    monkeypatch.chdir(shutil.copytree(GOLDEN, tmp_path / "run"))
    stored = f"format_{version}/checkpoints/step_2"
    assert checkpoint.read_state(tmp_path / "run" / stored).get("format", 1) == version
    assert export.__main__.main(["export", stored, "model"]) == 0
    state, model = load_file(f"{stored}/shard-00001-of-00001.safetensors"), load_file("model/adapter_model.safetensors")
    masters = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
    assert len(masters) == len(model) > 0
    assert sorted(t.double().sum().item() for t in masters.values()) == sorted(t.double().sum().item() for t in model.values())
    assert train.main([*FLAGS, "--output_dir", "out", "--resume", stored]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "out" / "metrics.jsonl").read_text().splitlines()]
    expected = json.loads((GOLDEN / "steps.json").read_text())[2:]
    found = [{name: line[name] for name in expected[0]} for line in lines if line["split"] == "train"]
    assert [step | {"loss": pytest.approx(step["loss"], rel=1e-4)} for step in expected] == found


# ---- what is installed and downloaded


def test_the_lock_fits_the_requirements():
    """Every package that is asked for has a version in it, and one that is allowed."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if "==" in line)}
    for name in ("requirements.txt", "requirements-codec.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith("#"):
                wanted = Requirement(line)
                assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), line


@pytest.mark.parametrize("lock", ["", "requirements.lock"])
def test_the_lock_is_used_where_it_is_named(lock, tmp_path):
    """A stand-in for Python notes what it is asked to install."""
    makes_venv = f'mkdir -p {tmp_path}/venv/bin; cp "$0" {tmp_path}/venv/bin/python'
    script = f'#!/bin/sh\n[ -e {tmp_path}/venv/bin/python ] || {{ {makes_venv}; }}\necho "$*" >>{tmp_path}/asked\n'
    (tmp_path / "python").write_text(script)
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "VENV": f"{tmp_path}/venv", "PYTHON": f"{tmp_path}/python", "LOCK": lock}
    subprocess.run(["bash", ROOT / "launch.sh", "setup"], cwd=ROOT, env=environment, check=True)
    asked = (tmp_path / "asked").read_text()
    assert asked.count("pip install") == 2 and asked.count("-c requirements.lock --requirement=") == bool(lock)


def test_the_codec_is_of_one_revision(codec_files, tmp_path, monkeypatch):
    """A Hub cache whose newest revision is another one, as on the Hub itself."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / f"models--{AUDIO_TOKENIZER.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for revision in ("0" * 40, REVISIONS[AUDIO_TOKENIZER]):
        (repository / "snapshots" / revision).mkdir(parents=True)
        for name in ("config.json", "model.pth"):
            shutil.copy(codec_files / name, repository / "snapshots" / revision / name)
    assert codec_folder(AUDIO_TOKENIZER) == repository / "snapshots" / REVISIONS[AUDIO_TOKENIZER]
    asked = []
    monkeypatch.setattr(transformers.HubertModel, "from_pretrained", lambda name, **how: asked.append((name, how)))
    import_codec().AutoModel.from_pretrained("bosonai/hubert_base", trust_remote_code=True)
    assert asked == [("bosonai/hubert_base", {"revision": REVISIONS["bosonai/hubert_base"]})]
